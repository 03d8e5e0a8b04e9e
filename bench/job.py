"""What one `unshot bench` measures: the rows that the candidate never saw, and how long each cache mode is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bench.cost import PriceOptions
from bench.measure import Looks, ModeSettings
from bench.sides import CACHE_OFF, CACHE_ON, MODES
from bench.traffic import ServerOptions
from unshot.case import BenchSettings, Case
from unshot.console import Output
from unshot.contracts.artifact import artifact_of
from unshot.contracts.report import SideName
from unshot.contracts.task import Task, read_task
from unshot.data.prompts import Prompt
from unshot.data.rows import RowOptions
from unshot.errors import InputError
from unshot.metrics.intervals import LEVEL
from unshot.metrics.ratios import looks
from unshot.metrics.thresholds import ERROR_RATE

# Without cache, requests are dear: the run is looked at after so many pairs (of blocks, where several requests run at
# once), after twice as many, and so on to the last, and ends at the first look that settles the verdict.
COLD_LOOKS, COLD_BLOCK_LOOKS = (6, 48), (4, 16)
COLD_SECONDS = 900.0


@dataclass
class Job:
    """What to measure: specs, prompts, rows, and how long."""

    baseline: str
    candidate: str
    data: Path
    final: Path
    prompts: dict[SideName, Prompt]
    task: Task | None = None
    task_path: Path | None = None
    plan: Path | None = None
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

    def settings(self, mode: str, bench: BenchSettings, rows: int, *, warm: bool) -> ModeSettings:
        """How a mode is measured on so many rows.

        With several requests at once a block has room for all of them to be in flight.
        """
        several = self.concurrency > 1
        block = max(self.block, 4 * self.concurrency) if several else self.block
        # With the cache on every row is answered once per side at least: those answers are the quality.
        ends: Looks = [(max(bench.requests, rows), LEVEL)]
        if mode == CACHE_OFF:
            block = 2 * self.concurrency if several else 1
            if bench.cold_requests is not None:
                ends = [(bench.cold_requests, LEVEL)]
            elif CACHE_ON not in self.modes:
                ends = [(max(bench.requests, rows), LEVEL)]
            elif several:
                ends = [(n * block, level) for n, level in looks(*COLD_BLOCK_LOOKS)]
            else:
                ends = list(looks(*COLD_LOOKS))
        # The machine is warm by the second mode; a request without cache leaves nothing to warm.
        return ModeSettings(mode, ends, block, self.warm_up if warm else 0, self.repeat, COLD_SECONDS)


@dataclass(frozen=True)
class Asked:
    """The rows that both sides are asked, how they are read, and the task of the candidate (None: of the rows).

    `task_path` is the task's file, where it has one.
    """

    data: Path
    rows_as: RowOptions
    task: Task | None = None
    task_path: Path | None = None


def rows_and_task(
    baseline: str, candidate: str, data: Path | None, task_path: Path | None, case: Case, out: Output
) -> Asked:
    """The rows to ask and the task: what was given, else what the artifact and the run behind it left.

    The case (and the flags over it) stands over the task, whose instruction the case gets.
    """
    artifact_of(baseline)
    artifact = artifact_of(candidate)
    unseen = artifact.held_out() if artifact else None
    made_from = artifact.manifest.run if artifact else None
    gone = (
        f"the run behind the candidate, {made_from}, is gone or was tuned again"
        if made_from and not unseen
        else ""
    )
    rows_as = case.rows_as()
    if data is None and unseen is not None:
        data, rows_as = unseen.data, RowOptions(keep_system=rows_as.keep_system)
        out.log(f"rows: the test split of the candidate's run, {data}")
    elif data is None and case.task.data is not None:
        data = case.task.data
        out.warn(f"{data}: the candidate may have been tuned on these rows; --data gives others")
        if gone:
            out.warn(gone)
    if data is None:
        raise InputError(f"{gone or 'no data'}; give --data, or `data` under [task] in the case file")
    task_path = task_path or (unseen.task if unseen else None)
    task = read_task(task_path) if task_path else artifact.manifest.task if artifact else None
    if task is not None:
        task = task.under(case.task, out.warn)
        case.task.instruction = task.instruction
    return Asked(data, rows_as, task, task_path)
