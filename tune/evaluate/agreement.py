"""How far two raters of the same items agree, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tune.data.agreement import cohen_kappa
from tune.evaluate.scores import draws, interval, mean_interval
from unshot.metrics.scores import Interval


def agree(first: Sequence[str], second: Sequence[str], *, seed: int = 0) -> dict[str, Any]:
    """Share of equal ratings and Cohen's kappa, both with bootstrap intervals; kappa None where it is undefined."""
    same = np.array([a == b for a, b in zip(first, second, strict=True)], dtype=float)
    chosen = draws([""] * len(same), seed=seed)
    result: dict[str, Any] = {"items": len(same), "agreement": mean_interval(same, chosen), "kappa": None}
    one, other = np.asarray(first, dtype=object), np.asarray(second, dtype=object)
    point = cohen_kappa(first, second)
    if not math.isnan(point):
        values = np.array([cohen_kappa(one[rows].tolist(), other[rows].tolist()) for rows in chosen])
        values = values[~np.isnan(values)]
        result["kappa"] = interval(values, point)
    return result


def wilson(hits: int, total: int, z: float = 1.959964) -> Interval:
    """95% Wilson score interval of a share (Wilson 1927): sound for few rows and near 0 or 1; `total` at least 1."""
    share = hits / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))
