"""`unshot export search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from unshot.metrics.thresholds import SEARCH_LOSS
from unshot.options import INNER_SHARE, PATH, common, out_options, whole

if TYPE_CHECKING:
    from rich.console import RenderableType

    from export.search_report import Found
    from unshot.console import Output


@click.command("search")
@click.argument("source", metavar="RUN")
@click.option(
    "--to",
    "texts",
    multiple=True,
    help="Format to try, repeatable; default: the common GGUF types and GenAI's int8 and int4.",
)
@click.option(
    "--loss",
    "limit",
    type=INNER_SHARE,
    default=SEARCH_LOSS.value,
    show_default=True,
    help="How much of the score may be lost.",
)
@click.option("--base", help="Where the run's base model lies now; default: where it was.")
@click.option("--data", type=PATH, help="Labelled rows; default: the run's test and validation.")
@click.option("--rows", type=whole(1), default=96, show_default=True, help="Rows at most.")
@click.option("--rounds", type=whole(1), default=3, show_default=True, help="Rounds of speed measurement.")
@click.option(
    "--imatrix", "with_imatrix", is_flag=True, help="Weigh llama.cpp's quantisation by the training rows."
)
@click.option(
    "--every-row", is_flag=True, help="Measure every format on all rows, not in rounds that drop the worse."
)
@click.option("--device-profile", "device", help="Refuse what does not fit, as `unshot export` does.")
@click.option("--context", type=whole(1), help="Tokens the device is to hold.")
@out_options()
@common
def search(
    source: str,
    texts: tuple[str, ...],
    limit: float,
    final: Path,
    base: str | None,
    data: Path | None,
    rows: int,
    rounds: int,
    with_imatrix: bool,
    every_row: bool,
    device: str | None,
    context: int | None,
    overwrite: bool,
    out: Output,
) -> None:
    """Measure size, speed and quality of each quantisation of RUN here, and pick the smallest that is good enough.

    Good enough: the task's score is no more than --loss below the evaluated model's, on the same rows. Writes
    report.html and search.json; no artifact is kept, the result names the command that writes the pick.
    """
    from export.device import parse_device
    from export.search import search_run

    result = search_run(
        source,
        texts,
        final,
        out,
        limit=limit,
        base=base,
        data=data,
        rows=rows,
        rounds=rounds,
        overwrite=overwrite,
        with_imatrix=with_imatrix,
        every_row=every_row,
        device=parse_device(device) if device else None,
        context=context,
    )
    if not result.proven:
        out.warn(
            f"{result.rows} rows cannot prove a loss within {limit:g}; at least {result.rows_needed} labelled "
            "rows are needed (--data)"
        )
    out.result(result, *shown(result, final))


def shown(result: Found, final: Path) -> list[RenderableType]:
    """The candidates as a rich table, and the pick."""
    from rich.table import Table

    from export.search_report import WORDS, megabytes

    table = Table(title=f"{result.source} on {result.rows} rows", title_justify="left")
    for name in ("format", "size", "lost [95%]", "KL", "prefill/s", "decode/s", "verdict"):
        table.add_column(name, justify="left" if name in ("format", "verdict") else "right")
    for row in sorted(result.candidates, key=lambda r: -r.bytes):
        loss, logits = row.loss, row.parity.figures.logits
        table.add_row(
            row.target,
            megabytes(row.bytes),
            f"{loss.loss:.3f} [{loss.low:.3f}, {loss.high:.3f}]" if loss else "-",
            f"{logits.kl:.2g}" if logits else "-",
            f"{row.prefill:.0f}" if row.prefill else "-",
            f"{row.decode:.1f}" if row.decode else "-",
            WORDS[row.verdict],
        )
    return [table, f"pick: {result.picked}; {result.command}", f"written to {final / 'report.html'}"]
