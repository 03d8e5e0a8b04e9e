"""Like hours with like: which of the first requests a live window is compared with.

By day and by night people ask for other things, so that a window of one hour always differs from a whole day. With a
season the first whole day (or week) is kept as the reference, and a window is compared with requests of the same hours
of it, in the same proportions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from unshot.contracts.request_log import Request

Season = Literal["none", "day", "week"]
HOUR = 3600.0
LENGTHS: dict[Season, float] = {"day": 24 * HOUR, "week": 7 * 24 * HOUR}
# Requests of the reference kept of each hour: more would cost time and tell no more.
PER_HOUR = 60
# Hours that count as like each other, the narrowest that give enough requests; each divides a day.
WIDTHS = (1, 2, 3, 4, 6)
# The reference is at most so many times the window, and at least this share of the window must have its like.
MOST, COVERED = 5, 0.8


@dataclass(frozen=True)
class First:
    """The requests at the start of a log that others are compared with: their rows, and how many rows they span."""

    rows: list[int]
    span: int


def first(lines: Sequence[Request], rows: Sequence[int], settle: int, season: Season) -> First:
    """The first `settle` of the given rows, or their first whole season, at most `PER_HOUR` of each hour of it."""
    if season == "none" or not rows:
        return First(list(rows[:settle]), min(settle, len(rows)))
    length = LENGTHS[season]
    begin = lines[rows[0]].time
    span = next((i for i, row in enumerate(rows) if lines[row].time >= begin + length), len(rows))
    seen: Counter[int] = Counter()
    kept = []
    for row in rows[:span]:
        hour = _bin(lines[row].time, length, 1)
        if seen[hour] < PER_HOUR:
            kept.append(row)
        seen[hour] += 1
    return First(kept, max(span, settle))


def alike(
    lines: Sequence[Request], reference: Sequence[int], live: Sequence[int], season: Season
) -> tuple[list[int], list[int]]:
    """The rows of both sides that may be compared: the same hours in the same proportions.

    Empty lists where the reference has too little of the window's hours.
    """
    if season == "none":
        return list(reference), list(live)
    length = LENGTHS[season]
    best: tuple[list[int], list[int]] = ([], [])
    for width in WIDTHS:
        bins: dict[int, list[int]] = {}
        for row in reference:
            bins.setdefault(_bin(lines[row].time, length, width), []).append(row)
        own = [row for row in live if _bin(lines[row].time, length, width) in bins]
        if len(own) < COVERED * len(live):
            continue
        want = Counter(_bin(lines[row].time, length, width) for row in own)
        times = min(MOST, *(len(bins[hour]) / count for hour, count in want.items()))
        chosen = []
        for hour, count in want.items():
            held = bins[hour]
            # Spread over the bin, whose first requests may lie in one of its hours.
            picked = np.linspace(0, len(held) - 1, int(times * count)).round().astype(int)
            chosen += [held[i] for i in np.unique(picked)]
        if len(chosen) > len(best[0]):
            best = (sorted(chosen), own)
        if len(chosen) >= len(own):
            break
    return best


def _bin(time: float, length: float, width: int) -> int:
    """Which stretch of `width` hours of its day (or week, UTC) a moment lies in."""
    return int((time % length) // (width * HOUR))
