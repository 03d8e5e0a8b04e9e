"""Prediction-powered inference: a score on rows that a teacher labelled, corrected by the rows that people judged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unshot.contracts.record import Record
from unshot.metrics.intervals import Interval, bounded, mean


class Corrected(Record):
    """The share of right answers by people's word, from `reviewed` of `rows` rows that all have the teacher's word."""

    rows: int
    reviewed: int
    # Share that the teacher's labels call right, of all rows.
    by_teacher: Interval
    # The same by people's word, of the reviewed rows alone.
    by_people: Interval
    corrected: Interval
    # Weight of the teacher's word: 1 where it is as good as people's, 0 where it says nothing.
    weight: float


def corrected(hits: int, rows: int, teacher: Sequence[bool], people: Sequence[bool]) -> Corrected:
    """The prediction-powered mean with its interval (Angelopoulos et al. 2023, Science 382, 669; the weight as in
    Angelopoulos, Duchi and Zrnic 2023, "PPI++", arXiv 2311.01453).

    The teacher's labels call `hits` of `rows` answers right. `teacher` and `people` say of the reviewed rows, which
    were drawn from all of them at random, whether the answer is right. The estimate is

        weight x mean of `teacher` over the rows not reviewed + mean of (`people` - weight x `teacher`),

    unbiased for any weight. Raises `ValueError` without two reviewed rows.
    """
    f, y = np.asarray(teacher, dtype=float), np.asarray(people, dtype=float)
    n, rest = len(y), rows - len(y)
    if n < 2:
        raise ValueError("two reviewed rows are needed")
    by_people = mean(y)
    by_teacher = mean(np.repeat([1.0, 0.0], [hits, rows - hits]))
    share = (hits - f.sum()) / rest if rest else 0.0
    spread = share * (1 - share)
    weight = 0.0
    if rest and spread > 0:
        both = float(np.cov(y, f, ddof=1)[0, 1])
        weight = float(np.clip(both / ((1 + n / rest) * spread), 0.0, 1.0))
    left = y - weight * f
    value = weight * share + float(left.mean())
    variance = float(left.var(ddof=1)) / n + (weight**2 * spread / rest if rest else 0.0)
    found = bounded(value, variance, n, method="prediction-powered")
    return Corrected(rows, n, by_teacher, by_people, found, weight)
