"""A comparison of two reports on the terminal, as Markdown and as JUnit XML."""

from __future__ import annotations

from rich.console import RenderableType

from bench.compare import REGRESSION, Change, Comparison
from bench.pull_request import junit

FORMS = {"ms": "{:.1f} ms", "per second": "{:.2f}/s", "$": "${:.4f}", "share": "{:.1%}", "score": "{:.3f}"}
HEADERS = ("figure", "old", "new", "change, 95%", "verdict")


def _cells(row: Change) -> list[str]:
    old, new = ("-" if v is None else FORMS[row.unit].format(v) for v in (row.old, row.new))
    r = row.ratio
    change = f"{r.value - 1:+.1%} [{r.low - 1:+.1%}, {r.high - 1:+.1%}]" if r else row.note
    return [row.name, old, new, change, f"{row.verdict} ({row.note})" if r and row.note else row.verdict]


def compare_summary(result: Comparison) -> list[RenderableType]:
    """The comparison as a rich table."""
    from rich.table import Table

    table = Table(title=f"{result.side}: {result.old} -> {result.new}", title_justify="left")
    for header in HEADERS:
        table.add_column(header, justify="left" if header in ("figure", "verdict") else "right")
    for row in result.rows:
        table.add_row(*_cells(row))
    return [*(f"warning: {w}" for w in result.warnings), table]


def to_markdown(result: Comparison) -> str:
    """The comparison as a Markdown table."""
    lines = [*(f"> Warning: {w}\n" for w in result.warnings)]
    lines += ["| " + " | ".join(HEADERS) + " |", "|---|--:|--:|--:|---|"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in result.rows]
    return "\n".join([*lines, ""]) + "\n"


def to_junit(result: Comparison) -> str:
    """The comparison as JUnit XML: a regression is a failure."""
    return junit(
        "unshot bench compare",
        [(row.name, " ".join(_cells(row)) if row.verdict == REGRESSION else None) for row in result.rows],
    )
