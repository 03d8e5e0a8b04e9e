"""`unshot demo`: `unshot run` on the embedded model, with a task written for this project."""

from __future__ import annotations

import time
from pathlib import Path

import click

from unshot.case_file import load_case
from unshot.console import Output, dumps
from unshot.data.files import write_text
from unshot.errors import GateError
from unshot.options import PATH, common
from unshot.pipeline import Pipeline, run_pipeline

HERE = Path(__file__).parent
CASE_FILES = ("unshot.toml", "few_shot.jsonl", "data.jsonl")
# Rows of the parity gate, of 32: it is most of an export's time here.
FEW = ("--check-rows", "8")


@click.command()
@click.option(
    "--out",
    "final",
    type=PATH,
    default=Path("unshot-demo"),
    show_default=True,
    help="Directory to write.",
)
@click.option("--overwrite", is_flag=True, help="Run every stage again, also those that are already there.")
@common
def demo(final: Path, overwrite: bool, out: Output) -> None:
    """Plan, tune, export and bench a contract-clause task on the embedded model (CPU, some minutes).

    Writes the case, each stage's directory and report.html with the verdict on "5-10x faster and cheaper". An
    interrupted demo goes on where it stopped. Exit code 0 means that it ran to its verdict, whichever it is.
    """
    start = time.perf_counter()
    copy_case(final / "case")
    case_path = final / "case" / "unshot.toml"
    pipeline = stages_of(case_path, final)
    record = run_pipeline(pipeline, out, overwrite=overwrite)
    if record.verdict is None:
        raise GateError(f"stopped after {record.stopped}; {final} is kept")
    for name in ("report.html", "report.json"):
        write_text(final / name, (pipeline.folder("bench") / name).read_text(encoding="utf-8"))
    seconds = round(time.perf_counter() - start, 1)
    result = {
        "out": str(final),
        "verdict": record.verdict,
        "report": str(final / "report.html"),
        "seconds": seconds,
        "stages": [stage.plain() for stage in record.stages],
    }
    write_text(final / "demo.json", dumps(result) + "\n")
    out.result(result, f"\n{seconds:.0f} s in all; the report is {final / 'report.html'}")


def stages_of(case_path: Path, final: Path) -> Pipeline:
    """The demo's stages, with less work in each than a user's own case would want."""
    extra = {"export": FEW, "baseline": FEW}
    return Pipeline(case_path, load_case(case_path), final, extra=extra)


def copy_case(folder: Path) -> None:
    """Put the demo's case file and data where the user can read and change them; existing files stay."""
    for name in CASE_FILES:
        if not (folder / name).exists():
            write_text(folder / name, (HERE / name).read_text(encoding="utf-8"))
