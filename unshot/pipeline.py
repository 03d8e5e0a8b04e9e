"""`unshot run`: the stages one after the other on a user's case, up to the first gate that says no.

Every stage is the command line that a user would type, in a process of its own; what is already there stays, so that
the same command goes on after an interruption.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import click

from unshot.case import Case
from unshot.case_file import load_case
from unshot.console import Output
from unshot.contracts.document import Document
from unshot.contracts.gates import read_gates
from unshot.contracts.manifest import Gate, describe_there, read_manifest
from unshot.contracts.record import Record
from unshot.contracts.registry import State
from unshot.data.files import json_digest, write_text
from unshot.errors import GateError, InputError
from unshot.flags import case_option
from unshot.options import PATH, common
from unshot.report import page
from unshot.stages import StageRun, run_stage

Stage = Literal["plan", "tune", "export", "baseline", "bench", "registry"]
STAGES: tuple[Stage, ...] = get_args(Stage)
# Where each stage writes below the pipeline's directory.
FOLDERS: dict[Stage, str] = {
    "plan": "plan", "tune": "run", "export": "artifacts", "baseline": "baseline", "bench": "report",
    "registry": "registry",
}  # fmt: skip
WORDS = {True: "passed", False: "failed", None: "inconclusive"}


class StageLine(Record):
    """One stage of a finished or stopped pipeline: its command line and the gates it left."""

    stage: Stage
    command: str
    seconds: float
    exit_code: int
    gates: list[Gate] = []  # noqa: RUF012 - msgspec copies it


class PipelineRecord(Document):
    """`run.json`: how far a pipeline came, on which case."""

    FILE = "run.json"
    WRITTEN_BY = "`unshot run`"

    # SHA-256 over the case and the contents of the files that it names.
    case: str
    stages: list[StageLine] = []  # noqa: RUF012
    # The gate that stopped it; None where every stage was done.
    stopped: str | None = None
    verdict: str | None = None


@dataclass(frozen=True)
class Pipeline:
    """The stages' command lines for one case. `extra` adds arguments to a stage; `baseline` is a bench SPEC."""

    case_path: Path
    case: Case
    final: Path
    baseline: str | None = None
    extra: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def folder(self, stage: Stage) -> Path:
        """Where a stage writes."""
        return self.final / FOLDERS[stage]

    def precision(self) -> str:
        """The GGUF precision that is benchmarked: the first of the case's targets. Raises `InputError`."""
        found = [t.removeprefix("gguf:") for t in self.case.export.to if t.startswith("gguf:")]
        if not found:
            raise InputError(
                f"{self.case_path}: `export.to` has no gguf target, and `unshot run` measures a GGUF file; add "
                "gguf:q8_0, or run `unshot export` and `unshot bench` by themselves"
            )
        return found[0]

    def artifact(self, stage: Stage) -> str:
        """The SPEC of the model file that `export` or `baseline` wrote."""
        return f"gguf:{self.folder(stage) / f'model-{self.precision()}.gguf'}"

    def arguments(self, stage: Stage) -> list[str]:
        """A stage's command line, without `unshot` and --out."""
        case = ["--case", str(self.case_path)]
        lines: dict[Stage, list[str]] = {
            "plan": ["plan", *case],
            "tune": ["tune", *case],
            "export": ["export", str(self.folder("tune")), *case],
            "baseline": ["export", self.case.candidate.model, "--to", f"gguf:{self.precision()}"],
            "bench": [
                "bench", *case, "--baseline", self.baseline or self.artifact("baseline"),
                "--candidate", self.artifact("export"), "--plan", str(self.folder("plan")),
            ],
            "registry": [
                "deploy", "registry", "add", str(self.folder("export")), "--run", str(self.folder("tune")),
                "--bench", str(self.folder("bench")),
            ],
        }  # fmt: skip
        return [*lines[stage], *self.extra.get(stage, ())]

    def stages(self, until: Stage) -> list[Stage]:
        """The stages to run, in order."""
        wanted = STAGES[: STAGES.index(until) + 1]
        return [stage for stage in wanted if stage != "baseline" or self.baseline is None]

    def digest(self) -> str:
        """What the case says and what its files hold."""
        return json_digest([self.case.plain(), [file.sha256 for file in describe_there(self.case.files())]])


def run_pipeline(
    pipeline: Pipeline, out: Output, *, until: Stage = "bench", overwrite: bool = False
) -> PipelineRecord:
    """Run the stages up to `until` or to the first failed gate; `run.json` and `index.html` say how far it came.

    Raises `InputError` where the directory was begun on another case, `OutsideError` where a stage failed.
    """
    if "bench" in pipeline.stages(until):
        pipeline.precision()
    record, earlier = _begin(pipeline, overwrite)
    if pipeline.baseline is None and pipeline.case.baseline.api and until in ("bench", "registry"):
        out.warn(
            f"{pipeline.case.baseline.api} cannot be measured without an address: {pipeline.case.candidate.model} with "
            "the long prompt stands in as the baseline; give --baseline URL to measure it"
        )
    lines: list[StageLine] = []
    for stage in pipeline.stages(until):
        done = run_stage(
            stage, pipeline.arguments(stage), pipeline.folder(stage), out, overwrite=overwrite,
            option="--store" if stage == "registry" else "--out",
            last=pipeline.folder(stage) / State.FILE if stage == "registry" else None,
        )  # fmt: skip
        line = _line(stage, done, pipeline.folder(stage))
        before = earlier.pop(stage, None)
        if done.was_there and before is not None:  # it took so long, and ended so, in an earlier run
            line = line.changed(seconds=before.seconds, exit_code=before.exit_code)
        lines.append(line)
        record.stages = [*lines, *earlier.values()]
        failed = [gate for gate in line.gates if gate.passed is False]
        if stage == "bench":
            record.verdict = read_manifest(pipeline.folder(stage), verify=False).verdict
        if failed:
            record.stopped = f"{stage}: gate {failed[0].name} failed ({failed[0].detail})"
        record.write(pipeline.final)
        write_text(pipeline.final / "index.html", index(record))
        if failed:
            break
    record.stages = lines
    record.write(pipeline.final)
    return record


def _begin(pipeline: Pipeline, overwrite: bool) -> tuple[PipelineRecord, dict[Stage, StageLine]]:
    """A new record, and what an earlier run on the same case said of its stages."""
    digest = pipeline.digest()
    pipeline.final.mkdir(parents=True, exist_ok=True)
    if (pipeline.final / PipelineRecord.FILE).is_file() and not overwrite:
        earlier = PipelineRecord.read(pipeline.final)
        if earlier.case != digest:
            raise InputError(
                f"{pipeline.final}: begun on another case, or the case or its data changed since; give another --out, "
                "or --overwrite to run every stage again"
            )
        return PipelineRecord(case=digest), {line.stage: line for line in earlier.stages}
    record = PipelineRecord(case=digest)
    record.write(pipeline.final)
    return record, {}


def _line(stage: Stage, done: StageRun, folder: Path) -> StageLine:
    gates = list(read_gates(folder).values()) if stage != "registry" else []
    return StageLine(stage, done.command, done.seconds, done.exit_code, gates)


def index(record: PipelineRecord) -> str:
    """One page with every stage, its gates and a link to its report."""
    reports = {"plan": "report.html", "tune": "README.md", "export": "README.md", "bench": "report.html"}
    headline = record.stopped or (
        f"Every stage done; the claim is {record.verdict}" if record.verdict else "Every stage done"
    )
    rows = [[line.stage, f"{line.seconds:,.0f} s", _gates(line), line.command] for line in record.stages]
    links: dict[str, str] = {
        line.stage: f"{FOLDERS[line.stage]}/{reports[line.stage]}"
        for line in record.stages
        if line.stage in reports
    }
    return page.page(
        "unshot run",
        page.verdict(headline, kind="bad" if record.stopped else "good"),
        page.table(["stage", "time", "gates", "command"], rows),
        page.links(links),
    )


def _gates(line: StageLine) -> str:
    return "; ".join(f"{gate.name} {WORDS[gate.passed]}" for gate in line.gates) or "–"


@click.command(name="run")
@click.option("--out", "final", type=PATH, required=True, help="Directory to write.")
@click.option(
    "--until", type=click.Choice(STAGES), default="bench", show_default=True, help="The last stage to run."
)
@click.option(
    "--baseline", metavar="SPEC",
    help="What runs today, as `unshot bench --baseline` takes it; default: the base model with the long prompt.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Run every stage again, also those that are already there.")
@case_option
@common
def run(
    final: Path, until: Stage, baseline: str | None, overwrite: bool, case_path: Path | None, out: Output
) -> None:
    """Plan, tune, export, measure and register a case, up to the first gate that fails.

    The same command goes on after an interruption. `index.html` links the stages' reports. Exit code 1 where a gate
    stopped it.
    """
    case_path = case_path or Path("unshot.toml")
    case = load_case(case_path)
    start = time.perf_counter()
    record = run_pipeline(Pipeline(case_path, case, final, baseline), out, until=until, overwrite=overwrite)
    out.result(
        record.plain(), f"\n{time.perf_counter() - start:.0f} s; every stage's report: {final / 'index.html'}"
    )
    if record.stopped:
        raise GateError(f"stopped after {record.stopped}; {final} is kept")
