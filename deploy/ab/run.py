"""`unshot deploy ab` from log directory to verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.ab.outcomes import (
    FAILURES,
    METRICS,
    QUALITY,
    Observed,
    by_assignment,
    by_pair,
    counts,
    crossed_units,
    describe,
    sources,
    versions,
)
from deploy.ab.sequential import (
    BURN_IN,
    Design,
    compare,
    design,
    follow,
    paired,
)
from deploy.ab.sequential import (
    Path as Track,
)
from deploy.ab.sequential import (
    Sequence as Bounds,
)
from deploy.answers import Asked, choose, gather
from unshot.console import Output, dumps
from unshot.contracts.manifest import write_text
from unshot.contracts.request_log import read_feedback, read_requests
from unshot.contracts.task import Task
from unshot.errors import InputError
from unshot.metrics.thresholds import AB_ERROR, AB_POWER

BETTER, NOT_WORSE, WORSE, OPEN = (
    "candidate better",
    "not worse within the margin",
    "baseline better",
    "keep going",
)
PLAN = "ab-plan.json"
# Times and costs are compared as ratios; their sequences are tightest for a change of 10%.
RATIO_EFFECT = math.log(1.1)
RATIO_SCALE = 0.05
POINTS = 300


@dataclass(frozen=True)
class Plan:
    """What must be fixed before the first look for the error rates to hold."""

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
) -> tuple[dict[str, Any], dict[str, Comparison]]:
    """Analyse a log; the report and what its charts need. Raises `InputError` where nothing can be compared.

    `how` is `split` (units drawn into arms), `pairs` (shadowed requests), or `auto`: pairs where no unit was drawn
    into the candidate.
    """
    asked = gather(read_requests(folder, since=since, until=until))
    feedback = choose(read_feedback(folder), by)
    if until is not None:
        feedback = {k: f for k, f in feedback.items() if f.time < until}
    table = counts(asked)
    how = pick(how, table, folder)
    plan = Plan(alpha, power, margin, effect or margin, how)
    changed = keep_plan(folder, plan)
    dropped = 0
    if how == "pairs":
        seen, dropped = by_pair(asked, feedback, task)
    else:
        seen = by_assignment(asked, feedback, task)
    analysed = {m.name: analyse(seen[m.name], plan, pairs=how == "pairs") for m in METRICS}
    report: dict[str, Any] = {
        "log": str(folder),
        "plan": asdict(plan),
        "arms": table,
        "metrics": {name: one for name, c in analysed.items() if (one := facts(c, plan))},
        "feedback": sources(feedback, asked),
        "pairs_dropped": dropped,
    }
    report |= judge(analysed, plan)
    report["sample"] = sample(analysed[QUALITY.name], plan, pairs=how == "pairs")
    report["warnings"] = warnings(report, asked, changed)
    for line in report["warnings"]:
        out.warn(line)
    return report, analysed


def pick(how: str, table: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
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


def keep_plan(folder: Path, plan: Plan) -> dict[str, Any] | None:
    """Keep the first look's plan beside the log; return it where this look's differs."""
    path = folder / PLAN
    if not path.is_file():
        write_text(path, dumps(plan) + "\n")
        return None
    try:
        first = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path}: not valid JSON; it was changed by hand, delete it to plan anew") from None
    return first if first != asdict(plan) else None


def analyse(seen: Observed, plan: Plan, *, pairs: bool) -> Comparison:
    """The confidence sequence of one metric. Quality has the whole error rate, the others share it once more."""
    main = seen.metric is QUALITY
    alpha = plan.alpha if main else plan.alpha / (len(METRICS) - 1)
    effect = plan.effect if seen.metric.kind == "share" else RATIO_EFFECT
    planned = design(effect, alpha=alpha, power=plan.power)
    share = seen.metric.kind == "share"
    if pairs:
        path = paired(seen.value, seen.unit, scale=1.0 if share else RATIO_SCALE)
    else:
        path = compare(seen.value, seen.unit, seen.candidate, scale=0.5 if share else RATIO_SCALE)
    return Comparison(seen, path, follow(path, mixing=planned.mixing, alpha=alpha), alpha, planned)


def facts(c: Comparison, plan: Plan) -> dict[str, Any] | None:
    """One metric for the report: both arms, the difference (or ratio) with its bounds, what it says. None: no data."""
    metric = c.seen.metric
    sides = {arm: describe(metric, values) for arm, values in c.seen.raw.items()}
    if not any(side["n"] for side in sides.values()):
        return None
    now = current(c)
    change = math.exp if metric.kind == "log" else float
    return {
        "title": metric.title,
        "as": "ratio" if metric.kind == "log" else "difference",
        **sides,
        "estimate": change(now[0]) if now else None,
        "low": change(now[1]) if now and math.isfinite(now[1]) else None,
        "high": change(now[2]) if now and math.isfinite(now[2]) else None,
        "p": float(c.bounds.p[-1]) if len(c.bounds.p) else None,
        "level": 1 - c.alpha,
        "says": says(c, plan.margin if metric.kind == "share" else 0.0),
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
        last = follow(
            Track(
                *(
                    part[-1:]
                    for part in (c.path.difference, c.path.variance, c.path.baseline, c.path.candidate)
                )
            ),
            mixing=c.design.mixing,
            alpha=c.alpha,
        )
        low, high = float(last.low[0]), float(last.high[0])
    return estimate, low, high


def says(c: Comparison, margin: float) -> str:
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


def judge(analysed: Mapping[str, Comparison], plan: Plan) -> dict[str, Any]:
    """Verdict and reason: quality decides; certainly more failures than the margin overrule it."""
    quality, failures = analysed[QUALITY.name], analysed[FAILURES.name]
    word = {"better": BETTER, "not worse": NOT_WORSE, "worse": WORSE, "open": OPEN}[
        says(quality, plan.margin)
    ]
    now = current(quality)
    if now is None:
        reason = "no answers of both arms were called right or wrong"
    elif not math.isfinite(now[1]):
        reason = (
            f"{int(quality.path.baseline[-1])} and {int(quality.path.candidate[-1])} units with feedback; a look "
            f"counts from {BURN_IN} per arm on"
        )
    else:
        reason = (
            f"share right, candidate minus baseline: {now[0]:+.3f} [{now[1]:+.3f}, {now[2]:+.3f}], margin "
            f"{plan.margin:g}"
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
        "decided_at": int(decided[0]) + 1 if len(decided) else None,
    }


def sample(c: Comparison, plan: Plan, *, pairs: bool) -> dict[str, Any] | None:
    """How many answers with feedback the plan needs; None before the variance is known.

    The variance of the difference falls as 1/n: at n answers it is v, at n v / v* it is the planned v*.
    """
    n = len(c.path.variance)
    if not n or not math.isfinite(float(c.path.variance[-1])):
        return None
    needed = math.ceil(n * float(c.path.variance[-1]) / c.design.target_variance)
    return {
        "unit": "pairs" if pairs else "answers with feedback, both arms together",
        "seen": n,
        "needed": needed,
        "effect": plan.effect,
        "power": plan.power,
    }


def warnings(
    report: Mapping[str, Any], asked: Sequence[Asked], changed: Mapping[str, Any] | None
) -> list[str]:
    """What weakens the comparison, one sentence each."""
    found = []
    if changed is not None:
        now = report["plan"]
        names = ", ".join(f"{k} {changed.get(k)} -> {v}" for k, v in now.items() if changed.get(k) != v)
        found.append(
            f"the plan of the first look was another ({names}); a plan made after looking does not keep its error "
            f"rates, delete {PLAN} only for a new experiment"
        )
    crossed = crossed_units(asked)
    if report["plan"]["design"] == "split" and crossed:
        found.append(
            f"{crossed} units were drawn into both arms; the split was changed, --since starts after that"
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
    if report["plan"]["design"] == "split" and fallbacks:
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
        "n": (ready + 1).tolist(),
        "estimate": c.path.difference[ready].tolist(),
        "low": c.bounds.low[ready].tolist(),
        "high": c.bounds.high[ready].tolist(),
        "p": c.bounds.p[ready].tolist(),
        "time": c.seen.time[ready].tolist(),
    }
