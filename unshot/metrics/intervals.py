"""Intervals for ratios of means, percentiles and paired differences. numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from unshot.metrics.scores import Interval

EXACT_RANKS = 20_000
MET, NOT_MET, INCONCLUSIVE = "met", "not met", "inconclusive"


def t_quantile(p: float, df: float) -> float:
    """Quantile of Student's t, by Newton steps from Hill's start (Algorithm 396, CACM 13, 1970)."""
    if df <= 0:
        raise ValueError("degrees of freedom must be positive")
    if p == 0.5:
        return 0.0
    if p < 0.5:
        return -t_quantile(1 - p, df)
    if df == 1:
        return math.tan(math.pi * (p - 0.5))
    if df == 2:
        return (2 * p - 1) * math.sqrt(2 / (1 - (2 * p - 1) ** 2))
    z = NormalDist().inv_cdf(p)
    # Cornish-Fisher expansion as the start, then Newton on the distribution function.
    x = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    log_scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    for _ in range(50):
        density = math.exp(log_scale - (df + 1) / 2 * math.log1p(x * x / df))
        step = (t_cdf(x, df) - p) / density
        x -= step
        if abs(step) < 1e-12 * max(1.0, abs(x)):
            break
    return x


def t_cdf(x: float, df: float) -> float:
    """Distribution function of Student's t, by the regularised incomplete beta function."""
    tail = 0.5 * _beta_inc(df / 2, 0.5, df / (df + x * x))
    return 1 - tail if x > 0 else tail


def _beta_inc(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b) by Lentz's continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta_inc(b, a, 1 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    tiny = 1e-300
    c, d = 1.0, 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > tiny else tiny)
    result = d
    for m in range(1, 500):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 + term * d
            d = 1 / (d if abs(d) > tiny else tiny)
            c = 1 + term / c
            c = c if abs(c) > tiny else tiny
            result *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * result / a


def binomial_cdf(k: int, n: int, p: float) -> float:
    """Probability of at most `k` successes in `n` trials, by the beta function (DLMF 8.17.5)."""
    return 1.0 if k >= n else _beta_inc(n - k, k + 1, 1 - p)


@dataclass(frozen=True)
class Ratio:
    """A ratio of means with its interval; `high` may be infinite where the denominator may be zero."""

    value: float
    low: float
    high: float
    pairs: int
    method: str
    level: float = 0.95

    def verdict(self, claim: float) -> str:
        """`met` where the whole interval is at or above `claim`, `not met` where it is below, else inconclusive."""
        if self.low >= claim:
            return MET
        return NOT_MET if self.high < claim else INCONCLUSIVE


def fieller(a: Sequence[float], b: Sequence[float], *, level: float = 0.95) -> Ratio:
    """Fieller's interval for mean(a) / mean(b) of pairs (Fieller 1954, J. R. Stat. Soc. B 16, 175-185).

    `a` and `b` are positive, same length, at least two pairs. Where mean(b) is not clearly above zero the
    interval is unbounded above.
    """
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    n = len(x)
    if n != len(y) or n < 2:
        raise ValueError("needs at least two pairs")
    ratio = float(x.mean() / y.mean())
    t = t_quantile(0.5 + level / 2, n - 1)
    covariance = np.cov(x, y, ddof=1) / n
    vxx, vyy, vxy = float(covariance[0, 0]), float(covariance[1, 1]), float(covariance[0, 1])
    mx, my = float(x.mean()), float(y.mean())
    # Roots of (mx - r my)^2 = t^2 Var(mean(x) - r mean(y)).
    qa, qb, qc = my**2 - t**2 * vyy, mx * my - t**2 * vxy, mx**2 - t**2 * vxx
    inside = qb**2 - qa * qc
    if qa <= 0 or inside < 0:
        return Ratio(ratio, 0.0, math.inf, n, "fieller", level)
    root = math.sqrt(inside)
    return Ratio(ratio, max(0.0, (qb - root) / qa), (qb + root) / qa, n, "fieller", level)


def bootstrap_ratio(
    a: Sequence[float], b: Sequence[float], *, level: float = 0.95, draws: int = 4000, seed: int = 0
) -> Ratio:
    """Studentised bootstrap of pairs on log(mean(a) / mean(b)) (Efron and Tibshirani 1993, ch. 12.5)."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    n = len(x)
    if n != len(y) or n < 2:
        raise ValueError("needs at least two pairs")
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, n, size=(draws, n))
    estimate, error = _log_ratio(x[None], y[None])
    values, errors = _log_ratio(x[picks], y[picks])
    keep = errors > 0
    ratio = float(np.exp(estimate[0]))
    if not keep.any() or error[0] == 0:
        return Ratio(ratio, ratio, ratio, n, "bootstrap", level)
    pivots = (values[keep] - estimate[0]) / errors[keep]
    tail = (1 - level) / 2
    low, high = np.quantile(pivots, [tail, 1 - tail])
    with np.errstate(over="ignore"):
        bounds = np.exp(estimate[0] - np.array([high, low]) * error[0])
    return Ratio(ratio, float(bounds[0]), float(bounds[1]), n, "bootstrap", level)


def _log_ratio(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log(mean(x) / mean(y)) along the last axis and its delta-method standard error."""
    n = x.shape[-1]
    mx, my = x.mean(axis=-1), y.mean(axis=-1)
    relative = x / mx[..., None] - y / my[..., None]
    return np.log(mx / my), np.sqrt((relative**2).sum(axis=-1) / (n * (n - 1)))


def percentile_interval(
    ordered: np.ndarray, p: float, *, level: float = 0.95
) -> tuple[float | None, float | None]:
    """Distribution-free interval of a percentile from order statistics (Conover 1999, sect. 3.2).

    `ordered` is sorted. A bound that no order statistic reaches at this level is None.
    """
    low, high = (
        None if rank is None else float(ordered[rank])
        for rank in interval_ranks(len(ordered), p, level=level)
    )
    return low, high


def interval_ranks(n: int, p: float, *, level: float = 0.95) -> tuple[int | None, int | None]:
    """Ranks, from 0, of the order statistics that bound a percentile of `n` values; None where there is none.

    Exact binomial tails, in logs so that large samples do not underflow; above `EXACT_RANKS` values the binomial's
    normal approximation with continuity correction, which is then within a rank or two.
    """
    q, tail = p / 100, (1 - level) / 2
    if n > EXACT_RANKS:
        half = -NormalDist().inv_cdf(tail) * math.sqrt(n * q * (1 - q))
        first, last = math.floor(n * q - half - 0.5), math.ceil(n * q + half + 0.5)
        return (first if first >= 0 else None), (last if last < n else None)
    k = np.arange(n + 1)
    log_choose = math.lgamma(n + 1) - np.array([math.lgamma(i + 1) + math.lgamma(n - i + 1) for i in k])
    cumulative = np.cumsum(np.exp(log_choose + k * math.log(q) + (n - k) * math.log1p(-q)))
    below = np.flatnonzero(cumulative <= tail)
    above = np.flatnonzero(cumulative >= 1 - tail)
    return (int(below[-1]) if len(below) else None), (int(above[0]) if len(above) and above[0] < n else None)


def pairs_needed(ratio: Ratio, claim: float, *, power: float = 0.8, limit: int = 10_000_000) -> int | None:
    """How many pairs settle an inconclusive verdict with probability `power`, if mean and spread stay as measured.

    The interval's half-width on the log scale shrinks with the square root of the pairs, and the estimate itself
    moves: the usual sample size for power, `((z_level + z_power) * se / distance)^2`. None above `limit`.
    """
    distance = abs(math.log(ratio.value / claim))
    if not math.isfinite(ratio.high) or ratio.low <= 0:
        return 4 * ratio.pairs
    half = math.log(ratio.high / ratio.low) / 2
    if distance == 0:
        return None
    z = NormalDist().inv_cdf(0.5 + ratio.level / 2)
    factor = (1 + NormalDist().inv_cdf(power) / z) ** 2
    needed = math.ceil(factor * ratio.pairs * (half / distance) ** 2)
    return max(needed, ratio.pairs + 1) if needed <= limit else None


def paired_score_difference(
    metric: str,
    truth: Sequence[str],
    baseline: Sequence[str],
    candidate: Sequence[str],
    *,
    level: float = 0.95,
    draws: int = 4000,
    seed: int = 0,
) -> Interval:
    """Candidate's score minus baseline's on the same rows, bootstrap stratified by the true class.

    The metric is `macro_f1` (over the classes in `truth`), or the share of equal answers for any other name.
    """
    generator = np.random.default_rng(seed)
    classes = {label: i for i, label in enumerate(dict.fromkeys(truth))}
    true = np.array([classes[t] for t in truth])
    weights = np.zeros((draws + 1, len(true)))
    weights[0] = 1
    for code in range(len(classes)):
        rows = np.flatnonzero(true == code)
        weights[1:, rows] = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=draws)
    values = _weighted_score(metric, true, candidate, classes, weights) - _weighted_score(
        metric, true, baseline, classes, weights
    )
    tail = (1 - level) / 2
    low, high = np.quantile(values[1:], [tail, 1 - tail])
    return Interval(float(values[0]), float(low), float(high), level)


def _weighted_score(
    metric: str, true: np.ndarray, answers: Sequence[str], classes: dict[str, int], weights: np.ndarray
) -> np.ndarray:
    guess = np.array([classes.get(a, -1) for a in answers])
    if metric != "macro_f1":
        share: np.ndarray = weights @ (guess == true) / len(true)
        return share
    eye = np.eye(len(classes))
    rows = weights @ eye[true]
    columns = weights @ np.where(guess[:, None] >= 0, eye[guess], 0.0)
    hits = weights @ np.where((guess == true)[:, None], eye[true], 0.0)
    total = rows + columns
    f1: np.ndarray = np.divide(2 * hits, total, out=np.zeros_like(total), where=total > 0)
    return f1.mean(axis=1)
