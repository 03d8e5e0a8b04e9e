"""`unshot eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unshot.options import common

if TYPE_CHECKING:
    from unshot.console import Output


@click.command("eval")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--data", type=click.Path(path_type=Path), help="Rows to score on; default: the run's test split."
)
@click.option(
    "--compare", "other", metavar="RUN", type=click.Path(path_type=Path), help="A second run, same rows."
)
@click.option("--base", help="Where the base model lies, if not where it was tuned.")
@click.option("--out", "final", type=click.Path(path_type=Path), help="Directory for scores and answers.")
@click.option("--overwrite", is_flag=True, help="Replace the directory where it exists.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the bootstrap.")
@click.option("--input-column", help="Column or field that holds the input.")
@click.option("--output-column", help="Column or field that holds the answer.")
@common
def evaluate(run: Path, out: Output, **settings: Any) -> None:
    """Score RUN's really generated answers, with intervals; every reading of a test is recorded in the run."""
    from tune.evaluate.run import evaluate_run
    from tune.evaluate.tables import tables

    result = evaluate_run(run, out, **settings)
    reading = result["reading"]
    if reading["reading"] > 1:
        out.warn(
            f"reading {reading['reading']} of {reading['data']}: what is chosen by its score is no longer tested by it"
        )
    if result["like_training"]:
        out.warn(
            f"{len(result['like_training'])} of {result['rows']} rows are near-duplicates of training rows"
        )
    out.result(result, *tables(result))
