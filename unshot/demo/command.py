"""`unshot demo`: runs the stages as a user would, each as its own command line, and shows the verdict."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from unshot import embedded
from unshot.console import Output, dumps
from unshot.contracts.manifest import write_text
from unshot.options import common
from unshot.stages import run_stage

HERE = Path(__file__).parent
CASE_FILES = ("unshot.toml", "few_shot.jsonl", "data.jsonl")


@click.command()
@click.option(
    "--out",
    "final",
    type=click.Path(path_type=Path),
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
    done = []
    for name, arguments in stages(final):
        done.append(run_stage(name, arguments, final / name, out, overwrite=overwrite))
    for name in ("report.html", "report.json"):
        write_text(final / name, (final / "report" / name).read_text(encoding="utf-8"))
    report = json.loads((final / "report" / "report.json").read_text(encoding="utf-8"))
    seconds = round(time.perf_counter() - start, 1)
    result = {
        "out": str(final),
        "verdict": report["verdict"],
        "report": str(final / "report.html"),
        "seconds": seconds,
        "stages": done,
    }
    write_text(final / "demo.json", dumps(result) + "\n")
    out.result(result, f"\n{seconds:.0f} s in all; the report is {final / 'report.html'}")


def copy_case(folder: Path) -> None:
    """Put the demo's case file and data where the user can read and change them; existing files stay."""
    for name in CASE_FILES:
        if not (folder / name).exists():
            write_text(folder / name, (HERE / name).read_text(encoding="utf-8"))


def stages(final: Path) -> list[tuple[str, list[str]]]:
    """Each stage's directory name and command line (without `unshot` and --out)."""
    case = ["--case", str(final / "case" / "unshot.toml")]
    tuned, base = final / "artifacts" / "model-q8_0.gguf", final / "baseline" / "model-q8_0.gguf"
    few = ["--check-rows", "8"]  # of 32: the parity gate is most of an export's time here
    systems = ["--baseline", f"gguf:{base}", "--candidate", f"gguf:{tuned}"]
    return [
        ("plan", ["plan", *case]),
        ("run", ["tune", *case]),
        ("artifacts", ["export", str(final / "run"), *case, *few]),
        ("baseline", ["export", embedded.NAME, "--to", "gguf:q8_0", *few]),
        ("report", ["bench", *case, *systems, "--cold-requests", "4", "--plan", str(final / "plan")]),
    ]
