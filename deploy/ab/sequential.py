"""A comparison of two means that may be looked at after every observation: a normal-mixture confidence sequence.

The mixture of likelihood ratios over a normal prior on the effect bounds the error over all looks together (Robbins
1970; as the mSPRT in Johari, Koomen, Pekelis and Walsh 2017 and 2022; as a boundary in Howard, Ramdas, McAuliffe and
Sekhon 2021, sect. 3.5). The variance is estimated and the means are taken as normal, so that the bound holds for large
samples (Waudby-Smith et al. 2024); `BURN_IN` units per arm must be seen before a look counts, and
tests/benchmarks/bench_ab_peeking.py measures what is left of that. Observations of one unit may depend on each other:
the variance is the one by units (Liang and Zeger 1986).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields

import numpy as np
from scipy.optimize import brentq
from scipy.special import lambertw
from scipy.stats import norm

# Units per arm before a look counts: below that an estimated variance is not to be trusted. Where few units have most
# of the values, also as many of equal size: 1 / (sum of the squared shares that the units have in the arm's mean).
BURN_IN, EQUAL = 30, 10
# Looks and grid of the recursion for the planned power.
LOOKS, GRID = 300, 400
# Nearer to what is asked for than this, what never falls leaves no number of answers that could be told.
NEAR = 0.8


@dataclass(frozen=True)
class Path:
    """What was known after each observation, arrays of shape `(observations,)`.

    `difference` is candidate minus baseline, `variance` the estimated variance of it (infinite before there is one),
    `baseline` and `candidate` the units seen, `equal` what the units of the smaller arm weigh, as a number of
    units of equal size, `n` the observations seen at each look.
    """

    difference: np.ndarray
    variance: np.ndarray
    baseline: np.ndarray
    candidate: np.ndarray
    equal: np.ndarray
    n: np.ndarray

    def last(self) -> Path:
        """The last look alone."""
        return Path(*(getattr(self, field.name)[-1:] for field in fields(self)))


@dataclass(frozen=True)
class Sequence:
    """The confidence sequence along a path: bounds valid together at every index, and an always-valid p-value.

    Bounds are infinite and p is 1 until the burn-in is over. They only ever tighten: what was excluded once stays
    excluded. `p` is against no difference.
    """

    low: np.ndarray
    high: np.ndarray
    p: np.ndarray


def compare(value: np.ndarray, unit: np.ndarray, candidate: np.ndarray, *, scale: float) -> Path:
    """The difference of two means after each observation, in the order given.

    `unit` holds integers, `candidate` says which arm; a unit is in one arm only. The variance never falls below that
    of the same values with four more at a distance of `scale` from the mean (0.5 for shares), so that an arm in which
    nothing has varied yet is not certain; nor below that with the spread of both arms together (`_pooled`).
    """
    arms = []
    for mine in (~candidate, candidate):
        mean, variance, seen, equal, squares = _running(value[mine], unit[mine], scale)
        # The state of an arm after each observation of either.
        at = np.cumsum(mine)
        arms.append(
            (
                np.concatenate([[0.0], mean])[at],
                np.concatenate([[np.inf], variance])[at],
                np.concatenate([[0], seen])[at],
                np.concatenate([[0.0], equal])[at],
                np.concatenate([[0.0], squares])[at],
                np.maximum(at, 1),
            )
        )
    (mean_b, var_b, units_b, equal_b, squares_b, n_b), (mean_c, var_c, units_c, equal_c, squares_c, n_c) = (
        arms
    )
    equal = np.minimum(equal_b, equal_c)
    variance = np.maximum(var_b + var_c, _pooled(squares_b, squares_c, n_b, n_c))
    return Path(mean_c - mean_b, variance, units_b, units_c, equal, np.arange(1, len(value) + 1))


def _pooled(squares_b: np.ndarray, squares_c: np.ndarray, n_b: np.ndarray, n_c: np.ndarray) -> np.ndarray:
    """The variance of a difference if both arms vary alike; the arguments are squares about each mean, and counts.

    At a share of 10% the small arm's own spread is known from few, and where nearly all are right it is small just when
    its mean is high by chance: the same luck would move the estimate and shrink its error.
    """
    return (squares_b + squares_c) / np.maximum(n_b + n_c - 2, 1) * (1 / n_b + 1 / n_c)


def looks(total: int) -> np.ndarray:
    """The observation counts at which a stratified comparison is made: each at first, rarer later, and the last.

    They do not depend on `total`, so that a later call looks where an earlier one did.
    """
    steps = ((0, 300, 1), (300, 1000, 5), (1000, 5000, 25), (5000, 20_000, 200), (20_000, 10**9, 2000))
    points = [np.arange(low + step, min(high, total) + 1, step) for low, high, step in steps if total > low]
    return np.unique(np.concatenate([*points, [total]])) if total else np.empty(0, dtype=int)


def compare_within(
    value: np.ndarray,
    unit: np.ndarray,
    candidate: np.ndarray,
    stratum: np.ndarray,
    *,
    scale: float,
    points: np.ndarray | None = None,
) -> Path:
    """As `compare`, within strata: their differences weighed by n_b n_c / (n_b + n_c), at `points` (default: `looks`).

    The weights are those of a regression with an effect for each stratum, and do not depend on what was observed. The
    variance is by units over all strata together: a unit's contributions to both arms are no independent ones.
    """
    if len(stratum) == 0 or (stratum == stratum[0]).all():
        return compare(value, unit, candidate, scale=scale)
    points = looks(len(value)) if points is None else points
    cell = 2 * stratum + candidate
    # How often the same unit was seen in the cell before.
    _, earlier = _before(value, cell * (int(unit.max()) + 1) + unit)
    rows = [_at(value[:n], unit[:n], cell[:n], earlier[:n], scale) for n in points]
    difference, variance, baseline, seen, equal = (np.array(column) for column in zip(*rows, strict=True))
    return Path(difference, variance, baseline.astype(int), seen.astype(int), equal, points)


def _at(
    value: np.ndarray, unit: np.ndarray, cell: np.ndarray, earlier: np.ndarray, scale: float
) -> tuple[float, float, int, int, float]:
    """Difference, its variance, and units of both arms in the strata that have both, and `Path.equal`.

    `cell` is twice the stratum, plus one for the candidate.
    """
    size = 2 * (int(cell.max()) // 2 + 1)
    n = np.bincount(cell, minlength=size).astype(float)
    units = np.bincount(cell, earlier == 0, minlength=size)
    usable = (units[0::2] > 1) & (units[1::2] > 1)
    if not usable.any():
        return 0.0, math.inf, int(units[0::2].sum()), int(units[1::2].sum()), 0.0
    weight = np.where(usable, n[0::2] * n[1::2] / np.maximum(n[0::2] + n[1::2], 1), 0.0)
    weight = np.repeat(weight / weight.sum(), 2)
    n = np.maximum(n, 1)
    mean = np.bincount(cell, value, minlength=size) / n
    difference = float((weight[1::2] * (mean[1::2] - mean[0::2])).sum())
    # What each observation contributes to the difference, summed by unit.
    correction = np.sqrt(_correction(n, np.bincount(cell, 2 * earlier + 1, minlength=size), units))
    part = (weight * correction / n)[cell] * (value - mean[cell]) * (2.0 * (cell % 2) - 1.0)
    by_unit = np.bincount(unit, part)
    variance = float((by_unit**2).sum())
    squares = np.bincount(cell, (value - mean[cell]) ** 2, minlength=size)
    least = 0.0
    for arm in (0, 1):
        w, count, spread = weight[arm::2], n[arm::2], squares[arm::2]
        effective = 1 / (w**2 / count).sum()
        alone = (w**2 * spread / count**2).sum() * effective**2
        least += float((alone + 4 * scale**2) / (effective + 2) / effective)
    pooled = float((weight[0::2] ** 2 * _pooled(squares[0::2], squares[1::2], n[0::2], n[1::2])).sum())
    share = (weight / n)[cell]
    equal = min(1 / float((np.bincount(unit, share * (cell % 2 == arm)) ** 2).sum()) for arm in (0, 1))
    seen = [int(units[arm::2][usable].sum()) for arm in (0, 1)]
    return difference, max(variance, least, pooled), seen[0], seen[1], equal


def _correction(n: np.ndarray, counts: np.ndarray, units: np.ndarray) -> np.ndarray:
    """What the squares by units are divided by too little; `counts` holds the sums of the units' squared counts.

    About their own mean, independent values give sigma^2 (n - counts / n); of units of equal size that is the usual
    units / (units - 1).
    """
    equal = n**2 / np.maximum(counts, 1)
    return np.where(units > 1, equal / np.where(units > 1, equal - 1, 1.0), 0.0)


def paired(value: np.ndarray, unit: np.ndarray, *, scale: float) -> Path:
    """The mean of paired differences after each pair, in the order given; `scale` as in `compare` (1 for shares)."""
    mean, variance, seen, equal, _ = _running(value, unit, scale)
    return Path(mean, variance, seen, seen, equal, np.arange(1, len(value) + 1))


def _running(
    value: np.ndarray, unit: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean, its variance by units, units, these as of equal size, squares about the mean, after each value of an arm.

    With a unit's sum s and count k, the sum over units of (s - mean k)^2 is kept by its three parts.
    """
    n = np.arange(1, len(value) + 1)
    if not len(value):
        empty = np.empty(0)
        return empty, empty, np.empty(0, dtype=int), empty, empty
    shift = float(value.mean())  # changes no variance, keeps the sums small
    y = value - shift
    before_sum, before_count = _before(y, unit)
    squares = np.cumsum(2 * before_sum * y + y**2)
    cross = np.cumsum(before_sum + before_count * y + y)
    counts = np.cumsum(2 * before_count + 1)
    units = np.cumsum(before_count == 0)
    mean = np.cumsum(y) / n
    spread = np.maximum(squares - 2 * mean * cross + mean**2 * counts, 0.0)
    variance = np.where(units > 1, _correction(n, counts, units) * spread / n**2, np.inf)
    alone = np.maximum(np.cumsum(y**2) - n * mean**2, 0.0)
    variance = np.maximum(variance, (alone + 4 * scale**2) / (n + 2) / n)
    return mean + shift, variance, units, n**2 / counts, alone


def _before(value: np.ndarray, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of the same unit's earlier observations, for each observation."""
    order = np.argsort(unit, kind="stable")
    ranked, values = unit[order], value[order]
    start = np.concatenate([[True], ranked[1:] != ranked[:-1]])
    first = np.maximum.accumulate(np.where(start, np.arange(len(order)), 0))
    running = np.concatenate([[0.0], np.cumsum(values)])
    sums, counts = np.empty(len(order)), np.empty(len(order))
    sums[order] = running[:-1] - running[first]
    counts[order] = np.arange(len(order)) - first
    return sums, counts


def follow(path: Path, *, mixing: float, alpha: float, burn_in: int = BURN_IN) -> Sequence:
    """The confidence sequence of a path at level 1 - alpha; `mixing` is the prior's variance of the effect."""
    ready = (path.baseline >= burn_in) & (path.candidate >= burn_in) & (path.equal >= EQUAL)
    ready &= np.isfinite(path.variance)
    v = np.where(ready, np.maximum(path.variance, 1e-300), 1.0)
    total = v + mixing
    radius = np.where(ready, np.sqrt(v * total / mixing * np.log(total / (v * alpha**2))), np.inf)
    with np.errstate(over="ignore"):
        ratio = np.sqrt(v / total) * np.exp(np.minimum(path.difference**2 * mixing / (2 * v * total), 700.0))
    p = np.where(ready, np.minimum(1.0, 1 / ratio), 1.0)
    return Sequence(
        np.maximum.accumulate(path.difference - radius),
        np.minimum.accumulate(path.difference + radius),
        np.minimum.accumulate(p),
    )


@dataclass(frozen=True)
class Outlook:
    """What a plan takes if traffic goes on as it has.

    `needed` counts answers, both arms together; None: more of the same users hardly get there. `users` are those that
    it takes per arm, as many of equal size. `design_effect`: the variance over that of as many independent answers;
    None where no user has two.
    """

    needed: int | None
    users: int
    design_effect: float | None


def outlook(path: Path, alone: Path, target: float) -> Outlook:
    """When looks count and the variance is down to `target`. `alone`: the last look, every answer a unit of its own.

    What the answers of one user have in common does not average out while the same users ask: of the variance a part
    (v - v_alone) goes with the sum of the users' squared shares, and the rest as 1 / n.
    """
    n, v, independent = int(path.n[-1]), float(path.variance[-1]), float(alone.variance[-1])
    common = max(v - independent, 0.0)
    shared = 1 / float(path.equal[-1]) - 1 / float(alone.equal[-1])
    if shared < 1e-9 / n:  # rounding: no user has two answers
        shared = 0.0
    per_share = common / shared if shared else 0.0
    stays, falls = _onward(path.n, path.equal)
    floor = min(per_share * stays, v)

    def answers(stays: float, falls: float, asked: float) -> float:
        """Where `stays + falls / answers` comes down to `asked`."""
        met = stays + falls / n <= asked
        if stays >= (asked if met else NEAR * asked):
            return n if met else math.inf
        return falls / (asked - stays)

    needed = max(
        answers(floor, n * (v - floor), target),
        answers(stays, falls, 1 / EQUAL),
        *(answers(*_onward(path.n, units), 1 / BURN_IN) for units in (path.baseline, path.candidate)),
    )
    return Outlook(
        math.ceil(needed) if needed < math.inf else None,
        max(math.ceil(per_share / target), EQUAL),
        max(v / independent, 1.0) if shared else None,
    )


def _onward(n: np.ndarray, units: np.ndarray) -> tuple[float, float]:
    """1 / units as f + h / n, through the last look and the one at half as many answers."""
    last, half = (1 / max(float(units[at]), 1e-9) for at in (-1, int(np.searchsorted(n, n[-1] / 2))))
    stays = min(max(2 * last - half, 0.0), last)
    return stays, float(n[-1]) * (last - stays)


@dataclass(frozen=True)
class Design:
    """A planned test: the mixing variance, and the variance of the difference at which the power is reached."""

    alpha: float
    power: float
    effect: float
    mixing: float
    target_variance: float

    def per_arm(self, baseline_variance: float, candidate_variance: float) -> int:
        """Observations per arm of two equal arms; the arguments are the variances of one observation."""
        return math.ceil((baseline_variance + candidate_variance) / self.target_variance)


def design(effect: float, *, alpha: float = 0.05, power: float = 0.8) -> Design:
    """Plan for a true difference of `effect` from the value that is to be excluded.

    The prior's variance makes the sequence tightest at the planned end (Howard et al. 2021, sect. 3.5:
    v / (-W(-alpha^2 / e) - 1), lower branch of Lambert's W).
    """
    needed = effect / _drift(alpha, power)
    return Design(alpha, power, effect, _sharpness(alpha) * needed**2, needed**2)


def _sharpness(alpha: float) -> float:
    return float(-lambertw(-(alpha**2) / math.e, k=-1).real - 1)


@functools.cache
def _drift(alpha: float, power: float) -> float:
    """Effect in standard errors at the planned end for which the upper bound is crossed by then with `power`.

    Brownian motion with drift on (0, 1] against the mixture boundary, by numerical integration from look to look
    (Armitage, McPherson and Rowe 1969).
    """
    rho = 1 / _sharpness(alpha)
    t = np.arange(1, LOOKS + 1) / LOOKS
    bound = np.sqrt((t + rho) * np.log((t + rho) / (rho * alpha**2)))
    lowest = -4.0
    step = (float(bound.max()) - lowest) / GRID
    x = lowest + step * (np.arange(GRID) + 0.5)
    width = 1 / math.sqrt(LOOKS)

    def crossed(drift: float) -> float:
        moved = norm.pdf((x[None, :] - x[:, None] - drift / LOOKS) / width) * step / width
        density = norm.pdf((x - drift / LOOKS) / width) / width
        inside = float((density * (x <= bound[0])).sum() * step)
        total = 1 - inside
        density = np.where(x <= bound[0], density, 0.0)
        for edge in bound[1:]:
            density = density @ moved
            beyond = x > edge
            total += float(density[beyond].sum() * step)
            density[beyond] = 0.0
        return total

    return float(brentq(lambda d: crossed(d) - power, 1.0, 10.0, xtol=1e-3))
