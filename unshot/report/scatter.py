"""A scatter chart for trade-offs: labelled points, their intervals, and the line through the best of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from unshot.report import drawing
from unshot.report.drawing import LEFT, RIGHT, TOP, WIDTH, Format, Mark
from unshot.report.formats import number

CHARACTER = 6.3  # mean width of a label's character, units of the drawing


@dataclass(frozen=True)
class Dot:
    """One point; `low` and `high` are the interval of `y`, `front` puts it on the line, `strong` sets it off."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    front: bool = False
    strong: bool = False


def scatter(
    title: str,
    dots: Sequence[Dot],
    *,
    x_label: str,
    y_label: str,
    x_format: Format = number,
    y_format: Format = number,
    log_x: bool = False,
    y_marks: Sequence[Mark] = (),
    from_zero: bool = False,
    note: str = "",
    height: int = 300,
) -> str:
    """Points with labels beside them; those with `front` are joined in the order of `x`."""
    values = [v for d in dots for v in (d.y, d.low, d.high) if v is not None and math.isfinite(v)]
    values += [m.value for m in y_marks]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = 0.08 * (high - low or 1.0)
    reach = [0.0, high] if from_zero else [low - room if low > room or low < 0 else low, high + room]
    wide = [d.x for d in dots]
    spare = 0.06 * (max(wide) - min(wide) if wide else 1.0)
    across = wide if log_x or not wide else [max(min(wide) - spare, 0.0), max(wide) + 2 * spare]
    plot = drawing.Plot(
        x=drawing.axis_of(across, log_x, hug_data=not log_x),
        y=drawing.axis_of(reach, False, hug_data=not from_zero),
        height=height,
    )
    plot.frame(x_label, y_label, x_format, y_format)
    front = sorted((d for d in dots if d.front), key=lambda d: d.x)
    if len(front) > 1:
        line = "L".join("{:.1f} {:.1f}".format(*plot.point(d.x, d.y)) for d in front)
        plot.body.append(f'<path class="line muted s1" d="M{line}" stroke-dasharray="2 3"/>')
    for mark in y_marks:
        plot.horizontal(mark)
    places = [plot.point(d.x, d.y) for d in dots]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    for mark in y_marks:  # its line, and its label above it on the left
        line_y = plot.point(0.0, mark.value)[1]
        taken.append((LEFT, line_y - 15, LEFT + 4 + len(mark.label) * CHARACTER, line_y))
    for dot, (x, _) in zip(dots, places, strict=True):
        if dot.low is not None and dot.high is not None:
            a, b = plot.point(dot.x, dot.low)[1], plot.point(dot.x, dot.high)[1]
            plot.body.append(
                f'<path class="whisker" d="M{x:.1f} {a:.1f}V{b:.1f}M{x - 3:.1f} {a:.1f}h6M{x - 3:.1f} {b:.1f}h6"/>'
            )
    for dot, (x, y) in zip(dots, places, strict=True):
        tip = escape(f"{dot.label}: {x_format(dot.x)}, {y_format(dot.y)}")
        colour = 3 if dot.strong else 1 if dot.front else 8
        plot.body.append(
            f'<circle class="s{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{6 if dot.strong else 4}">'
            f"<title>{tip}</title></circle>"
        )
        left, base = _place(x, y, len(dot.label) * CHARACTER, taken, plot.bottom)
        plot.body.append(drawing.label(left, base, dot.label, "marklabel" if dot.strong else "value inside"))
    return drawing.figure(title, plot.svg(title), [], note)


def _place(
    x: float, y: float, width: float, taken: list[tuple[float, float, float, float]], bottom: float
) -> tuple[float, float]:
    """Where a label starts: the first place round its point that covers no other label or point."""
    best, least = (x + 8, y - 6), math.inf
    for far in (0, 12, 24, 36):
        for left, base in (
            (x + 8, y + 4 - far),
            (x + 8, y + 4 + far),
            (x - width - 8, y + 4 - far),
            (x - width - 8, y + 4 + far),
            (x - width / 2, y - 9 - far),
            (x - width / 2, y + 17 + far),
        ):
            box = (left, base - 10, left + width, base + 2)
            inside = (
                left >= LEFT + 2 and box[2] <= WIDTH - RIGHT + 12 and box[1] >= TOP - 8 and box[3] <= bottom
            )
            cover = sum(_overlap(box, other) for other in taken) + (0 if inside else 1e6)
            if cover < least:
                best, least = (left, base), cover
            if not cover:
                break
        if not least:
            break
    taken.append((best[0], best[1] - 10, best[0] + width, best[1] + 2))
    return best


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Area that two boxes share."""
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return across * down if across > 0 and down > 0 else 0.0
