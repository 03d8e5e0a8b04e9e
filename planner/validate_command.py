"""`unshot plan validate`: the command around `planner.validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from unshot.console import Output
from unshot.options import common


@click.command("validate")
@click.argument("published", type=click.Path(path_type=Path))
@click.option(
    "--hold-out",
    type=click.Choice(["none", "gpu", "model"]),
    default="none",
    show_default=True,
    help="Leave each GPU or model out in turn and fit on the other rows; none uses the catalog as it is.",
)
@common
def validate_command(published: Path, hold_out: str, out: Output) -> None:
    """Forecast each row of PUBLISHED (a CSV of measured throughput or single-stream speed) and show the errors."""
    from planner.validate import validate

    report = validate(published, hold_out)
    if out.json_mode:
        out.result(report)
        return
    out.result(report, *_tables(report))


def _tables(report: dict[str, Any]) -> list[Any]:
    from rich.table import Table

    rows = Table(title=f"{report['file']}, hold-out: {report['hold_out']}")
    for name in ("line", "model", "GPU", "precision", "in", "out", "what", "measured", "forecast", "error"):
        rows.add_column(name, justify="right" if name in {"line", "in", "out", "measured", "forecast", "error"} else "left")
    for row in report["rows"]:
        gpu = row["gpu"] if row["tensor_parallel"] == 1 else f"{row['tensor_parallel']} x {row['gpu']}"
        rows.add_row(
            str(row["line"]), row["model"], gpu, row["precision"], str(row["input_tokens"]),
            str(row["output_tokens"]), row["quantity"], f"{row['measured']:,.1f}", f"{row['forecast']:,.1f}",
            f"{100 * row['error']:+.1f}%",
        )  # fmt: skip
    summary = Table(title="absolute error")
    for name in ("what", "rows", "median", "p90", "mean, signed"):
        summary.add_column(name, justify="left" if name == "what" else "right")
    for name, row in report["summary"].items():
        summary.add_row(
            name, str(row["rows"]), f"{100 * row['median_abs_error']:.1f}%", f"{100 * row['p90_abs_error']:.1f}%",
            f"{100 * row['mean_error']:+.1f}%",
        )  # fmt: skip
    return [rows, summary]
