"""Intervals and tests of scores: shares, means, ratios of sums, paired differences; those of times are in `ratios`.

Coverage of each by simulation: tests/benchmarks/bench_interval_coverage.py, tables in docs/evaluation.md. scipy is
imported by the functions that need it, so that a plan does not pay for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unshot.contracts.record import Record

LEVEL = 0.95
MET, NOT_MET, INCONCLUSIVE = "met", "not met", "inconclusive"
# Up to so many units an interval is called one of few in words.
FEW = 30


@dataclass(frozen=True)
class Interval:
    """A point estimate with the bounds of its confidence interval from `n` units; `high` may be infinite."""

    value: float
    low: float
    high: float
    level: float = LEVEL
    method: str = ""
    n: int = 0

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def verdict(self, claim: float) -> str:
        """`met` if the whole interval is at or above `claim`, `not met` if it is below, else inconclusive."""
        if self.low >= claim:
            return MET
        return NOT_MET if self.high < claim else INCONCLUSIVE

    @property
    def caution(self) -> str:
        """What must be said in words of an interval from few units; empty if they are enough."""
        return f"only {self.n} rows: the interval is wide and approximate" if self.n <= FEW else ""


def t_quantile(p: float, df: float) -> float:
    """Quantile of Student's t; `df` need not be whole, infinite gives the normal distribution's."""
    from scipy.special import ndtri, stdtrit

    return float(ndtri(p) if math.isinf(df) else stdtrit(df, p))


# Shares and bounded means


def share(hits: float, total: int, *, level: float = LEVEL) -> Interval:
    """A binomial share. Never of zero width: of 6 right ones among 6 the lower bound is 0.61. `total` is at least 1."""
    low, high = _beta_bounds(hits, float(total), level)
    return Interval(hits / total, low, high, level, "Clopper-Pearson, mid-P", total)


def _beta_bounds(hits: float, total: float, level: float) -> tuple[float, float]:
    """Bounds of a share, for sizes that need not be whole.

    Halfway between those of Clopper and Pearson (1934), which cover at least the level, and Jeffreys's: within 0.01 of
    the mid-P bounds (Lancaster 1961; Brown, Cai and DasGupta 2001, Statistical Science 16, 101-133).
    """
    from scipy.special import betaincinv

    tail, misses = (1 - level) / 2, total - hits
    low = high = 0.0
    if hits > 1e-9:
        low = float(betaincinv(hits, misses + 1, tail) + betaincinv(hits + 0.5, misses + 0.5, tail)) / 2
    high = 1.0
    if misses > 1e-9:
        high = (
            float(betaincinv(hits + 1, misses, 1 - tail) + betaincinv(hits + 0.5, misses + 0.5, 1 - tail)) / 2
        )
    return low, high


def bounded(value: float, variance: float, rows: int, *, level: float = LEVEL, method: str) -> Interval:
    """The interval of an estimate in [0, 1] whose sampling variance is known or estimated from `rows` rows.

    That of a share at the effective sample size: so many yes-or-no rows would have this variance (Korn and Graubard
    1998, Survey Methodology 24, 193-201, with their correction by t). Half a row's worth of binomial variance is
    blended in against the rows that tell of the variance, the fewer the nearer the value is to a bound, so that rows
    that are all equal are not taken for certainty.
    """
    value = min(max(value, 0.0), 1.0)
    telling = 2 * rows * min(value, 1 - value)
    binomial = value * (1 - value)
    measured = variance * rows / binomial if binomial > 1e-12 else 1.0
    effect = (measured * telling + 0.5) / (telling + 0.5)
    size = rows / effect
    if rows > 1 and effect < 1:
        tail = 0.5 + level / 2
        shrink = (t_quantile(tail, math.inf) / t_quantile(tail, rows - 1)) ** 2
        size *= effect + (1 - effect) * shrink
    size = max(size, 1.0)
    low, high = _beta_bounds(value * size, size, level)
    return Interval(value, min(low, value), max(high, value), level, method, rows)


def mean(rows: np.ndarray, *, level: float = LEVEL) -> Interval:
    """The mean of per-row values in [0, 1]; 0-or-1 rows give `share`.

    A NaN is a row that could not be scored: it counts as 0 in the lower bound and as 1 in the upper one, and the value
    is that of the other rows.
    """
    known = rows[~np.isnan(rows)]
    if len(known) < len(rows):
        if not len(known):
            return Interval(math.nan, 0.0, 1.0, level, "no row could be scored", len(rows))
        worst, best = (mean(np.nan_to_num(rows, nan=fill), level=level) for fill in (0.0, 1.0))
        method = f"{worst.method}; {len(rows) - len(known)} unscored rows count as 0 below, as 1 above"
        return Interval(float(known.mean()), worst.low, best.high, level, method, len(rows))
    if np.isin(rows, (0.0, 1.0)).all():
        return share(float(rows.sum()), len(rows), level=level)
    variance = float(rows.var(ddof=1)) / len(rows)
    return bounded(float(rows.mean()), variance, len(rows), level=level, method="effective sample size")


def ratio_of_sums(table: np.ndarray, *, level: float = LEVEL) -> Interval:
    """Sum of `table[:, 0]` over sum of `table[:, 1]` (part and whole of each row), rows being the sampled units."""
    part, whole = table.sum(axis=0)
    if not whole:
        return Interval(0.0, 0.0, 1.0, level, "nothing to score", len(table))
    value, rows = float(part / whole), len(table)
    residual = influence_of_sums(table)
    variance = float(residual @ residual) / max(rows - 1, 1) / rows
    return bounded(value, variance, rows, level=level, method="effective sample size")


def influence_of_sums(table: np.ndarray) -> np.ndarray:
    """What each row adds to the ratio of sums, to first order, shape `(rows,)`, mean 0 (Cochran 1977, ch. 6)."""
    part, whole = table.sum(axis=0)
    if not whole:
        return np.zeros(len(table))
    found: np.ndarray = (table[:, 0] - part / whole * table[:, 1]) * len(table) / whole
    return found


# Paired differences


def paired(
    value: float,
    per_row: np.ndarray,
    *,
    level: float = LEVEL,
    jump: float = 1.0,
    equal: float | None = None,
    unscored: int = 0,
) -> Interval:
    """A difference of two scores on the same rows; `per_row` is what each row adds to it, shape `(rows,)`.

    Student's interval with pseudo-rows: rows on which both sides are equal say little of how they differ where they do,
    so that z^2 differences of size `jump` are spread over them, the fewer the more rows differ (by 1 + m / 4 of m).
    0 of n differing is bounded by z^2 / n, as by Tango's score interval (1998, Statistics in Medicine 17, 891-908;
    pseudo-pairs as in Agresti and Min 2005), and never shown to be 0. `equal` is the share of such rows (None: those
    that add 0); `unscored` rows may have differed either way by 1.
    """
    rows = len(per_row)
    if rows < 2:
        return Interval(value, -1.0, 1.0, level, "one row tells nothing", rows)
    tail = 0.5 + level / 2
    centred = per_row - per_row.mean()
    if equal is None:
        equal = float((np.abs(per_row) < 1e-12).mean())
    pseudo = t_quantile(tail, math.inf) ** 2 * equal / (1 + rows * (1 - equal) / 4)
    spread = float(centred @ centred) + pseudo * jump**2
    half = t_quantile(tail, rows - 1) * math.sqrt(spread / (rows * (rows - 1))) + unscored / rows
    return Interval(
        value, max(-1.0, value - half), min(1.0, value + half), level, "paired t with pseudo-pairs", rows
    )


def paired_p(difference: Interval) -> float:
    """Two-sided p-value of no difference that goes with `paired`: the level at which its interval would touch 0."""
    from scipy.special import stdtr

    half = difference.high - difference.value
    if difference.n < 2 or half <= 0:
        return 1.0
    error = half / t_quantile(0.5 + difference.level / 2, difference.n - 1)
    return float(2 * stdtr(difference.n - 1, -abs(difference.value) / error))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar test: a binomial test of the discordant pairs at 1/2 (McNemar 1947)."""
    from scipy.stats import binomtest

    total = only_first + only_second
    return float(binomtest(only_first, total).pvalue) if total else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(np.asarray(p_values)[order] * factors), 1.0)
    return [float(p) for p in corrected]


def rows_needed(loss: float, *, level: float = LEVEL) -> int:
    """Rows that would show a loss of at most `loss` if none of them differed (`paired`'s bound with no difference)."""
    z = t_quantile(0.5 + level / 2, math.inf)
    rows = max(2, math.ceil(z * z / loss))
    while paired(0.0, np.zeros(rows), level=level).high > loss:
        rows += 1
    return rows


# One bootstrap, for statistics without a formula


def resamples(
    rows: int, *, draws: int = 2000, seed: int = 0, strata: Sequence[Any] | None = None
) -> np.ndarray:
    """Row indices drawn with replacement (within each stratum), int32 of shape `(draws, rows)`."""
    generator = np.random.default_rng(seed)
    if strata is None:
        found: np.ndarray = generator.integers(rows, size=(draws, rows)).astype(np.int32)
        return found
    keys = np.asarray([str(s) for s in strata])
    parts = []
    for key in np.unique(keys):
        own = np.flatnonzero(keys == key).astype(np.int32)
        parts.append(own[generator.integers(len(own), size=(draws, len(own)))])
    return np.concatenate(parts, axis=1)


def percentile(values: np.ndarray, point: float, *, level: float = LEVEL, n: int = 0) -> Interval:
    """Percentile interval of resampled values (Efron and Tibshirani 1993, ch. 13)."""
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(point, float(low), float(high), level, "percentile bootstrap", n)


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
