"""What charts are drawn with: scales, axes, marks, text and the figure round an SVG.

Colours, fonts and the dark theme come from `unshot.report.page`, so nothing here carries a style of its own. The
drawing is 440 units wide: readable at 360 CSS pixels and at 560.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

# Labels of reference lines that are closer than this would run into each other.
LABEL_GAP = 90.0
WIDTH = 440
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 14, 44
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
class Axis:
    """A scale from `low` to `high` with its ticks."""

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


def axis_of(
    values: Sequence[float],
    log: bool,
    *,
    hug_data: bool = False,
    top: float | None = None,
    floor: float | None = None,
) -> Axis:
    """A scale round the finite values; from zero where linear and all are positive, unless `hug_data`."""
    good = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not good:
        good = [1.0, 10.0] if log else [0.0, 1.0]
    low, high = min(good), max(good)
    if top is not None:
        high = top
    if log:
        if low >= high:
            low, high = low / 2, high * 2
        if not hug_data:
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
        return Axis(low, high, True, tuple(ticks))
    if floor is not None:
        low = floor
    elif not hug_data and low > 0:
        low = 0.0
    if low >= high:
        low, high = (low - abs(low) * 0.5, high + abs(high) * 0.5) if low else (0.0, 1.0)
    step = _nice((high - low) / 4)
    if not hug_data and top is None:
        high = math.ceil(high / step - 1e-9) * step
        low = math.floor(low / step + 1e-9) * step
    start = math.ceil(low / step - 1e-9)
    count = math.floor((high - low) / step + 1e-6) + 1
    ticks = [(start + i) * step for i in range(count + 1)]
    return Axis(low, high, False, tuple(t for t in ticks if t <= high + step * 1e-6))


def _nice(step: float) -> float:
    base = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(base * m for m in (1, 2, 2.5, 5, 10) if step <= base * m * 1.0001)


@dataclass
class Plot:
    """A drawing with two axes, filled from back to front: frame, series, marks."""

    x: Axis
    y: Axis
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
            self.body.append(label(LEFT - 6, y + 4, y_format(tick), "tick end"))
        for tick in self.x.ticks:
            x = self.x.at(tick, LEFT, WIDTH - RIGHT)
            self.body.append(f'<path class="grid" d="M{x:.1f} {TOP}V{self.bottom}"/>')
            self.body.append(label(x, self.bottom + 16, x_format(tick), "tick middle"))
        self.body.append(f'<path class="axis" d="M{LEFT} {TOP}V{self.bottom}H{WIDTH - RIGHT}"/>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        self.body.append(label(middle, self.height - 8, x_label, "axislabel middle"))
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
        self.body.append(rule(x, TOP, x, self.bottom))
        side = "end" if x > WIDTH * 0.72 or (crowded and x > LEFT + 105) else ""
        # Labels of neighbouring marks stand below each other.
        y = self.bottom - 8 - 14 * self._labels if self.labels_low else TOP + 11 + 14 * self._labels
        self._labels += 1
        self.body.append(label(x + (-4 if side else 4), y, mark.label, f"marklabel {side}"))

    def horizontal(self, mark: Mark) -> None:
        y = self.y.at(mark.value, self.bottom, TOP)
        self.body.append(rule(LEFT, y, WIDTH - RIGHT, y))
        above = y - 4 if y > TOP + 16 else y + 13
        self.body.append(label(LEFT + 4, above, mark.label, "marklabel"))

    def svg(self, title: str) -> str:
        return svg(title, self.height, self.body)


def grid(
    axis: Axis, left: float, right: float, top: float, bottom: float, x_format: Format, name: str
) -> str:
    """Vertical lines at the ticks of a horizontal axis, with their figures and its name below."""
    parts = []
    for tick in axis.ticks:
        x = axis.at(tick, left, right)
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>')
        anchor = "middle" if x > left + 14 else ""
        parts.append(label(x, bottom + 14, x_format(tick), f"tick {anchor}"))
    parts.append(label((left + right) / 2, bottom + 29, name, "axislabel middle"))
    return "".join(parts)


def top_marks(
    marks: Sequence[Mark], axis: Axis, left: float, right: float, top: float, height: int
) -> list[str]:
    """Vertical reference lines with their labels above the drawing; two that are close keep out of each other's way."""
    body = []
    places = sorted(((axis.at(m.value, left, right), m) for m in marks), key=lambda place: place[0])
    for n, (x, mark) in enumerate(places):
        body.append(rule(x, top - 6, x, height - 34))
        anchor = "end" if x > WIDTH * 0.75 else "" if x < WIDTH * 0.25 else "middle"
        if n + 1 < len(places) and places[n + 1][0] - x < LABEL_GAP:
            anchor = "end"
        elif n and x - places[n - 1][0] < LABEL_GAP:
            anchor = ""
        body.append(label(x, top - 10, mark.label, f"marklabel {anchor}"))
    return body


def whisker(a: float, b: float, y: float, *, open_low: bool = False, open_high: bool = False) -> str:
    """A horizontal interval with its ends; an open end is an arrow: the interval goes on beyond it."""
    low = f"M{a + 6:.1f} {y - 4}L{a:.1f} {y}L{a + 6:.1f} {y + 4}" if open_low else f"M{a:.1f} {y - 4}v8"
    high = f"M{b - 6:.1f} {y - 4}L{b:.1f} {y}L{b - 6:.1f} {y + 4}" if open_high else f"M{b:.1f} {y - 4}v8"
    return f'<path class="whisker" fill="none" d="M{a:.1f} {y}H{b:.1f}{low}{high}"/>'


def rule(x0: float, y0: float, x1: float, y1: float) -> str:
    """A reference line."""
    return f'<path class="mark" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>'


def label(x: float, y: float, text: str, style: str) -> str:
    """Text with its baseline at `y`."""
    return f'<text class="{style.strip()}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def svg(title: str, height: int, body: Sequence[str]) -> str:
    """The drawing round its parts."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
    )


def figure(
    title: str,
    svg: str,
    names: Sequence[tuple[str, int]],
    note: str,
    *,
    kind: str = "",
    muted: set[str] | None = None,
) -> str:
    """A chart with title, legend (`names` with their place in the order of colours), drawing and a note below."""
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
