"""Power of `deploy ab` at the number of answers that it says are needed, of users who ask unequally often.

    python -m tests.benchmarks.bench_ab_heavy --experiments 400

The requests of a user follow Zipf's law or are log-normal; whether an answer is right is drawn with a chance of the
user's own (beta, with the given correlation of two answers of one user). After 1,000 answers the report tells a
number, or that these users can hardly tell. Power: the share of tests in which a candidate worse by 0.1 was seen by the
number told, planned 80%; beside it by the first look at which the report says that there are enough. False alarms: the
share of tests of two equal arms in which the sequence excludes zero at any of 12,000 looks.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from deploy.ab.sequential import EQUAL, Path, compare, design, follow, outlook
from tests.benchmarks.bench_ab_peeking import rate

LOOKED, LOOKS, EFFECT = 1000, 12_000, 0.1
PLANNED = design(EFFECT)


@dataclass(frozen=True)
class Users:
    """Who asks: `spread` is Zipf's exponent or the log-normal's sigma, `alike` two answers' correlation."""

    law: str
    spread: float
    number: int
    alike: float

    def draw(self, g: np.random.Generator, n: int, gap: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Right or wrong, unit and arm of `n` answers; the candidate is right in 75% plus `gap`."""
        ranks = np.arange(1, self.number + 1)
        weight = ranks**-self.spread if self.law == "zipf" else g.lognormal(0, self.spread, self.number)
        unit = g.choice(self.number, size=n, p=weight / weight.sum())
        arm = g.random(self.number) < 0.5
        chance = 0.75 + gap * arm
        if self.alike:
            strength = 1 / self.alike - 1
            chance = g.beta(chance * strength, (1 - chance) * strength)
        return (g.random(n) < chance[unit]).astype(float), unit, arm[unit]


@dataclass
class Found:
    """Counts of tests: a number told, the effect seen by then; enough at some look, seen by then; false alarms."""

    told: int = 0
    seen: int = 0
    enough: int = 0
    seen_by_enough: int = 0
    false: int = 0


def measure(users: Users, experiments: int, seed: int) -> Found:
    """Simulate `experiments` tests of a worse candidate and as many of an equal one."""
    found = Found()
    for number in range(experiments):
        g = np.random.default_rng([seed, number])
        value, unit, arm = users.draw(g, LOOKS, -EFFECT)
        path = compare(value, unit, arm, scale=0.5)
        high = follow(path, mixing=PLANNED.mixing, alpha=PLANNED.alpha).high
        early = Path(
            *(part[:LOOKED] for part in (path.difference, path.variance, path.baseline, path.candidate)),
            path.equal[:LOOKED],
            path.n[:LOOKED],
        )
        alone = compare(value[:LOOKED], np.arange(LOOKED), arm[:LOOKED], scale=0.5).last()
        needed = outlook(early, alone, PLANNED.target_variance).needed
        if needed is not None and needed <= LOOKS:
            found.told += 1
            found.seen += bool(high[max(needed, LOOKED) - 1] < 0)
        there = np.flatnonzero((path.variance <= PLANNED.target_variance) & (path.equal >= EQUAL))
        if len(there):
            found.enough += 1
            found.seen_by_enough += bool(high[there[0]] < 0)
        same = compare(*users.draw(g, LOOKS, 0.0), scale=0.5)
        bounds = follow(same, mixing=PLANNED.mixing, alpha=PLANNED.alpha)
        found.false += bool(bounds.low[-1] > 0 or bounds.high[-1] < 0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiments", type=int, default=400)
    number = parser.parse_args().experiments
    for law, spread in (("zipf", 0.8), ("zipf", 1.1), ("log-normal", 1.0), ("log-normal", 1.5)):
        for users in (400, 1600):
            for alike in (0.0, 0.05, 0.12):
                found = measure(Users(law, spread, users, alike), number, 31)
                print(
                    f"{users} users, {law} {spread:g}, correlation {alike:g}: told in {found.told}, seen by then "
                    f"{rate(found.seen, max(found.told, 1))}; enough in {found.enough}, seen by then "
                    f"{rate(found.seen_by_enough, max(found.enough, 1))}; false alarms {rate(found.false, number)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
