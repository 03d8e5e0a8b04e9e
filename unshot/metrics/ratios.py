"""Intervals of measured times: ratios and differences under noise that blocks and rows share, looks, percentiles.

scipy is imported by the functions that need it, so that a plan does not pay for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from unshot.metrics.intervals import LEVEL, Interval, t_quantile


@dataclass(frozen=True)
class Clustered:
    """An estimate: the `variance` of its error with `df` degrees of freedom, its `third` moment, from `pairs` pairs.

    `units` is the number of clusters that bind (rows or blocks, whichever contributes most), which must grow for the
    variance to fall.
    """

    value: float
    variance: float
    df: float
    pairs: int
    units: int
    unit: str
    third: float = 0.0

    def __add__(self, other: Clustered) -> Clustered:
        """The sum of two estimates with independent errors (Satterthwaite 1946 for the degrees of freedom)."""
        variance = self.variance + other.variance
        df = variance**2 / max(self.variance**2 / self.df + other.variance**2 / other.df, 1e-300)
        more = max((self, other), key=lambda c: c.variance)
        return Clustered(
            self.value + other.value,
            variance,
            df,
            min(self.pairs, other.pairs),
            more.units,
            more.unit,
            self.third + other.third,
        )

    def interval(self, level: float = LEVEL) -> Interval:
        """Student's interval, each bound the wider of it and of the one corrected for skewness.

        The correction is Hall's monotone transformation of t (1992, J. R. Stat. Soc. B 54, 221-228): service times have
        long tails, of which t alone says `met` wrongly in 3.2% of cases where it should in 2.5%.
        """
        error, t = math.sqrt(self.variance), t_quantile(0.5 + level / 2, self.df)
        skew = self.third / error**3 if error > 0 else 0.0

        def corrected(x: float) -> float:
            return 3 / skew * (float(np.cbrt(1 + skew * (x - skew / 6))) - 1) if abs(skew) > 1e-6 else x

        low, high = max(t, corrected(t)), min(-t, corrected(-t))
        return Interval(
            self.value,
            self.value - low * error,
            self.value - high * error,
            level,
            "two-way clusters, t",
            self.pairs,
        )


def clustered(per_pair: np.ndarray, rows: np.ndarray, blocks: np.ndarray, value: float) -> Clustered:
    """An estimate whose pairs share noise within a row (asked again and again) and within a block (run together).

    `per_pair` is what each pair adds to the estimate, mean 0, shape `(pairs,)`; `rows` and `blocks` are whole numbers,
    which row and block each pair is of. The variance is that between clusters of either kind, less what is counted
    twice (Cameron, Gelbach and Miller 2011, J. Bus. Econ. Stat. 29, 238-249, with the correction G / (G - 1)); a kind
    of cluster that adds nothing is left out, and the degrees of freedom are Satterthwaite's (1946), so that 8 rows
    asked 32 times are worth 8. It takes the place of the two-way bootstrap of Owen and Eckles (2012, Ann. Appl. Stat.
    6, 895-927), which needs many clusters of each kind.
    """
    pairs = len(per_pair)
    if pairs < 2:
        raise ValueError("needs at least two pairs")
    single = float(per_pair @ per_pair) / pairs / (pairs - 1)
    variance, squares = single, single**2 / (pairs - 1)
    third = own_third = float((per_pair**3).sum()) / pairs**3
    units, unit, most = pairs, "pairs", 0.0
    for name, ids in (("rows", rows), ("blocks", blocks)):
        groups = len(np.unique(ids))
        if groups == pairs:
            continue
        if groups < 2:
            raise ValueError(f"all pairs are of one of the {name}")
        sums = np.bincount(np.unique(ids, return_inverse=True)[1], per_pair)
        between = float(sums @ sums) * groups / (groups - 1) / pairs**2
        extra = between - single
        if extra > 0:
            variance += extra
            squares += between**2 / (groups - 1)
            third += float((sums**3).sum()) / pairs**3 - own_third
            if extra > most:
                units, unit, most = groups, name, extra
    df = variance**2 / squares if squares > 0 else float(pairs - 1)
    return Clustered(value, variance, df, pairs, units, unit, third)


def log_ratio(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    rows: Sequence[int] | np.ndarray | None = None,
    blocks: Sequence[int] | np.ndarray | None = None,
) -> Clustered:
    """log(mean(a) / mean(b)) of pairs of positive values, by the delta method; `rows`, `blocks` None: pairs alone."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if len(x) != len(y):
        raise ValueError("a and b must have one length")
    if not len(x) or x.mean() <= 0 or y.mean() <= 0:
        raise ValueError("needs pairs of positive values")
    alone = np.arange(len(x))
    return clustered(
        x / x.mean() - y / y.mean(),
        alone if rows is None else np.asarray(rows),
        alone if blocks is None else np.asarray(blocks),
        math.log(x.mean() / y.mean()),
    )


def ratio_of_means(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    rows: Sequence[int] | np.ndarray | None = None,
    blocks: Sequence[int] | np.ndarray | None = None,
    *,
    level: float = LEVEL,
) -> Interval:
    """mean(a) / mean(b) of pairs, each bound the wider of the log ratio's and of Fieller's (1954), both clustered.

    Fieller's bounds count only if they are finite: with few pairs a mean of positive times is not told from 0 by it.
    """
    log = log_ratio(a, b, rows, blocks)
    bounds = log.interval(level)
    low, high = math.exp(max(bounds.low, -700.0)), math.exp(min(bounds.high, 700.0))
    # Var(mean(a) - r mean(b)) near the estimate, in units of mean(b): three variances give its parts.
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    alone = np.arange(len(x))
    ids = (
        alone if rows is None else np.asarray(rows),
        alone if blocks is None else np.asarray(blocks),
    )
    one, other = x / x.mean() - 1, y / y.mean() - 1
    t = t_quantile(0.5 + level / 2, log.df)
    v_one = min(clustered(one, *ids, 0.0).variance, 1e6)
    v_other = min(clustered(other, *ids, 0.0).variance, 1e6)
    both = (v_one + v_other - log.variance) / 2
    # Roots of (1 - q)^2 = t^2 Var(one - q other), q = r / estimate.
    qa, qb, qc = 1 - t**2 * v_other, 1 - t**2 * both, 1 - t**2 * v_one
    inside = qb**2 - qa * qc
    if qa > 0 and inside >= 0:
        estimate = math.exp(log.value)
        low = min(low, max(0.0, (qb - math.sqrt(inside)) / qa) * estimate)
        high = max(high, (qb + math.sqrt(inside)) / qa * estimate)
    method = "ratio of means: two-way clustered log ratio and Fieller, wider bounds"
    return Interval(math.exp(log.value), low, high, level, method, len(x))


def units_to_settle(
    estimate: Clustered, bound: float, *, level: float = LEVEL, power: float = 0.8, limit: int = 1_000_000
) -> int | None:
    """How many of `estimate.unit` would settle on which side of `bound` the truth lies, with probability `power`.

    The smallest n with (t(n) + z(power)) sqrt(variance units / n) <= |value - bound|, if mean and spread stay as they
    are; the degrees of freedom grow along. Value and bound on one scale (logs, for a ratio). None above `limit`.
    """
    distance = abs(estimate.value - bound)
    z = t_quantile(power, math.inf)

    def settles(units: int) -> bool:
        grown = units / estimate.units
        t = t_quantile(0.5 + level / 2, max(estimate.df * grown, 1.0))
        return (t + z) * math.sqrt(estimate.variance / grown) <= distance

    low, high = 1, max(2, estimate.units)
    while not settles(high):
        low, high = high, high * 2
        if high > limit:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if settles(middle) else (middle, high)
    return high


def looks(first: int, last: int, *, level: float = LEVEL) -> Iterator[tuple[int, float]]:
    """The sample sizes at which a sequential measurement is looked at, doubling, and the level of each look's interval.

    All intervals together hold with probability `level`: at n of `last` units n / last of 1 - level has been spent (Lan
    and DeMets 1983 with the spending function of Kim and DeMets 1987, rho = 1; the looks' errors are added up, which
    needs no assumption on how they depend on each other). Stop at the first look whose interval settles the question.
    """
    spent, size = 0.0, min(first, last)
    while True:
        share_spent = size / last
        yield size, 1 - (1 - level) * (share_spent - spent)
        if size >= last:
            return
        spent, size = share_spent, min(2 * size, last)


def percentile_interval(
    ordered: np.ndarray, p: float, *, level: float = LEVEL
) -> tuple[float | None, float | None]:
    """Distribution-free interval of a percentile from order statistics (Conover 1999, sect. 3.2).

    `ordered` is sorted. A bound that no order statistic reaches at this level is None.
    """
    low, high = (
        None if rank is None else float(ordered[rank])
        for rank in interval_ranks(len(ordered), p, level=level)
    )
    return low, high


def interval_ranks(n: int, p: float, *, level: float = LEVEL) -> tuple[int | None, int | None]:
    """Ranks, from 0, of the order statistics that bound a percentile of `n` values; None if there is none."""
    from scipy.stats import binom

    tail = (1 - level) / 2
    low, high = int(binom.ppf(tail, n, p / 100)) - 1, int(binom.ppf(1 - tail, n, p / 100))
    return (low if low >= 0 else None), (high if high < n else None)
