"""Which of several candidates is the smallest that is good enough, with few rows spent on those that are not.

Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943) with the rule of this search: the smallest wins. All
candidates answer a few rows, the smallest quarter of what is left goes on to four times as many, and so forth. One is
out once it has lost more than all rows together may lose; larger ones that were passed over come back where all smaller
ones are out. So what is picked was always measured on all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
FACTOR = 4  # rows grow, and candidates shrink, by this from round to round
FIRST = 6  # rows of the first round at least: one wrong answer is no verdict


def rounds(rows: int) -> list[int]:
    """Rows of each round, the last being all of them."""
    found = [rows]
    while found[0] // FACTOR >= FIRST:
        found.insert(0, found[0] // FACTOR)
    return found


def race(
    candidates: Sequence[T],
    rows: int,
    limit: float,
    measure: Callable[[T, int], float | None],
    enough: Callable[[T], bool],
) -> None:
    """Measure candidates, given in the order of preference, until one is `enough` on all rows, or all are out.

    `measure(one, n)` is the mean loss on the first `n` rows, None where the candidate is out whatever its loss. A mean
    of `n` rows beyond `limit * rows / n` is more than all rows may lose, unless later rows win something back.
    """
    steps = rounds(rows)

    def stays(one: T, count: int) -> bool:
        loss = measure(one, count)
        return loss is not None and loss * count <= limit * rows + 1e-9

    waiting = [one for one in candidates if stays(one, steps[0])]
    if len(steps) == 1:
        return
    while waiting:
        group = waiting[: math.ceil(len(waiting) / FACTOR)]
        waiting = waiting[len(group) :]
        for count in steps[1:]:
            group = [one for one in group if stays(one, count)]
            kept = group[: math.ceil(len(group) / FACTOR)]
            waiting = group[len(kept) :] + waiting
            group = kept
        if any(enough(one) for one in group):
            return
