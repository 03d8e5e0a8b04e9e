"""What one `unshot bench` measures, and how long each cache mode is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bench.cost import PriceOptions
from bench.measure import Looks, ModeSettings
from bench.sides import CACHE_OFF, CACHE_ON, MODES
from bench.traffic import ServerOptions
from unshot.contracts.report import SideName
from unshot.data.prompts import Prompt
from unshot.data.rows import RowOptions
from unshot.metrics.intervals import LEVEL, looks
from unshot.metrics.thresholds import ERROR_RATE

# Without cache, requests are dear: the run is looked at after so many pairs (of blocks, where several requests run at
# once), after twice as many, and so on to the last, and ends at the first look that settles the verdict.
COLD_LOOKS, COLD_BLOCK_LOOKS = (6, 48), (4, 16)
COLD_SECONDS = 900.0


@dataclass
class Job:
    """What to measure: specs, prompts, rows, and how long. `cold_requests` None: until the verdict is settled."""

    baseline: str
    candidate: str
    data: Path
    final: Path
    prompts: dict[SideName, Prompt]
    task_path: Path | None = None
    plan: Path | None = None
    cold_requests: int | None = None
    block: int = 4
    warm_up: int = 2
    rows: int | None = None
    max_tokens: int | None = None
    threads: int | None = None
    concurrency: int = 1
    repeat: bool = False
    max_error_rate: float = ERROR_RATE.value
    servers: dict[SideName, ServerOptions] = field(default_factory=dict)
    server_args: dict[SideName, list[str]] = field(default_factory=dict)
    prices: dict[SideName, PriceOptions] = field(default_factory=dict)
    modes: tuple[str, ...] = MODES
    inputs: list[Path] = field(default_factory=list)
    rows_as: RowOptions | None = None

    def spec(self, side: SideName) -> str:
        """The spec of a side."""
        return self.baseline if side == "baseline" else self.candidate

    def settings(self, mode: str, requests: int, rows: int, *, warm: bool) -> ModeSettings:
        """How a mode is measured. With several requests at once a block has room for all of them to be in flight."""
        several = self.concurrency > 1
        block = max(self.block, 4 * self.concurrency) if several else self.block
        # With the cache on every row is answered once per side at least: those answers are the quality.
        ends: Looks = [(max(requests, rows), LEVEL)]
        if mode == CACHE_OFF:
            block = 2 * self.concurrency if several else 1
            if self.cold_requests is not None:
                ends = [(self.cold_requests, LEVEL)]
            elif CACHE_ON not in self.modes:
                ends = [(max(requests, rows), LEVEL)]
            elif several:
                ends = [(n * block, level) for n, level in looks(*COLD_BLOCK_LOOKS)]
            else:
                ends = list(looks(*COLD_LOOKS))
        # The machine is warm by the second mode; a request without cache leaves nothing to warm.
        return ModeSettings(mode, ends, block, self.warm_up if warm else 0, self.repeat, COLD_SECONDS)
