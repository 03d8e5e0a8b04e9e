"""Charts as inline SVG for the self-contained reports: lines, bars, distributions, intervals, tornado.

Every function returns one `<figure>` as HTML text. Colours, fonts and the dark theme come from `unshot.page`, so a
chart carries no style of its own. The drawing is 440 units wide: readable at 360 CSS pixels and at 560.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH = 440
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 44
DASHES = ("", "7 4", "2 3", "9 3 2 3", "12 5", "4 2 1 2", "1 4", "14 3")
COLOURS = 8

Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One line: `x` and `y` of one length; `low`/`high` draw a band round it; `points` marks each value.

    Where it is not `joined` only the points are drawn.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    points: bool = False
    muted: bool = False
    joined: bool = True


@dataclass(frozen=True)
class Mark:
    """A reference line with its label, e.g. an SLO or the break-even."""

    value: float
    label: str


@dataclass(frozen=True)
class Bar:
    """A horizontal bar of stacked parts (name -> value), with an optional interval over its end."""

    label: str
    parts: Mapping[str, float]
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Span:
    """A value with its interval, for interval and tornado charts; `note` is drawn after the value."""

    label: str
    value: float
    low: float
    high: float
    note: str = ""


def number(value: float) -> str:
    """A short number for an axis or a label: 1,234 · 12.3 · 0.0042 · 1.2e-06 · 3.4M."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    size = abs(value)
    if size >= 1e9:
        return f"{value / 1e9:.3g}B"
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size >= 100:
        return f"{value:,.0f}"
    if size == 0:
        return "0"
    if size < 1e-4:
        return f"{value:.1e}"
    return f"{value:.3g}"


def dollars(value: float) -> str:
    """`number` with a dollar sign."""
    if not math.isfinite(value):
        return number(value)
    size = abs(value)
    text = f"{size:.2f}" if 1 <= size < 100 and round(size, 2) != round(size) else number(size)
    return f"{'-' if value < 0 else ''}${text}"


def milliseconds(value: float) -> str:
    """A time given in milliseconds: 0.42 ms · 38 ms · 1.2 s."""
    return f"{number(value / 1000)} s" if abs(value) >= 1000 else f"{number(value)} ms"


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
    plot = _Plot(
        x=_axis([v for s in series for v in s.x] + [m.value for m in x_marks], log_x, tight=True),
        y=_axis(
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
    return _figure(
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
    axis = _axis([0.0, *reach], log=False, floor=0.0)
    step, top = 38, 10
    height = top + step * len(rows) + 34
    left, right = 8, WIDTH - 62
    body = [_grid(axis, left, right, top, height - 34, x_format, x_label)]
    for index, (row, total) in enumerate(zip(rows, totals, strict=True)):
        y = top + step * index
        body.append(_text(left, y + 12, row.label, "label"))
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
            body.append(_whisker(a, b, y + 23.5))
            end = max(end, b)
        body.append(_text(end + 5, y + 28, x_format(total), "value"))
    for mark in marks:
        x = axis.at(mark.value, left, right)
        body.append(_rule(x, top, x, height - 34))
        body.append(_text(x + 3, top + 8, mark.label, "marklabel"))
    names = [(name, i) for i, name in enumerate(parts)] if len(parts) > 1 else []
    return _figure(title, _svg(title, height, body), names, note, kind="fill")


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
    values = [v for r in rows for v in (r.value, r.low, r.high)] + [m.value for m in marks]
    axis = _axis(values, log, tight=False)
    step, top = 36, 24 if marks else 10
    height = top + step * len(rows) + 34
    left, right = 12, WIDTH - 66
    body = [_grid(axis, left, right, top, height - 34, x_format, x_label)]
    for index, row in enumerate(rows):
        y = top + step * index
        body.append(_text(left - 4, y + 12, row.label, "label"))
        a, b, c = (axis.at(v, left, right) for v in (row.low, row.value, row.high))
        body.append(_whisker(a, c, y + 22))
        tip = f"{row.label}: {x_format(row.value)} [{x_format(row.low)}, {x_format(row.high)}]"
        body.append(
            f'<circle class="s{index % COLOURS + 1}" cx="{b:.1f}" cy="{y + 22}" r="4.5"><title>'
            f"{escape(tip)}</title></circle>"
        )
        words = f"{x_format(row.value)}{row.note}"
        # Where the words do not fit behind the interval they stand before it; 6.3 units a letter.
        if min(c, right) + 6 + 6.3 * len(words) > WIDTH and a - 6 > 6.3 * len(words):
            body.append(_text(a - 6, y + 26, words, "value end inside"))
        else:
            body.append(_text(min(c, right) + 6, y + 26, words, "value"))
    body += _top_marks(marks, axis, left, right, top, height)
    return _figure(title, _svg(title, height, body), [], note)


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
    values = [v for r in rows for v in (r.low, r.high) if math.isfinite(v)] + [base]
    axis = _axis(values, log, tight=False)
    step, top = 38, 24
    height = top + step * len(rows) + 34
    left, right = 58, WIDTH - 58
    body = [_grid(axis, left, right, top, height - 34, x_format, x_label)]
    for index, row in enumerate(rows):
        y = top + step * index
        body.append(_text(8, y + 12, f"{row.label}{row.note}", "label"))
        zero = axis.at(base, left, right)
        for value, style in ((row.low, "s1"), (row.high, "s2")):
            end = axis.at(value, left, right)
            x0, x1 = sorted((zero, end))
            body.append(
                f'<rect class="{style}" x="{x0:.1f}" y="{y + 17}" width="{max(x1 - x0, 0.6):.1f}" height="12">'
                f"<title>{escape(f'{row.label}: {x_format(value)}')}</title></rect>"
            )
        low_end, high_end = sorted((row.low, row.high))
        body.append(_text(axis.at(low_end, left, right) - 4, y + 27, x_format(low_end), "value end inside"))
        body.append(_text(axis.at(high_end, left, right) + 4, y + 27, x_format(high_end), "value inside"))
    body += _top_marks([Mark(base, f"forecast {x_format(base)}")], axis, left, right, top, height)
    names = [("assumption at its low end", 0), ("at its high end", 1)]
    return _figure(title, _svg(title, height, body), names, note, kind="fill")


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def at(self, value: float, start: float, end: float) -> float:
        """Where `value` stands between pixels `start` and `end`, held inside them."""
        if self.log:
            if value <= 0:
                return start
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return start + (end - start) * min(max(share, 0.0), 1.0)


def _axis(
    values: Sequence[float],
    log: bool,
    *,
    tight: bool = False,
    top: float | None = None,
    floor: float | None = None,
) -> _Axis:
    """A scale round the finite values; from zero where linear and all are positive, unless `tight`."""
    good = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not good:
        good = [1.0, 10.0] if log else [0.0, 1.0]
    low, high = min(good), max(good)
    if top is not None:
        high = top
    if log:
        if low >= high:
            low, high = low / 2, high * 2
        if not tight:
            low, high = low * 0.85, high * 1.15
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        steps = (1,) if last - first > 4 else (1, 3) if last - first > 2 else (1, 2, 5)
        ticks = [m * 10.0**e for e in range(first, last + 1) for m in steps]
        ticks = [t for t in ticks if low * 0.999 <= t <= high * 1.001]
        while len(ticks) > 7:
            ticks = ticks[::2]
        if len(ticks) < 2:  # less than a decade's fraction: as on a linear axis
            step = _nice((high - low) / 4)
            ticks = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
        return _Axis(low, high, True, tuple(ticks))
    if floor is not None:
        low = floor
    elif not tight and low > 0:
        low = 0.0
    if low >= high:
        low, high = (low - abs(low) * 0.5, high + abs(high) * 0.5) if low else (0.0, 1.0)
    step = _nice((high - low) / 4)
    if not tight and top is None:
        high = math.ceil(high / step - 1e-9) * step
        low = math.floor(low / step + 1e-9) * step
    start = math.ceil(low / step - 1e-9)
    count = math.floor((high - low) / step + 1e-6) + 1
    ticks = [(start + i) * step for i in range(count + 1)]
    return _Axis(low, high, False, tuple(t for t in ticks if t <= high + step * 1e-6))


def _nice(step: float) -> float:
    base = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(base * m for m in (1, 2, 2.5, 5, 10) if step <= base * m * 1.0001)


@dataclass
class _Plot:
    x: _Axis
    y: _Axis
    height: int
    labels_low: bool = False
    body: list[str] = field(default_factory=list)
    _labels: int = 0

    @property
    def bottom(self) -> int:
        return self.height - BOTTOM

    def point(self, x: float, y: float) -> tuple[float, float]:
        return self.x.at(x, LEFT, WIDTH - RIGHT), self.y.at(y, self.bottom, TOP)

    def frame(self, x_label: str, y_label: str, x_format: Format, y_format: Format) -> None:
        for tick in self.y.ticks:
            y = self.y.at(tick, self.bottom, TOP)
            self.body.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            self.body.append(_text(LEFT - 6, y + 4, y_format(tick), "tick end"))
        for tick in self.x.ticks:
            x = self.x.at(tick, LEFT, WIDTH - RIGHT)
            self.body.append(f'<path class="grid" d="M{x:.1f} {TOP}V{self.bottom}"/>')
            self.body.append(_text(x, self.bottom + 16, x_format(tick), "tick middle"))
        self.body.append(f'<path class="axis" d="M{LEFT} {TOP}V{self.bottom}H{WIDTH - RIGHT}"/>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        self.body.append(_text(middle, self.height - 8, x_label, "axislabel middle"))
        y = (TOP + self.bottom) / 2
        self.body.append(
            f'<text class="axislabel middle" transform="translate(13 {y:.0f}) rotate(-90)">{escape(y_label)}</text>'
        )

    def series(self, one: Series, index: int, x_format: Format, y_format: Format) -> None:
        colour = index % COLOURS + 1
        if one.low is not None and one.high is not None:
            edge = [self.point(x, y) for x, y in zip(one.x, one.high, strict=True) if self._drawable(x, y)]
            back = [self.point(x, y) for x, y in zip(one.x, one.low, strict=True) if self._drawable(x, y)]
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in [*edge, *reversed(back)])
            if path:
                self.body.append(f'<path class="band s{colour}" d="M{path}Z"/>')
        pieces, pen = [], False
        for x, y in zip(one.x, one.y, strict=True):
            if not self._drawable(x, y):
                pen = False
                continue
            px, py = self.point(x, y)
            pieces.append(f"{'L' if pen else 'M'}{px:.1f} {py:.1f}")
            pen = True
        dash = f' stroke-dasharray="{DASHES[index % len(DASHES)]}"' if DASHES[index % len(DASHES)] else ""
        style = f"line s{colour}{' muted' if one.muted else ''}"
        if pieces and one.joined:
            self.body.append(
                f'<path class="{style}" d="{"".join(pieces)}"{dash}><title>{escape(one.name)}</title></path>'
            )
        if one.points:
            for x, y in zip(one.x, one.y, strict=True):
                if self._drawable(x, y):
                    px, py = self.point(x, y)
                    tip = escape(f"{one.name}: {x_format(x)}, {y_format(y)}")
                    self.body.append(
                        f'<circle class="s{colour}" cx="{px:.1f}" cy="{py:.1f}" r="3"><title>{tip}</title></circle>'
                    )

    def _drawable(self, x: float, y: float) -> bool:
        inside = math.isfinite(x) and math.isfinite(y) and y <= self.y.high * (1 + 1e-9)
        return inside and (x > 0 or not self.x.log) and (y > 0 or not self.y.log)

    def vertical(self, mark: Mark, others: Sequence[float] = ()) -> None:
        x = self.x.at(mark.value, LEFT, WIDTH - RIGHT)
        crowded = any(0 < self.x.at(o, LEFT, WIDTH - RIGHT) - x < 110 for o in others)
        self.body.append(_rule(x, TOP, x, self.bottom))
        side = "end" if x > WIDTH * 0.72 or (crowded and x > LEFT + 105) else ""
        # Labels of neighbouring marks stand below each other.
        y = self.bottom - 8 - 14 * self._labels if self.labels_low else TOP + 11 + 14 * self._labels
        self._labels += 1
        self.body.append(_text(x + (-4 if side else 4), y, mark.label, f"marklabel {side}"))

    def horizontal(self, mark: Mark) -> None:
        y = self.y.at(mark.value, self.bottom, TOP)
        self.body.append(_rule(LEFT, y, WIDTH - RIGHT, y))
        above = y - 4 if y > TOP + 16 else y + 13
        self.body.append(_text(LEFT + 4, above, mark.label, "marklabel"))

    def svg(self, title: str) -> str:
        return _svg(title, self.height, self.body)


def _grid(
    axis: _Axis, left: float, right: float, top: float, bottom: float, x_format: Format, label: str
) -> str:
    parts = []
    for tick in axis.ticks:
        x = axis.at(tick, left, right)
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>')
        anchor = "middle" if x > left + 14 else ""
        parts.append(_text(x, bottom + 14, x_format(tick), f"tick {anchor}"))
    parts.append(_text((left + right) / 2, bottom + 29, label, "axislabel middle"))
    return "".join(parts)


def _top_marks(
    marks: Sequence[Mark], axis: _Axis, left: float, right: float, top: float, height: int
) -> list[str]:
    body = []
    for mark in marks:
        x = axis.at(mark.value, left, right)
        body.append(_rule(x, top - 6, x, height - 34))
        anchor = "end" if x > WIDTH * 0.75 else "" if x < WIDTH * 0.25 else "middle"
        body.append(_text(x, top - 10, mark.label, f"marklabel {anchor}"))
    return body


def _whisker(a: float, b: float, y: float) -> str:
    return f'<path class="whisker" d="M{a:.1f} {y}H{b:.1f}M{a:.1f} {y - 4}v8M{b:.1f} {y - 4}v8"/>'


def _rule(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<path class="mark" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>'


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style.strip()}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _svg(title: str, height: int, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
    )


def _figure(
    title: str,
    svg: str,
    names: Sequence[tuple[str, int]],
    note: str,
    *,
    kind: str = "",
    muted: set[str] | None = None,
) -> str:
    legend = ""
    if names:
        items = []
        for name, index in names:
            dash = DASHES[index % len(DASHES)]
            if kind == "line":
                style = f"line s{index % COLOURS + 1}{' muted' if muted and name in muted else ''}"
                stroke = f' stroke-dasharray="{dash}"' if dash else ""
                swatch = f'<svg viewBox="0 0 26 10"><path class="{style}" d="M0 5H26"{stroke}/></svg>'
            else:
                swatch = (
                    f'<svg viewBox="0 0 26 10"><rect class="s{index % COLOURS + 1}" x="8" width="10" height="10"/>'
                    "</svg>"
                )
            items.append(f"<li>{swatch}{escape(name)}</li>")
        legend = f'<ul class="legend">{"".join(items)}</ul>'
    below = f'<p class="small">{escape(note)}</p>' if note else ""
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{legend}{svg}{below}</figure>'
