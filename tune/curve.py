"""Learning curve: what more rows would buy, from the same training on smaller parts of the rows.

The error falls as a power of the rows, `error(n) = a * n^-b` (Figueroa et al. 2012, "Predicting sample size required
for classification performance", BMC Med Inform Decis Mak 12:8; Hestness et al. 2017, arXiv 1712.00409), fitted on
logarithms, each point weighted by its sampling error. The interval comes from drawing the validation rows again; the
luck of a training run is not in it, and four points cannot show a floor under the error. It is a hint, not a promise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unshot.contracts.task import Task
from unshot.metrics.registry import metric as find_metric
from unshot.metrics.scores import value_of_rows

FRACTIONS = (0.125, 0.25, 0.5)
MINIMUM = 16  # training rows of the smallest part
STEP = 0.01  # "the next point" of the metric
DRAWS = 500
BEYOND = 1000  # times the rows at hand: farther than that nothing is said


@dataclass(frozen=True)
class Point:
    """A training on `rows` rows and its labels for the validation rows."""

    rows: int
    guesses: list[str]


def parts(rows: int) -> list[int]:
    """Row counts of the smaller trainings; fewer where the data is small."""
    return [n for n in (math.ceil(rows * f) for f in FRACTIONS) if n >= MINIMUM]


def fit(rows: np.ndarray, errors: np.ndarray, count: int) -> tuple[float, float]:
    """`(a, b)` of `a * rows^-b` by least squares on logarithms.

    The variance of a share's logarithm is about `(1 - e) / (e * count)`. Errors of 0 are taken as half a row.
    """
    errors = np.clip(errors, 0.5 / count, 1 - 0.5 / count)
    weights = np.sqrt(errors * count / (1 - errors))
    slope, intercept = np.polyfit(np.log(rows), np.log(errors), 1, w=weights)
    return float(np.exp(intercept)), float(-slope)


def rows_for(a: float, b: float, error: float) -> float:
    """Rows at which the curve falls to `error`; infinite where it does not fall."""
    if b <= 0 or error <= 0:
        return math.inf
    exponent = math.log(a / error) / b
    return math.exp(exponent) if exponent < 60 else math.inf


def learning_curve(
    task: Task,
    truth: Sequence[str],
    points: Sequence[Point],
    *,
    requests: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit the points (the last is the whole training set) and say what the next point of the metric would cost.

    `more_rows` and its interval `low`, `high` count rows beyond those at hand; None means farther than `BEYOND`
    times the rows, or that the curve does not fall at all.
    """
    blank = task.answers(truth, truth, requests=requests)
    tables = [find_metric(task.metric).of(blank.with_answers(p.guesses)) for p in points]
    classes = len(blank.classes)
    counts = np.array([p.rows for p in points], dtype=float)

    def errors(chosen: np.ndarray) -> np.ndarray:
        return np.array([1 - value_of_rows(task.metric, table[chosen], classes) for table in tables])

    def further(chosen: np.ndarray) -> tuple[float, float]:
        a, b = fit(counts, errors(chosen), len(chosen))
        return rows_for(a, b, a * counts[-1] ** -b - STEP) - counts[-1], b

    everything = np.arange(len(blank))
    a, b = fit(counts, errors(everything), len(blank))
    more, _ = further(everything)
    random = np.random.default_rng(seed)
    drawn = np.array([further(random.integers(0, len(blank), len(blank))) for _ in range(DRAWS)])
    low, high = np.quantile(drawn[:, 0], [0.025, 0.975], method="nearest")
    slopes = np.quantile(drawn[:, 1], [0.025, 0.975])
    observed = errors(everything)
    fitted = a * counts**-b
    limit = BEYOND * counts[-1]
    at = float(fitted[-1])
    return {
        "formula": "error = a x rows^-b",
        "source": "Figueroa et al. 2012; Hestness et al. 2017",
        "metric": task.metric,
        "validation_rows": len(blank),
        "points": [
            {"rows": int(n), "score": 1 - float(e), "fitted": 1 - float(f)}
            for n, e, f in zip(counts, observed, fitted, strict=True)
        ],
        "a": a,
        "b": b,
        "b_low": float(slopes[0]),
        "b_high": float(slopes[1]),
        "step": STEP,
        "more_rows": _within(more, limit),
        "low": _within(float(low), limit),
        "high": _within(float(high), limit),
        "near_perfect": at <= STEP,
    }


def _within(value: float, limit: float) -> int | None:
    return math.ceil(value) if value < limit else None


def sentence(curve: dict[str, Any], cost: float | None = None) -> str:
    """What the curve says, for a person; `cost` is the price of a labelled row, dollars."""
    metric, have = curve["metric"], curve["points"][-1]["rows"]
    if curve["near_perfect"]:
        return (
            f"learning curve: {metric} is within a point of perfect on {have} rows; more rows can buy nothing"
        )
    noise = f"95% interval from {curve['validation_rows']} validation rows"
    if curve["more_rows"] is None:
        return (
            f"learning curve: no sign that more rows would raise {metric} (exponent {curve['b']:.2f}, {noise} "
            f"{curve['b_low']:.2f} to {curve['b_high']:.2f}); better labels or a larger model may"
        )
    high = "no bound" if curve["high"] is None else f"{curve['high']:,}"
    low = "no bound" if curve["low"] is None else f"{curve['low']:,}"
    price = f", some ${curve['more_rows'] * cost:,.0f}" if cost else ""
    return (
        f"learning curve: one more point of {metric} would likely cost {curve['more_rows']:,} rows beyond the {have} "
        f"({low} to {high}, {noise}; the luck of single runs comes on top){price}"
    )
