"""`unshot plan validate`: the command around `planner.validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from unshot.console import Output
from unshot.options import PATH, common


@click.command("validate")
@click.argument("published", nargs=-1, required=True, type=PATH)
@click.option(
    "--hold-out",
    type=click.Choice(["none", "gpu", "model"]),
    default="none",
    show_default=True,
    help="Leave each GPU or model out in turn and fit on the other rows; none uses the catalog as it is.",
)
@common
def validate_command(published: tuple[Path, ...], hold_out: str, out: Output) -> None:
    """Forecast each row of PUBLISHED (CSV files of measured throughput or single-stream speed); show the errors.

    With several files and `--hold-out model` (or gpu), a file of one model cannot leave it out: its rows
    are forecast with the catalog, and a warning says so.
    """
    reports = [_one(path, hold_out, out, alone=len(published) == 1) for path in published]
    if len(reports) == 1:
        out.result(reports[0], *([] if out.json_mode else _tables(reports[0])))
        return
    summary = {f"{Path(r['file']).name}: {k}": v for r in reports for k, v in r["summary"].items()}
    together = {"hold_out": hold_out, "unit": reports[0]["unit"], "summary": summary, "files": reports}
    out.result(together, *([] if out.json_mode else [t for r in reports for t in _tables(r)]))


def _one(path: Path, hold_out: str, out: Output, *, alone: bool) -> dict[str, Any]:
    from planner.validate import NothingToLeaveOut, validate

    try:
        report = validate(path, hold_out)
    except NothingToLeaveOut as error:
        if alone:
            raise
        out.warn(f"{path}: {error}; its rows are forecast with the catalog")
        report = validate(path, "none")
    if report["skipped"]:
        first, count = report["skipped"][0], len(report["skipped"])
        out.warn(f"{count} rows skipped, whose model, GPU or precision the catalog lacks; the first: {first}")
    return report


def _tables(report: dict[str, Any]) -> list[Any]:
    from rich.table import Table

    rows = Table(title=f"{report['file']}, hold-out: {report['hold_out']}")
    for name in ("line", "model", "GPU", "precision", "in", "out", "what", "measured", "forecast", "error"):
        rows.add_column(
            name,
            justify="right" if name in {"line", "in", "out", "measured", "forecast", "error"} else "left",
        )
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
