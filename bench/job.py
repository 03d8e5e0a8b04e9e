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
from unshot.contracts.manifest import NAME, Manifest, read_manifest, verify_file
from unshot.contracts.report import SideName
from unshot.contracts.task import read_task
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


def rows_and_task(
    baseline: str, candidate: str, data: Path | None, task_path: Path | None, case: Case, out: Output
) -> tuple[Path, Path | None]:
    """The rows to ask and the task: what was given, else what the run behind the candidate left."""
    artifact_manifest(baseline)
    unseen = held_out(artifact_manifest(candidate))
    if data is None and unseen is not None:
        data, task_path = unseen.data, task_path or unseen.task
        out.log(f"rows: the test split of the candidate's run, {data}")
    elif data is None and case.task.data is not None:
        data = case.task.data
        out.warn(f"{data}: the candidate may have been tuned on these rows; --data gives others")
    if data is None:
        raise InputError("no data; give --data, or `data` under [task] in the case file")
    if case.task.instruction is None and task_path is not None:
        case.task.instruction = read_task(task_path).instruction
    return data, task_path


# What `unshot export` writes; a Hugging Face directory is tune's or nobody's.
EXPORTED = ("gguf", "onnx", "genai")


@dataclass(frozen=True)
class HeldOut:
    """The test split of the run that made an artifact, and its task."""

    data: Path
    task: Path


def artifact_manifest(spec: str) -> Manifest | None:
    """The manifest of `unshot export` beside the artifact of a SPEC, None where there is none.

    Raises `InputError` where the artifact's files do not match their hashes.
    """
    kind, _, target = spec.removeprefix("serve:").partition(":")
    path = Path(target)
    if kind not in EXPORTED or not path.exists():
        return None
    folder = path.parent
    if not (folder / NAME).is_file():
        return None
    manifest = read_manifest(folder, stage="export", verify=False)
    for name, facts in manifest.outputs.items():
        if name == path.name or name.startswith(f"{path.name}/"):
            verify_file(folder / name, facts)
    return manifest


def held_out(manifest: Manifest | None) -> HeldOut | None:
    """Where the run behind an exported artifact keeps its test rows; None where it had none or is gone.

    Raises `InputError` where they were changed since.
    """
    run = manifest.run if manifest else None
    if not run or not (Path(run) / NAME).is_file():
        return None
    written = read_manifest(Path(run), stage="tune", verify=False)
    names = ("splits/test.jsonl", "task.json")
    for name in names:
        if name not in written.outputs:
            raise InputError(f"{run}: its manifest lists no {name}; run `unshot tune` again")
        verify_file(Path(run) / name, written.outputs[name])
    return HeldOut(*(Path(run) / name for name in names))
