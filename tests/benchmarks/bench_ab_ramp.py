"""How often `deploy ab` sees a difference where there is none, on whole logs: ramps, seasons, heavy users, lost lines.

    python -m tests.benchmarks.bench_ab_ramp [--experiments 1000] [--requests 2000] [--worlds ramp season ...]

Each experiment is a log in memory that goes the way of the command: gathered, stratified, analysed, judged, at every
look. Both arms are equally right, equally slow and fail equally often; the traffic becomes harder, slower and more
fragile while the candidate's share is raised. A false alarm is a quality sequence that excludes zero at any look; the
verdict's and the other metrics' are counted beside it. Power: the share of logs in which a planned difference was seen
by the time at which the report says that there are answers enough.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from deploy.ab.outcomes import FAILURES, METRICS, QUALITY, by_assignment
from deploy.ab.run import BETTER, WORSE, TestPlan, analyse, judge
from deploy.ab.strata import sample_ratio, stratify
from deploy.answers import LoggedRequest, gather
from unshot.contracts.request_log import Arm, Feedback, Request

SHARES = (0.1, 0.5, 0.9)
# Of the two times one is enough: here TTFT is a fixed part of the end to end time.
COMPARED = tuple(metric for metric in METRICS if metric.name not in ("e2e", "cost"))
PLAN = TestPlan(0.05, 0.8, 0.02, 0.1, "split")


@dataclass(frozen=True)
class World:
    """Traffic. `ramp`: the share is raised while it becomes harder; `heavy`: few users ask most, each with a skill of
    their own; `season`: days of hard and easy hours; `lost`: lines and feedback missing at random and in gaps."""

    ramp: bool = False
    heavy: bool = False
    season: bool = False
    lost: bool = False
    gap: float = 0.0

    def log(self, g: np.random.Generator, n: int) -> tuple[list[LoggedRequest], Mapping[str, Feedback]]:
        """A log of about `n` requests."""
        users = max(20, n // (20 if self.heavy else 2))
        weight = g.pareto(1.5, users) + 1 if self.heavy else np.ones(users)
        user = g.choice(users, size=n, p=weight / weight.sum())
        phase = np.arange(n) * len(SHARES) // n if self.ramp else np.ones(n, dtype=int)
        share = np.array(SHARES)[phase]
        candidate = g.random(users)[user] < share
        hard = (np.array([0.9, 0.75, 0.55])[phase] if self.ramp else np.full(n, 0.75)) + self.gap * candidate
        skill = g.normal(0, 0.15, users)[user] if self.heavy else np.zeros(n)
        wave = 0.12 * np.sin(np.arange(n) / n * 2 * np.pi * 7) if self.season else np.zeros(n)
        right = g.random(n) < np.clip(hard + skill + wave, 0.02, 0.98)
        slow = np.exp(g.normal(0, 0.4, n) - 2 * wave - skill + 0.3 * phase)
        fails = g.random(n) < np.clip(0.03 + 0.03 * phase - 0.1 * wave, 0.005, 0.5)
        there = np.ones(n, dtype=bool)
        told = np.ones(n, dtype=bool)
        if self.lost:
            there, told = g.random(n) > 0.05, g.random(n) > 0.3
            for start in g.integers(n, size=3):
                there[start : start + n // 100] = False
        lines, feedback = [], {}
        for i in np.flatnonzero(there):
            arm: Arm = "candidate" if candidate[i] else "baseline"
            time = 1e9 + 60.0 * float(i)
            lines.append(
                Request(f"r{i}", time, arm, arm, f"u{user[i]}", arm, share=float(share[i]), label="a",
                        error="timeout" if fails[i] else None, ttft_s=float(slow[i]) / 3, e2e_s=float(slow[i]))
            )  # fmt: skip
            if told[i] and not fails[i]:
                feedback[f"r{i}"] = Feedback(f"r{i}", time + 30, correct=bool(right[i]), by="reviewer")
        return gather(lines), feedback


def seen_in(world: World, g: np.random.Generator, n: int) -> dict[str, bool]:
    """What one log's analysis says."""
    asked, feedback = world.log(g, n)
    seen = by_assignment(asked, feedback, None, stratify(asked).codes)
    found = {m.name: analyse(seen[m.name], PLAN, pairs=False) for m in COMPARED}
    mismatch = sample_ratio(asked)
    verdict = judge(found, PLAN)["verdict"]
    quality = found[QUALITY.name]
    excludes = {
        name: bool(len(c.path.n) and (c.bounds.low[-1] > 0 or c.bounds.high[-1] < 0))
        for name, c in found.items()
    }
    enough = np.flatnonzero(quality.path.variance <= quality.design.target_variance)
    by_then = bool(len(enough)) and bool(
        quality.bounds.high[enough[0]] < 0 or quality.bounds.low[enough[0]] > 0
    )
    return {
        "quality": excludes[QUALITY.name],
        "verdict": verdict in (BETTER, WORSE),
        "others": any(v for k, v in excludes.items() if k != QUALITY.name),
        FAILURES.name: excludes[FAILURES.name],
        "mismatch": mismatch is not None and mismatch.found,
        "enough": bool(len(enough)),
        "found by then": by_then,
    }


def rate(count: int, total: int) -> str:
    """A share with its exact 95% interval."""
    if not total:
        return "none"
    interval = stats.binomtest(count, total).proportion_ci(method="exact")
    return f"{count}/{total} = {count / total:.1%} [{interval.low:.1%}, {interval.high:.1%}]"


WORLDS = {
    "steady": World(),
    "ramp": World(ramp=True),
    "season": World(season=True),
    "heavy users": World(heavy=True),
    "lost lines": World(lost=True),
    "all together": World(True, True, True, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiments", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--power-experiments", type=int, default=200)
    parser.add_argument("--worlds", nargs="*", choices=[*WORLDS], default=[*WORLDS])
    given = parser.parse_args()
    for number, (name, world) in enumerate(WORLDS.items()):
        if name not in given.worlds:
            continue
        runs = [
            seen_in(world, np.random.default_rng([21, number, k]), given.requests)
            for k in range(given.experiments)
        ]
        shown = (f"{key} {rate(sum(r[key] for r in runs), len(runs))}"
                 for key in ("quality", "verdict", "others", "mismatch"))  # fmt: skip
        print(f"{name}: " + "; ".join(shown), flush=True)
    if not given.power_experiments:
        return
    for name, world in (("steady", World(gap=-0.1)), ("ramp", World(ramp=True, gap=-0.1)),
                        ("all together", World(True, True, True, True, gap=-0.1))):  # fmt: skip
        runs = [
            seen_in(world, np.random.default_rng([22, k]), 4 * given.requests)
            for k in range(given.power_experiments)
        ]
        ready = [r for r in runs if r["enough"]]
        print(
            f"power for 0.1, planned 80%, {name}: {rate(sum(r['found by then'] for r in ready), len(ready))} of the "
            f"{len(ready)}/{len(runs)} logs that had answers enough",
            flush=True,
        )


if __name__ == "__main__":
    main()
