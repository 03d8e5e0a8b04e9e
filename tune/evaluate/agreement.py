"""How far two raters of the same items agree, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tune.data.agreement import cohen_kappa
from unshot.contracts.record import Record
from unshot.metrics.intervals import Interval, mean, percentile, resamples


class Agreement(Record):
    """Share of equal ratings, and Cohen's kappa; None if it is undefined."""

    items: int
    agreement: Interval
    kappa: Interval | None


def agree(first: Sequence[str], second: Sequence[str], *, seed: int = 0) -> Agreement:
    """Share of equal ratings and Cohen's kappa; kappa's interval is a percentile bootstrap over the items."""
    same = np.array([a == b for a, b in zip(first, second, strict=True)], dtype=float)
    kappa = None
    point = cohen_kappa(first, second)
    if not math.isnan(point):
        one, other = np.asarray(first, dtype=object), np.asarray(second, dtype=object)
        drawn = resamples(len(same), seed=seed)
        values = np.array([cohen_kappa(one[rows].tolist(), other[rows].tolist()) for rows in drawn])
        kappa = percentile(values[~np.isnan(values)], point, n=len(same))
    return Agreement(len(same), mean(same), kappa)
