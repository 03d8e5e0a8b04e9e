"""`plan.xlsx`, the plan with live formulas (inputs in one sheet), and `plan.csv`, its figures.

The formulas are those of `planner.options`; LibreOffice recalculates them in a test.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

from planner.options import HOURS_PER_MONTH
from planner.plan import Plan
from planner.terms import ApiTerms, HostedTerms, terms
from unshot.contracts.plan import PlanFile
from unshot.errors import OutsideError

if TYPE_CHECKING:
    from openpyxl.worksheet.worksheet import Worksheet

Cell = str | float | int | None
RATE, HORIZON, LEAST = "inputs!$B$2", "inputs!$B$3", "inputs!$B$4"
API_FACTOR, GPU_FACTOR = "inputs!$B$5", "inputs!$B$6"
HOURS, SECONDS, PEAK = "inputs!$B$7", "inputs!$B$8", "inputs!$B$9"
DAY = "inputs!$B$12:$B$35"
OPTIONS_ROW = 11  # of the summary: the heading of the options

API_COLUMNS = (
    "option", "static prefix, tokens", "varying input, tokens", "output, tokens", "input, $/M", "cached, $/M",
    "cache write, $/M", "long cache write, $/M", "output, $/M", "cached tokens", "lifetime, s", "long lifetime, s",
    "hit share", "hit share, long", "$ per request", "$ per request, long", "recurring, $/month", "one-off, $",
    "$/month", "$ over the horizon",
)  # fmt: skip
HOSTED_COLUMNS = (
    "option", "capacity per replica, requests/s", "GPUs per replica", "$ per GPU hour", "tasks that share it",
    "throughput lost to sharing", "operations, $/month", "other recurring, $/month", "training, once, $",
    "other one-off, $", "replicas", "GPUs, $/month", "one-off, $", "$/month", "$ over the horizon", "utilisation",
)  # fmt: skip


def write_workbook(plan: Plan, path: Path) -> None:
    """Write the workbook. Raises `OutsideError` without openpyxl."""
    try:
        from openpyxl import Workbook
    except ImportError:
        raise OutsideError("plan.xlsx needs the package openpyxl; run `pip install openpyxl`") from None
    book = Workbook()
    apis, hosted = terms(plan)
    summary = book.active
    assert summary is not None
    summary.title = "summary"
    places = {one.key: f"api!S{row}" for row, one in enumerate(apis, 2)}
    places |= {one.key: f"hosted!N{row}" for row, one in enumerate(hosted, 2)}
    _fill(summary, _summary(plan, places), headings=(3, OPTIONS_ROW), freeze="")
    summary.merge_cells("A1:C1")
    summary.row_dimensions[1].height = 95
    summary.column_dimensions["B"].width = summary.column_dimensions["C"].width = 24
    _fill(book.create_sheet("inputs"), _inputs(plan), headings=(1, 11))
    book["inputs"].column_dimensions["B"].width, book["inputs"].column_dimensions["C"].width = 24, 70
    _fill(book.create_sheet("api"), [API_COLUMNS, *(_api(one, row) for row, one in enumerate(apis, 2))])
    _fill(
        book.create_sheet("hosted"),
        [HOSTED_COLUMNS, *(_hosted(one, row) for row, one in enumerate(hosted, 2))],
    )
    _fill(
        book.create_sheet("assumptions"),
        [("assumption or warning",), *((line,) for line in (*plan.warnings, *plan.assumptions))],
        freeze="A2",
    )
    book["assumptions"].column_dimensions["A"].width = 140
    book.save(path)


# How a figure is shown, by what its heading, or the unit beside it, holds; the first that fits.
FORMATS = (
    ("$ per request", "$0.000000"), ("/M", "$#,##0.00####"), ("$", "$#,##0.00"), ("hit share", "0.0%"),
    ("utilisation", "0.0%"), ("lost", "0.0%"), ("tokens", "#,##0.0"), ("requests/s", "#,##0.000"), ("months", "0.0"),
    ("replicas", "#,##0.##"), ("factor", "0.00"),
)  # fmt: skip


def _fill(
    sheet: Worksheet, rows: list[tuple[Cell, ...]], *, headings: tuple[int, ...] = (1,), freeze: str = "B2"
) -> None:
    """Write rows and make them readable on screen and paper; figures that may be changed are blue on yellow."""
    from openpyxl.styles import Alignment, Font, PatternFill

    for row in rows:
        sheet.append(list(row))
    yellow, grey = PatternFill("solid", fgColor="FFFBE6"), PatternFill("solid", fgColor="E8ECF1")
    names: tuple[str, ...] = ()
    for line in sheet.iter_rows():
        if line[0].row in headings:
            names = tuple(str(cell.value or "") for cell in line)
        unit = str(line[2].value or "") if len(names) > 2 and names[2] == "unit" else ""
        for at, cell in enumerate(line):
            number = isinstance(cell.value, int | float) or str(cell.value).startswith("=")
            right = number or (cell.row in headings and at > 0 and names[at] != "unit")
            side = "right" if right else "left"
            cell.alignment = Alignment(wrap_text=True, vertical="top", horizontal=side, indent=int(at > 0))
            if cell.row in headings and cell.value is not None:
                cell.font, cell.fill = Font(name="Calibri", size=11, bold=True), grey
            elif number:
                about = unit or names[at] if at < len(names) else ""
                cell.number_format = next((form for word, form in FORMATS if word in about), "General")
                if isinstance(cell.value, int | float):
                    cell.font, cell.fill = Font(name="Calibri", size=11, color="0000FF"), yellow
    sheet.row_dimensions[headings[0]].height = 45 if len(rows[headings[0] - 1]) > 3 else 15
    sheet.column_dimensions["A"].width = 60
    for column in "BCDEFGHIJKLMNOPQRST":
        sheet.column_dimensions[column].width = 14
    if freeze:
        sheet.freeze_panes = freeze
        sheet.print_title_rows = "1:1"
    sheet.page_setup.orientation, sheet.page_setup.fitToHeight = "landscape", 0
    sheet.sheet_properties.pageSetUpPr.fitToPage = True
    sheet.oddFooter.center.text = "&A, page &P of &N"


def _inputs(plan: Plan) -> list[tuple[Cell, ...]]:
    hosted = [o for o in plan.options if o.serving is not None]
    shape = plan.options[0].shape
    return [
        ("input", "value", "unit"),
        ("mean request rate", plan.rate, "requests/s"),
        ("horizon", plan.case.plan.horizon_months, "months"),
        ("replicas kept at least", hosted[0].min_replicas if hosted else 1, "of a self-hosted model"),
        ("API prices, factor", 1.0, "0.9: a discount of 10%; the prices themselves are in the sheet api"),
        (
            "GPU prices, factor",
            1.0,
            "0.6: a reservation at 60%; the prices themselves are in the sheet hosted",
        ),
        ("hours per month", HOURS_PER_MONTH, "h"),
        ("seconds per month", f"={HOURS}*3600", "s"),
        (
            "busiest hour over the mean",
            shape.peak,
            "sets the replicas; the hours below set how often a cache is hit",
        ),
        (),
        ("hour of the day", "factor on the mean rate", ""),
        *((f"hour {hour}", factor, "") for hour, factor in enumerate(shape.hourly)),
    ]


def _api(one: ApiTerms, row: int) -> tuple[Cell, ...]:
    def hit(lifetime: str) -> str:
        return f"=SUMPRODUCT({DAY},1-EXP(-{RATE}*{DAY}*{lifetime}{row}))/SUM({DAY})"

    def cost(share: str, write: str, *, has_write: bool) -> str:
        """Dollars of a request, as `planner.prices.request_cost`."""
        fresh = f"(B{row}+C{row}-J{row})*E{row}"
        misses = f"(1-{share}{row})*J{row}*{write if has_write else 'E'}{row}"
        return f"=({fresh}+{misses}+{share}{row}*J{row}*F{row}+D{row}*I{row})/1000000*{API_FACTOR}"

    long = one.write_long is not None
    per_request = f"MIN(O{row},P{row})" if long else f"O{row}"
    return (
        one.name, one.prefix, one.varying, one.answer + one.reasoning, one.input, one.cached, one.write,
        one.write_long, one.output, one.held, one.ttl, one.ttl_long,
        hit("K") if one.held else 0, hit("L") if one.held and long else 0,
        cost("M", "G", has_write=one.write is not None),
        cost("N", "H", has_write=True) if long else None,
        one.recurring, one.once, f"={per_request}*{RATE}*{SECONDS}+Q{row}", f"=S{row}*{HORIZON}+R{row}",
    )  # fmt: skip


def _hosted(one: HostedTerms, row: int) -> tuple[Cell, ...]:
    need = f"{RATE}*{PEAK}/(B{row}*(1-F{row}))"
    replicas = (
        f"=MAX({need},{LEAST}/E{row})"
        if one.shared_by > 1
        else f"=MAX(ROUNDUP({need}-0.000000001,0),{LEAST})"
    )
    return (
        one.name, one.capacity, one.gpus, one.hour, one.shared_by, one.loss, one.operations, one.recurring,
        one.training_once, one.once, replicas, f"=K{row}*C{row}*D{row}*{GPU_FACTOR}*{HOURS}",
        f"=I{row}*{GPU_FACTOR}+J{row}", f"=L{row}+G{row}+H{row}", f"=N{row}*{HORIZON}+M{row}",
        f"={RATE}/(K{row}*B{row}*(1-F{row}))",
    )  # fmt: skip


def _summary(plan: Plan, places: dict[str, str]) -> list[tuple[Cell, ...]]:
    """The verdict, the two options it weighs, and every usable option; blue figures in all sheets may be changed."""
    rows: list[tuple[Cell, ...]] = [(f"As planned: {plan.verdict.summary}",), ()]
    names = {o.key: o.name for o in plan.options}
    options: list[tuple[Cell, ...]] = [
        ("option", "$/month", "$ over the horizon"),
        *((names[key], f"={place}", f"={_beside(place)}") for key, place in places.items()),
    ]
    if plan.keep is None or plan.tuned is None:
        return [*rows, *[()] * (OPTIONS_ROW - 1 - len(rows)), *options]
    keep, tuned = places[plan.keep.key], places[plan.tuned.key]

    def once(place: str) -> str:
        sheet, cell = place.split("!")
        return f"{sheet}!R{cell[1:]}" if sheet == "api" else f"{sheet}!M{cell[1:]}"

    return [
        *rows,
        ("figure", "value", "unit"),
        (f"keep: {plan.keep.name}", f"={keep}", "$/month"),
        (f"tune: {plan.tuned.name}", f"={tuned}", "$/month"),
        ("saving", "=B4-B5", "$/month"),
        ("one-off cost of tuning beyond keeping", f"={once(tuned)}-{once(keep)}", "$"),
        ("saved over the horizon", f"=B6*{HORIZON}-B7", "$"),
        ("payback", '=IF(B6>0,MAX(B7/B6,0),"never")', "months"),
        (),
        *options,
    ]


def _beside(place: str) -> str:
    """The cell to the right."""
    sheet, cell = place.split("!")
    return f"{sheet}!{chr(ord(cell[0]) + 1)}{cell[1:]}"


def csv_text(file: PlanFile) -> str:
    """`plan.csv`: one row per option, the figures of `plan.json`."""
    columns = (
        "key", "name", "usable", "input_tokens", "output_tokens", "per_request", "per_month", "total_over_horizon",
        "one_off_total", "replicas", "utilisation", "break_even_rate", "payback_months",
    )  # fmt: skip
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow((*columns, "ttft_p95_ms", "e2e_p95_ms", "notes"))
    for option in file.options:
        latency = option.latency_ms
        times = (latency.ttft.p95, latency.e2e.p95) if latency else (None, None)
        writer.writerow((*(getattr(option, c) for c in columns), *times, "; ".join(option.notes)))
    return out.getvalue()
