"""Charts as inline SVG for the self-contained reports: lines, bars, distributions, intervals, tornado.

Every function returns one `<figure>` as HTML text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from unshot.report import drawing
from unshot.report.drawing import COLOURS, WIDTH, Format, Mark, Series
from unshot.report.formats import dollars, milliseconds, number

__all__ = [
    "Bar", "Mark", "Series", "Span", "bars", "cdf", "dollars", "intervals", "line", "milliseconds", "number", "tornado",
]  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """A horizontal bar of stacked parts (name -> value), with an optional interval over its end."""

    label: str
    parts: Mapping[str, float]
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Span:
    """A value with its interval, for interval and tornado charts; `note` is drawn after the value.

    A bound that is None lies beyond the chart (or nowhere): the interval is drawn open, up to the chart's edge.
    """

    label: str
    value: float
    low: float | None
    high: float | None
    note: str = ""


def line(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    x_marks: Sequence[Mark] = (),
    y_marks: Sequence[Mark] = (),
    x_format: Format = number,
    y_format: Format = number,
    y_max: float | None = None,
    note: str = "",
    height: int = 270,
    labels_low: bool = False,
) -> str:
    """Lines over a shared axis, with vertical (`x_marks`) and horizontal (`y_marks`) reference lines.

    Points that are not finite (or not positive on a log axis) break the line. `y_max` cuts the axis. `labels_low`
    writes the labels of vertical marks at the bottom, for curves that are full at the top.
    """
    plot = drawing.Plot(
        x=drawing.axis_of(
            [v for s in series for v in s.x] + [m.value for m in x_marks], log_x, hug_data=True
        ),
        y=drawing.axis_of(
            [v for s in series for v in (*s.y, *(s.low or ()), *(s.high or ()))] + [m.value for m in y_marks],
            log_y,
            top=y_max,
        ),
        height=height,
        labels_low=labels_low,
    )
    plot.frame(x_label, y_label, x_format, y_format)
    for index, one in enumerate(series):
        plot.series(one, index, x_format, y_format)
    for mark in x_marks:
        plot.vertical(mark, [other.value for other in x_marks])
    for mark in y_marks:
        plot.horizontal(mark)
    names = [(s.name, i) for i, s in enumerate(series)]
    return drawing.figure(
        title, plot.svg(title), names, note, kind="line", muted={s.name for s in series if s.muted}
    )


def cdf(
    title: str,
    samples: Mapping[str, Sequence[float]],
    *,
    x_label: str,
    y_label: str = "share of requests",
    log_x: bool = False,
    x_marks: Sequence[Mark] = (),
    y_marks: Sequence[Mark] = (),
    x_format: Format = number,
    note: str = "",
) -> str:
    """Cumulative share of each sample, as steps thinned to at most 200 points."""
    series = []
    for name, values in samples.items():
        ordered = sorted(v for v in values if math.isfinite(v))
        if not ordered:
            continue
        count = len(ordered)
        picks = sorted({round(i * (count - 1) / 199) for i in range(200)}) if count > 200 else range(count)
        xs, ys, before = [], [], 0.0
        for i in picks:
            share = (i + 1) / count
            xs += [ordered[i], ordered[i]]
            ys += [before, share]
            before = share
        series.append(Series(name, xs, ys))
    return line(
        title,
        series,
        x_label=x_label,
        y_label=y_label,
        log_x=log_x,
        x_marks=x_marks,
        y_marks=y_marks,
        x_format=x_format,
        y_format=lambda v: f"{v:.0%}",
        y_max=1.0,
        note=note,
        labels_low=True,
    )


def bars(
    title: str,
    rows: Sequence[Bar],
    *,
    x_label: str,
    x_format: Format = number,
    marks: Sequence[Mark] = (),
    note: str = "",
) -> str:
    """Horizontal stacked bars from zero; the label stands above its bar, the total behind it."""
    parts = list(dict.fromkeys(name for row in rows for name in row.parts))
    totals = [sum(v for v in row.parts.values() if math.isfinite(v)) for row in rows]
    reach = [t for t in totals if math.isfinite(t)]
    reach += [row.high for row in rows if row.high is not None and math.isfinite(row.high)]
    reach += [m.value for m in marks if math.isfinite(m.value)]
    axis = drawing.axis_of([0.0, *reach], log=False, floor=0.0)
    step, top = 38, 10
    height = top + step * len(rows) + 34
    left, right = 8, WIDTH - 62
    body = [drawing.grid(axis, left, right, top, height - 34, x_format, x_label)]
    for index, (row, total) in enumerate(zip(rows, totals, strict=True)):
        y = top + step * index
        body.append(drawing.label(left, y + 12, row.label, "label"))
        start = 0.0
        for part_index, part in enumerate(parts):
            value = row.parts.get(part, 0.0)
            if not math.isfinite(value) or value <= 0:
                continue
            x0, x1 = axis.at(start, left, right), axis.at(start + value, left, right)
            body.append(
                f'<rect class="s{part_index % COLOURS + 1}" x="{x0:.1f}" y="{y + 17}" width="{max(x1 - x0, 0.6):.1f}" '
                f'height="13"><title>{escape(f"{row.label}: {part} {x_format(value)}")}</title></rect>'
            )
            start += value
        end = axis.at(start, left, right)
        if row.low is not None and row.high is not None:
            a, b = axis.at(row.low, left, right), axis.at(row.high, left, right)
            body.append(drawing.whisker(a, b, y + 23.5))
            end = max(end, b)
        body.append(drawing.label(end + 5, y + 28, x_format(total), "value"))
    for mark in marks:
        x = axis.at(mark.value, left, right)
        body.append(drawing.rule(x, top, x, height - 34))
        body.append(drawing.label(x + 3, top + 8, mark.label, "marklabel"))
    names = [(name, i) for i, name in enumerate(parts)] if len(parts) > 1 else []
    return drawing.figure(title, drawing.svg(title, height, body), names, note, kind="fill")


def intervals(
    title: str,
    rows: Sequence[Span],
    *,
    x_label: str,
    x_format: Format = number,
    log: bool = False,
    marks: Sequence[Mark] = (),
    note: str = "",
) -> str:
    """A dot with its interval per row (forest plot), with vertical reference lines."""
    values = [v for r in rows for v in (r.value, r.low, r.high) if v is not None] + [m.value for m in marks]
    axis = drawing.axis_of(values, log, hug_data=False)
    step, top = 36, 24 if marks else 10
    height = top + step * len(rows) + 34
    left, right = 12, WIDTH - 66
    body = [drawing.grid(axis, left, right, top, height - 34, x_format, x_label)]
    for index, row in enumerate(rows):
        y = top + step * index
        body.append(drawing.label(left - 4, y + 12, row.label, "label"))
        b = axis.at(row.value, left, right)
        a = left if row.low is None else axis.at(row.low, left, right)
        c = right if row.high is None else axis.at(row.high, left, right)
        body.append(drawing.whisker(a, c, y + 22, open_low=row.low is None, open_high=row.high is None))
        low, high = ("open" if v is None else x_format(v) for v in (row.low, row.high))
        tip = f"{row.label}: {x_format(row.value)} [{low}, {high}]"
        body.append(
            f'<circle class="s{index % COLOURS + 1}" cx="{b:.1f}" cy="{y + 22}" r="4.5"><title>'
            f"{escape(tip)}</title></circle>"
        )
        words = f"{x_format(row.value)}{row.note}"
        # Where the words do not fit behind the interval they stand before it; 6.3 units a letter.
        if min(c, right) + 6 + 6.3 * len(words) > WIDTH and a - 6 > 6.3 * len(words):
            body.append(drawing.label(a - 6, y + 26, words, "value end inside"))
        else:
            body.append(drawing.label(min(c, right) + 6, y + 26, words, "value"))
    body += drawing.top_marks(marks, axis, left, right, top, height)
    return drawing.figure(title, drawing.svg(title, height, body), [], note)


def tornado(
    title: str,
    rows: Sequence[Span],
    *,
    base: float,
    x_label: str,
    x_format: Format = number,
    log: bool = False,
    note: str = "",
) -> str:
    """What each assumption does to one result: a bar from its value at the assumption's low to that at its high.

    `Span.low` and `.high` are results (in either order), `.value` is not drawn; rows are drawn in the order given.
    """
    values = [v for r in rows for v in (r.low, r.high) if v is not None and math.isfinite(v)] + [base]
    axis = drawing.axis_of(values, log, hug_data=False)
    step, top = 38, 24
    height = top + step * len(rows) + 34
    left, right = 58, WIDTH - 58
    body = [drawing.grid(axis, left, right, top, height - 34, x_format, x_label)]
    for index, row in enumerate(rows):
        y = top + step * index
        body.append(drawing.label(8, y + 12, f"{row.label}{row.note}", "label"))
        zero = axis.at(base, left, right)
        for value, style in ((row.low, "s1"), (row.high, "s2")):
            assert value is not None, "a tornado's ends are results"
            end = axis.at(value, left, right)
            x0, x1 = sorted((zero, end))
            body.append(
                f'<rect class="{style}" x="{x0:.1f}" y="{y + 17}" width="{max(x1 - x0, 0.6):.1f}" height="12">'
                f"<title>{escape(f'{row.label}: {x_format(value)}')}</title></rect>"
            )
        low_end, high_end = sorted(v for v in (row.low, row.high) if v is not None)
        body.append(
            drawing.label(axis.at(low_end, left, right) - 4, y + 27, x_format(low_end), "value end inside")
        )
        body.append(
            drawing.label(axis.at(high_end, left, right) + 4, y + 27, x_format(high_end), "value inside")
        )
    body += drawing.top_marks([Mark(base, f"forecast {x_format(base)}")], axis, left, right, top, height)
    names = [("assumption at its low end", 0), ("at its high end", 1)]
    return drawing.figure(title, drawing.svg(title, height, body), names, note, kind="fill")
