"""False positives of `deploy ab` when it is looked at after every request, and power at the planned sample size.

    python -m tests.benchmarks.bench_ab_peeking --experiments 4000 --requests 5000

Each experiment is a stream of requests split in half; the test looks after each of them. The same streams are given to
a fixed-sample z-test that is peeked at in the same way, for what peeking does to it. Power is that of ending with the
right verdict by the planned number of requests, planned for the true effect.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
from scipy import stats

from deploy.ab.sequential import BURN_IN, compare, design, follow, paired

Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray, np.ndarray]]


def shares(baseline: float, candidate: float) -> Draw:
    """Right or wrong, every request of a unit of its own."""

    def draw(g: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        arm = g.random(n) < 0.5
        right = g.random(n) < np.where(arm, candidate, baseline)
        return right.astype(float), np.arange(n), arm

    return draw


def clustered(share: float, strength: float, per_unit: int) -> Draw:
    """Right or wrong with a share of the unit's own (beta, `strength` pseudo-observations): answers of a unit agree."""

    def draw(g: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        units = n // per_unit
        own, arms = g.beta(share * strength, (1 - share) * strength, units), g.random(units) < 0.5
        unit = g.integers(units, size=n)
        return (g.random(n) < own[unit]).astype(float), unit, arms[unit]

    return draw


def times(sigma: float) -> Draw:
    """Logarithms of log-normal times with a heavy end: one in twenty takes ten times as long."""

    def draw(g: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        arm = g.random(n) < 0.5
        value = g.normal(0, sigma, n) + np.where(g.random(n) < 0.05, math.log(10), 0)
        return value, np.arange(n), arm

    return draw


def peeked(
    draw: Draw, n: int, experiments: int, *, effect: float, scale: float, seed: int
) -> tuple[int, int, int]:
    """False positives of the sequence, of a peeked z-test on requests, and of one z-test at the end."""
    planned = design(effect)
    found = [0, 0, 0]
    for number in range(experiments):
        value, unit, arm = draw(np.random.default_rng([seed, number]), n)
        path = compare(value, unit, arm, scale=scale)
        bounds = follow(path, mixing=planned.mixing, alpha=planned.alpha)
        found[0] += bool(bounds.low[-1] > 0 or bounds.high[-1] < 0)
        naive = compare(value, np.arange(n), arm, scale=scale)
        ready = (naive.baseline >= BURN_IN) & (naive.candidate >= BURN_IN)
        beyond = np.abs(naive.difference[ready]) > 1.96 * np.sqrt(naive.variance[ready])
        found[1] += bool(beyond.any())
        found[2] += bool(beyond[-1])
    return found[0], found[1], found[2]


def margin_error(experiments: int, n: int, share: float, margin: float, seed: int) -> int:
    """How often "not worse within the margin" is said of a candidate that is worse by exactly the margin."""
    planned, draw, wrong = design(margin), shares(share, share - margin), 0
    for number in range(experiments):
        value, unit, arm = draw(np.random.default_rng([seed, number]), n)
        bounds = follow(compare(value, unit, arm, scale=0.5), mixing=planned.mixing, alpha=planned.alpha)
        wrong += bool(bounds.low[-1] > -margin)
    return wrong


def pair_error(experiments: int, n: int, seed: int) -> int:
    """False positives of shadowed pairs that disagree in one of ten."""
    planned, wrong = design(0.05), 0
    for number in range(experiments):
        g = np.random.default_rng([seed, number])
        value = np.where(g.random(n) < 0.1, np.where(g.random(n) < 0.5, 1.0, -1.0), 0.0)
        bounds = follow(paired(value, np.arange(n), scale=1.0), mixing=planned.mixing, alpha=planned.alpha)
        wrong += bool(bounds.low[-1] > 0 or bounds.high[-1] < 0)
    return wrong


def power(
    share: float, effect: float, wanted: float, experiments: int, seed: int, *, equal: bool
) -> tuple[int, int, float]:
    """Requests planned, right verdicts by then, and the median request at which they came.

    `equal`: both arms are right equally often and "not worse within the margin" of `effect` is to be found; else the
    candidate is better by `effect`.
    """
    planned = design(effect, power=wanted)
    other = share if equal else share + effect
    n = 2 * planned.per_arm(share * (1 - share), other * (1 - other))
    line = -effect if equal else 0.0
    ends = []
    for number in range(experiments):
        value, unit, arm = shares(share, other)(np.random.default_rng([seed, number]), n)
        bounds = follow(compare(value, unit, arm, scale=0.5), mixing=planned.mixing, alpha=planned.alpha)
        hit = np.flatnonzero(bounds.low > line)
        if len(hit):
            ends.append(int(hit[0]) + 1)
    return n, len(ends), float(np.median(ends)) if ends else math.nan


def rate(count: int, total: int) -> str:
    """A share with its exact 95% interval."""
    interval = stats.binomtest(count, total).proportion_ci(method="exact")
    return f"{count / total:.2%} [{interval.low:.2%}, {interval.high:.2%}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiments", type=int, default=4000)
    parser.add_argument("--requests", type=int, default=5000)
    arguments = parser.parse_args()
    total, n, start = arguments.experiments, arguments.requests, time.perf_counter()
    print(f"{total} A/A experiments of {n} requests, a look after each; effect planned for: 0.05")
    for name, draw, scale in (
        ("share right 50%", shares(0.5, 0.5), 0.5),
        ("share right 90%", shares(0.9, 0.9), 0.5),
        ("share right 99%", shares(0.99, 0.99), 0.5),
        ("90%, 5 requests a unit that agree", clustered(0.9, 2.0, 5), 0.5),
        ("90%, 50 requests a unit that agree", clustered(0.9, 2.0, 50), 0.5),
        ("log times, heavy end", times(0.5), 0.05),
    ):
        own, naive, last = peeked(draw, n, total, effect=0.05, scale=scale, seed=1)
        print(
            f"  {name}: {rate(own, total)}; peeked z-test {rate(naive, total)}; z-test once {rate(last, total)}"
        )
    print(f"  pairs that disagree in 10%: {rate(pair_error(total, n, 2), total)}")
    wrong = margin_error(total, n, 0.9, 0.05, 3)
    print(f"  worse by the margin of 0.05, called not worse: {rate(wrong, total)}")
    print("power at the planned number of requests, both arms together")
    for share, effect, wanted, equal in (
        (0.85, 0.05, 0.8, False),
        (0.85, 0.05, 0.9, False),
        (0.6, 0.1, 0.8, False),
        (0.9, 0.05, 0.8, True),
        (0.95, 0.02, 0.8, True),
    ):
        planned, hits, middle = power(share, effect, wanted, max(500, total // 4), 4, equal=equal)
        what = (
            f"equal at {share:.0%}, margin {effect:g}"
            if equal
            else f"{share:.0%} against {share + effect:.0%}"
        )
        print(
            f"  {what}, planned {wanted:.0%} at {planned}: {rate(hits, max(500, total // 4))}, half by {middle:.0f}"
        )
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
