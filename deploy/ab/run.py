"""`unshot deploy ab` from log directory to verdict."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import numpy as np

from deploy.ab.outcomes import (
    ARMS,
    FAILURES,
    METRICS,
    QUALITY,
    ArmCounts,
    Described,
    Observed,
    by_assignment,
    by_pair,
    counts,
    crossed_units,
    describe,
    quality_by,
    sources,
    versions,
)
from deploy.ab.sequential import (
    BURN_IN,
    EQUAL,
    Design,
    compare_within,
    design,
    follow,
    outlook,
    paired,
)
from deploy.ab.sequential import (
    Path as Track,
)
from deploy.ab.sequential import (
    Sequence as Bounds,
)
from deploy.ab.strata import Mismatch, Strata, sample_ratio, stratify
from deploy.answers import LoggedRequest, choose, gather
from unshot.console import Output
from unshot.contracts.record import Record, RecordError
from unshot.contracts.request_log import Arm, Unreadable, read_feedback, read_requests
from unshot.contracts.task import Task
from unshot.data.files import write_text
from unshot.data.rows import read_text
from unshot.errors import InputError
from unshot.metrics.thresholds import AB_ERROR, AB_POWER

BETTER, NOT_WORSE, WORSE, OPEN = (
    "candidate better",
    "not worse within the margin",
    "baseline better",
    "keep going",
)
WITHHELD = "no verdict: sample ratio mismatch"
PLAN = "ab-plan.json"
# Times and costs are compared as ratios; their sequences are tightest for a change of 10%.
RATIO_EFFECT = math.log(1.1)
RATIO_SCALE = 0.05
POINTS = 300


class TestPlan(Record):
    """What must be fixed before the first look for the error rates to hold; kept beside the log."""

    __test__ = False

    alpha: float
    power: float
    margin: float
    effect: float
    design: str


@dataclass(frozen=True)
class Comparison:
    """One metric's analysis: what was observed, its path and its confidence sequence."""

    seen: Observed
    path: Track
    bounds: Bounds
    alpha: float
    design: Design


def ab_run(
    folder: Path,
    out: Output,
    *,
    margin: float,
    effect: float | None = None,
    alpha: float = AB_ERROR.value,
    power: float = AB_POWER.value,
    how: str = "auto",
    task: Task | None = None,
    by: Collection[str] = (),
    since: float | None = None,
    until: float | None = None,
) -> tuple[Report, dict[str, Comparison]]:
    """Analyse a log; the report and what its charts need. Raises `InputError` where nothing can be compared.

    `how` is `split` (units drawn into arms), `pairs` (shadowed requests), or `auto`: pairs where no unit was drawn
    into the candidate.
    """
    unreadable = Unreadable()
    asked = gather(read_requests(folder, unreadable, since=since, until=until))
    feedback = choose(read_feedback(folder, unreadable), by)
    if until is not None:
        feedback = {k: f for k, f in feedback.items() if f.time < until}
    table = counts(asked)
    how = pick(how, table, folder)
    plan = TestPlan(alpha, power, margin, effect or margin, how)
    changed = keep_plan(folder, plan)
    dropped = 0
    strata, mismatch = Strata([0] * len(asked), ["all"]), None
    if how == "pairs":
        seen, dropped = by_pair(asked, feedback, task)
    else:
        strata, mismatch = stratify(asked), sample_ratio(asked)
        seen = by_assignment(asked, feedback, task, strata.codes)
    seen[QUALITY.name] = replace(seen[QUALITY.name], metric=quality_by(task))
    analysed = {m.name: analyse(seen[m.name], plan, pairs=how == "pairs") for m in METRICS}
    verdict = judge(analysed, plan)
    if mismatch is not None and mismatch.found:
        verdict = {"verdict": WITHHELD, "reason": mismatch.sentence(), "decided_at": None}
    report: Report = {
        "log": str(folder),
        "plan": plan,
        "arms": table,
        "metrics": {name: one for name, c in analysed.items() if (one := facts(c, plan))},
        "feedback": sources(feedback, asked),
        "pairs_dropped": dropped,
        "stratified": strata.sentence(),
        "strata": strata.names,
        "sample_ratio_p": None if mismatch is None else mismatch.p,
        **verdict,
        "sample": sample(analysed[QUALITY.name], plan, pairs=how == "pairs"),
        "warnings": [],
    }
    report["warnings"] = warnings(report, asked, changed, mismatch)
    if skipped := unreadable.sentence():
        report["warnings"].append(skipped)
    for line in report["warnings"]:
        out.warn(line)
    return report, analysed


class Verdict(TypedDict):
    """The answer, why, and after how many answers with feedback it stood."""

    verdict: str
    reason: str
    decided_at: int | None


class MetricFacts(TypedDict):
    """One metric of both arms; `compared_as` is `ratio` or `difference`, bounds None where there is none yet."""

    title: str
    compared_as: str
    baseline: Described
    candidate: Described
    estimate: float | None
    low: float | None
    high: float | None
    p: float | None
    level: float
    verdict: str
    left_out: int


class Sample(TypedDict):
    """What the plan needs and what there is, estimated from what there is.

    `needed` is None where more answers of the same users hardly get there: it takes users who weigh as `users_needed`
    of equal size per arm then, and those seen weigh as `users`. `design_effect` is how many times the answers' variance
    is that of independent ones, None where no user has two.
    """

    unit: str
    seen: int
    needed: int | None
    users_needed: int
    users: float
    design_effect: float | None
    effect: float
    power: float


class Report(Verdict):
    """`ab.json`. `sample_ratio_p` is None where the log does not hold the share."""

    log: str
    plan: TestPlan
    arms: dict[Arm, ArmCounts]
    metrics: dict[str, MetricFacts]
    feedback: dict[str, int]
    pairs_dropped: int
    stratified: str | None
    strata: list[str]
    sample_ratio_p: float | None
    sample: Sample | None
    warnings: list[str]


def pick(how: str, table: Mapping[Arm, ArmCounts], folder: Path) -> str:
    """Which comparison the log allows; `InputError` where it holds only one arm."""
    if how == "auto":
        how = "split" if table["candidate"]["units"] else "pairs"
    if how == "split" and not (table["baseline"]["units"] and table["candidate"]["units"]):
        raise InputError(
            f"{folder}: units were drawn into one arm only ({table['baseline']['units']} baseline, "
            f"{table['candidate']['units']} candidate); split the traffic in `unshot deploy serve`"
        )
    if how == "pairs" and not any(t["shadowed"] for t in table.values()):
        raise InputError(
            f"{folder}: no second arm in the log; split the traffic or shadow it in `unshot deploy serve`"
        )
    return how


def keep_plan(folder: Path, plan: TestPlan) -> TestPlan | None:
    """Keep the first look's plan beside the log; return it where this look's differs."""
    path = folder / PLAN
    if not path.is_file():
        write_text(path, plan.to_json(indent=2) + "\n")
        return None
    try:
        first = TestPlan.from_json(read_text(path))
    except RecordError as error:
        raise InputError(f"{path}: {error}; it was changed by hand, delete it to plan anew") from None
    return first if first != plan else None


def analyse(seen: Observed, plan: TestPlan, *, pairs: bool) -> Comparison:
    """The confidence sequence of one metric. Quality has the whole error rate, the others share it once more."""
    main = seen.metric.name == QUALITY.name
    alpha = plan.alpha if main else plan.alpha / (len(METRICS) - 1)
    effect = plan.effect if seen.metric.kind == "share" else RATIO_EFFECT
    planned = design(effect, alpha=alpha, power=plan.power)
    path = followed(seen, seen.unit, pairs=pairs)
    return Comparison(seen, path, follow(path, mixing=planned.mixing, alpha=alpha), alpha, planned)


def followed(seen: Observed, unit: np.ndarray, *, pairs: bool, last: bool = False) -> Track:
    """The path of a metric with these units; `last`: one look, at the end."""
    share = seen.metric.kind == "share"
    if pairs:
        return paired(seen.value, unit, scale=1.0 if share else RATIO_SCALE)
    scale = 0.5 if share else RATIO_SCALE
    points = np.array([len(seen.value)]) if last else None
    return compare_within(seen.value, unit, seen.candidate, seen.stratum, scale=scale, points=points)


def facts(c: Comparison, plan: TestPlan) -> MetricFacts | None:
    """One metric for the report: both arms, the difference (or ratio) with its bounds, what it says. None: no data."""
    metric = c.seen.metric
    sides = {arm: describe(metric, values) for arm, values in c.seen.raw.items()}
    if not any(side["n"] for side in sides.values()):
        return None
    now = current(c)
    change = math.exp if metric.kind == "log" else float
    return {
        "title": metric.title,
        "compared_as": "ratio" if metric.kind == "log" else "difference",
        "baseline": sides["baseline"],
        "candidate": sides["candidate"],
        "estimate": change(now[0]) if now else None,
        "low": change(now[1]) if now and math.isfinite(now[1]) else None,
        "high": change(now[2]) if now and math.isfinite(now[2]) else None,
        "p": float(c.bounds.p[-1]) if len(c.bounds.p) else None,
        "level": 1 - c.alpha,
        "verdict": metric_verdict(c, plan.margin if metric.kind == "share" else 0.0),
        "left_out": c.seen.zeros,
    }


def current(c: Comparison) -> tuple[float, float, float] | None:
    """Estimate, low and high after the last observation, None before both arms have one.

    Bounds that excluded each other mean that the effect changed over time: the ones of the last look count then.
    """
    if not len(c.path.difference) or not math.isfinite(float(c.path.variance[-1])):
        return None
    low, high = float(c.bounds.low[-1]), float(c.bounds.high[-1])
    estimate = float(c.path.difference[-1])
    if low > high:
        last = follow(c.path.last(), mixing=c.design.mixing, alpha=c.alpha)
        low, high = float(last.low[0]), float(last.high[0])
    return estimate, low, high


def metric_verdict(c: Comparison, margin: float) -> str:
    """`better`, `not worse`, `worse` or `open` for the candidate, by what is good in this metric."""
    now = current(c)
    if now is None:
        return "open"
    low, high = (now[1], now[2]) if c.seen.metric.higher_is_better else (-now[2], -now[1])
    if low > 0:
        return "better"
    if margin and low > -margin:
        return "not worse"
    return "worse" if high < 0 else "open"


def judge(analysed: Mapping[str, Comparison], plan: TestPlan) -> Verdict:
    """Verdict and reason: quality decides; certainly more failures than the margin overrule it."""
    quality, failures = analysed[QUALITY.name], analysed[FAILURES.name]
    word = {"better": BETTER, "not worse": NOT_WORSE, "worse": WORSE, "open": OPEN}[
        metric_verdict(quality, plan.margin)
    ]
    now = current(quality)
    if now is None:
        reason = "no answers of both arms were called right or wrong"
    elif not math.isfinite(now[1]):
        reason = (
            f"{int(quality.path.baseline[-1])} and {int(quality.path.candidate[-1])} units with feedback, "
            f"which in one arm weigh as {quality.path.equal[-1]:.1f} of equal size; a look counts from {BURN_IN} per "
            f"arm on, and {EQUAL} of equal size"
        )
    else:
        reason = (
            f"{quality.seen.metric.title}, candidate minus baseline: {now[0]:+.3f} [{now[1]:+.3f}, {now[2]:+.3f}], "
            f"margin {plan.margin:g}"
        )
    broken = current(failures)
    if broken and broken[1] > plan.margin:
        word = WORSE
        reason = (
            f"the candidate fails more often by {broken[0]:.3f} [{broken[1]:.3f}, {broken[2]:.3f}]; {reason}"
        )
    decided = np.flatnonzero(
        (quality.bounds.low > -plan.margin) | (quality.bounds.high < 0) if word != OPEN else []
    )
    return {
        "verdict": word,
        "reason": reason,
        "decided_at": int(quality.path.n[decided[0]]) if len(decided) else None,
    }


def sample(c: Comparison, plan: TestPlan, *, pairs: bool) -> Sample | None:
    """How many answers with feedback the plan needs (`outlook`); None before the variance is known."""
    n = int(c.path.n[-1]) if len(c.path.n) else 0
    if not n or not math.isfinite(float(c.path.variance[-1])):
        return None
    alone = followed(c.seen, np.arange(n), pairs=pairs, last=True)
    ahead = outlook(c.path, alone, c.design.target_variance)
    return {
        "unit": "pairs" if pairs else "answers with feedback, both arms together",
        "seen": n,
        "needed": ahead.needed,
        "users_needed": ahead.users,
        "users": float(c.path.equal[-1]),
        "design_effect": ahead.design_effect,
        "effect": plan.effect,
        "power": plan.power,
    }


def warnings(
    report: Report, asked: Sequence[LoggedRequest], changed: TestPlan | None, mismatch: Mismatch | None
) -> list[str]:
    """What weakens the comparison, one sentence each."""
    found = []
    plan = report["plan"]
    if changed is not None:
        old, new = changed.plain(), plan.plain()
        names = ", ".join(f"{k} {old[k]} -> {v}" for k, v in new.items() if old[k] != v)
        found.append(
            f"the plan of the first look was another ({names}); a plan made after looking does not keep its error "
            f"rates, delete {PLAN} only for a new experiment"
        )
    if mismatch is not None and mismatch.found:
        found.append(mismatch.sentence())
    if plan.design == "split" and mismatch is None:
        found.append(
            "whether the arms got the units that the share asks for cannot be told: the log does not hold the share"
        )
    crossed = crossed_units(asked)
    if plan.design == "split" and crossed:
        found.append(
            f"{crossed} units were drawn into both arms, since the share was changed; {report['stratified']}"
            if report["stratified"]
            else f"{crossed} units were drawn into both arms at one share: the key does not stick to a user"
        )
    faults = [report["arms"][arm]["request_faults"] for arm in ARMS]
    if any(faults):
        found.append(
            f"{sum(faults)} requests failed for their own sake and count in no arm ({faults[0]} drawn to the baseline, "
            f"{faults[1]} to the candidate)"
        )
    for arm, several in versions(asked).items():
        if len(several) > 1:
            found.append(
                f"several versions answered as {arm} ({', '.join(several)}); --since starts with the last one"
            )
    if not report["feedback"]:
        found.append("no feedback on these requests; quality cannot be compared")
    if report["pairs_dropped"]:
        found.append(
            f"{report['pairs_dropped']} pairs are left out: called wrong without a correction, and the arms differ; "
            "that favours the arm that is shown"
        )
    arms = report["arms"]
    fallbacks = sum(a["fallbacks"] for a in arms.values())
    if plan.design == "split" and fallbacks:
        found.append(
            f"{fallbacks} requests were answered by the other arm after a failure; they count for the drawn arm"
        )
    return found


def track(c: Comparison) -> dict[str, list[float]]:
    """The confidence sequence over the observations for a chart, thinned to at most 300 points.

    The very first looks, whose bounds are more than eight times as wide as the last ones, would flatten the rest.
    """
    width = c.bounds.high - c.bounds.low
    ready = np.flatnonzero(np.isfinite(width))
    ready = ready[width[ready] <= 8 * max(width[ready[-1]], 1e-9)] if len(ready) else ready
    if len(ready) > POINTS:
        ready = ready[np.linspace(0, len(ready) - 1, POINTS).round().astype(int)]
    return {
        "n": c.path.n[ready].tolist(),
        "estimate": c.path.difference[ready].tolist(),
        "low": c.bounds.low[ready].tolist(),
        "high": c.bounds.high[ready].tolist(),
        "p": c.bounds.p[ready].tolist(),
        "time": c.seen.time[ready].tolist(),
    }
