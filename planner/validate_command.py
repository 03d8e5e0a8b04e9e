"""`unshot plan validate`: the command around `planner.latency.validate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from unshot.console import Output
from unshot.options import PATH, common

if TYPE_CHECKING:
    from rich.table import Table

    from planner.latency.validate import Report


@click.command("validate")
@click.argument("measured", nargs=-1, required=True, type=PATH)
@click.option(
    "--hold-out",
    type=click.Choice(["none", "gpu", "model"]),
    default="none",
    show_default=True,
    help="Leave each GPU or model out in turn and fit on the other rows; none uses the catalog as it is.",
)
@common
def validate_command(measured: tuple[Path, ...], hold_out: str, out: Output) -> None:
    """Forecast each row of MEASURED (CSV files of throughput, latency or single-stream speed); show the errors.

    With several files and `--hold-out model` (or gpu), a file of one model cannot leave it out: its rows
    are forecast with the catalog, and a warning says so.
    """
    reports = [_one(path, hold_out, out, alone=len(measured) == 1) for path in measured]
    tables = [] if out.json_mode else [table for report in reports for table in _tables(report)]
    if len(reports) == 1:
        out.result(reports[0].plain(), *tables)
        return
    files = [report.plain() for report in reports]
    summary = {f"{Path(f['file']).name}: {k}": v for f in files for k, v in f["summary"].items()}
    out.result({"hold_out": hold_out, "summary": summary, "files": files}, *tables)


def _one(path: Path, hold_out: str, out: Output, *, alone: bool) -> Report:
    from planner.latency.validate import NothingToLeaveOut, validate

    try:
        report = validate(path, hold_out)
    except NothingToLeaveOut as error:
        if alone:
            raise
        out.warn(f"{path}: {error}; its rows are forecast with the catalog")
        report = validate(path, "none")
    if report.skipped:
        first = report.skipped[0].reason
        out.warn(
            f"{len(report.skipped)} rows skipped, for which the catalog lacks a name; the first: {first}"
        )
    if report.does_not_fit:
        first_line = report.does_not_fit[0].line
        out.warn(
            f"{len(report.does_not_fit)} rows do not fit their device, by this forecast, and are in no error below; "
            f"the first: line {first_line}"
        )
    return report


def _tables(report: Report) -> list[Table]:
    from rich.table import Table

    rows = Table(title=f"{report.file}, hold-out: {report.hold_out}")
    text = {"model", "GPU", "engine", "precision", "figure"}
    for name in (
        "line", "model", "GPU", "engine", "precision", "in", "out", "clients", "figure", "measured", "forecast",
        "error",
    ):  # fmt: skip
        rows.add_column(name, justify="left" if name in text else "right")
    for row in report.rows:
        gpu = row.gpu if row.tensor_parallel == 1 else f"{row.tensor_parallel} x {row.gpu}"
        fits = row.forecast is not None and row.error is not None
        rows.add_row(
            str(row.line), row.model, gpu, row.engine, row.precision, str(row.input_tokens), str(row.output_tokens),
            str(row.concurrency or ""), f"{row.quantity}, {row.unit}", f"{row.measured:,.1f}",
            f"{row.forecast:,.1f}" if fits else "does not fit", f"{100 * (row.error or 0):+.1f}%" if fits else "",
        )  # fmt: skip
    summary = Table(title="absolute error")
    for name in ("figure", "rows", "median", "p90", "mean, signed", "in the 90% band"):
        summary.add_column(name, justify="left" if name == "figure" else "right")
    for name, found in report.summary.items():
        summary.add_row(
            name, str(found.rows), f"{100 * found.median_abs_error:.1f}%", f"{100 * found.p90_abs_error:.1f}%",
            f"{100 * found.mean_error:+.1f}%", f"{found.inside:.0%}",
        )  # fmt: skip
    return [rows, summary]
