"""From requests to what is compared: one value per request and metric, under the arm that the unit was drawn into."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NotRequired, TypedDict

import numpy as np

from deploy.answers import LoggedRequest, grade, is_graded, right, said, same, truth
from unshot.contracts.request_log import Arm, Feedback, Request
from unshot.contracts.task import Task

Kind = Literal["share", "log"]
ARMS: tuple[Arm, Arm] = ("baseline", "candidate")


@dataclass(frozen=True)
class Metric:
    """What is compared. A `share` is compared as a difference, a `log` (of positive values) as a ratio."""

    name: str
    title: str
    kind: Kind
    higher_is_better: bool = False


QUALITY = Metric("quality", "share right", "share", higher_is_better=True)
FAILURES = Metric("failures", "share failed", "share")
TTFT = Metric("ttft", "TTFT", "log")
E2E = Metric("e2e", "end to end", "log")
COST = Metric("cost", "cost", "log")


def quality_by(task: Task | None) -> Metric:
    """Quality under the task's metric: its mean if answers are scored by degrees, else the share right."""
    return replace(QUALITY, title=f"mean {task.metric}") if task is not None and is_graded(task) else QUALITY


METRICS = (QUALITY, FAILURES, TTFT, E2E, COST)


@dataclass(frozen=True)
class Observed:
    """Values of one metric in the order in which they became known, all arrays of shape `(observations,)`.

    `value` is a share's 0 or 1 or a logarithm; of pairs the candidate's minus the baseline's. `time` is in seconds
    since 1970. `raw` holds both arms' values as they were, for the description.
    """

    metric: Metric
    value: np.ndarray
    unit: np.ndarray
    candidate: np.ndarray
    # Which part of the traffic, within which the arms are compared (`strata`).
    stratum: np.ndarray
    time: np.ndarray
    raw: dict[str, np.ndarray]
    zeros: int = 0


def by_assignment(
    asked: Sequence[LoggedRequest],
    feedback: Mapping[str, Feedback],
    task: Task | None,
    strata: Sequence[int] | None = None,
) -> dict[str, Observed]:
    """One value per request, under the assigned arm whoever answered (intention to treat).

    `strata` holds the part of each request, None: all of one. Requests that failed for their own sake are left out.
    """
    found = {}
    parts = strata if strata is not None else [0] * len(asked)
    for metric in METRICS:
        rows = []
        for one, part in zip(asked, parts, strict=True):
            value = None if one.request_fault else _shown(metric, one, feedback.get(one.id), task)
            if value is not None:
                known = _known(metric, one, feedback)
                rows.append((known, one.unit, one.assigned == "candidate", value, part))
        found[metric.name] = _observed(metric, rows)
    return found


def by_pair(
    asked: Sequence[LoggedRequest], feedback: Mapping[str, Feedback], task: Task | None
) -> tuple[dict[str, Observed], int]:
    """One pair per request that both arms answered; and how many pairs were dropped for want of a known right answer.

    An answer called wrong without a correction tells of the other arm only where both said the same.
    """
    found, dropped = {}, 0
    for metric in METRICS:
        rows = []
        for one in asked:
            if not one.shadows or one.request_fault or any(r.request_fault for r in one.shadows):
                continue
            pair = _pair(metric, one, feedback.get(one.id), task)
            if pair is not None:
                rows.append((_known(metric, one, feedback), one.unit, *pair))
            elif (
                metric is QUALITY
                and one.id in feedback
                and one.answer("baseline")
                and one.answer("candidate")
            ):
                dropped += 1
        found[metric.name] = _observed_pairs(metric, rows)
    return found, dropped


def _known(metric: Metric, one: LoggedRequest, feedback: Mapping[str, Feedback]) -> float:
    return feedback[one.id].time if metric is QUALITY else one.time


def _shown(metric: Metric, one: LoggedRequest, feedback: Feedback | None, task: Task | None) -> float | None:
    if metric is QUALITY:
        if feedback is None:
            return None
        score = grade(one.shown.answer if one.shown else None, feedback.correction, task)
        if score is not None:
            return score
        verdict = right(one, feedback, task)
        return None if verdict is None else float(verdict)
    if metric is FAILURES:
        return float(one.failed)
    if metric is COST:
        # What a failed try cost is paid as well.
        costs = [r.cost_usd for r in one.tries if r.cost_usd is not None]
        return sum(costs) if costs else None
    return _time(metric, one.shown)


def _time(metric: Metric, line: Request | None) -> float | None:
    if line is None:
        return None
    return line.ttft_s if metric is TTFT else line.e2e_s


def _pair(
    metric: Metric, one: LoggedRequest, feedback: Feedback | None, task: Task | None
) -> tuple[float, float] | None:
    """Baseline's and candidate's value of one request."""
    if metric is FAILURES:
        lines = (*one.tries, *one.shadows)
        both = [[r for r in lines if r.arm == arm] for arm in ("baseline", "candidate")]
        if not all(both):
            return None
        bad = [float(any(r.error is not None or r.schema_ok is False for r in side)) for side in both]
        return bad[0], bad[1]
    baseline, candidate = one.answer("baseline"), one.answer("candidate")
    if baseline is None or candidate is None:
        return None
    if metric is QUALITY:
        return _both_right(one, feedback, baseline, candidate, task) if feedback else None
    if metric is COST:
        costs = baseline.cost_usd, candidate.cost_usd
    else:
        costs = _time(metric, baseline), _time(metric, candidate)
    return None if costs[0] is None or costs[1] is None else (costs[0], costs[1])


def _both_right(
    one: LoggedRequest, feedback: Feedback, baseline: Request, candidate: Request, task: Task | None
) -> tuple[float, float] | None:
    scores = [grade(r.answer, feedback.correction, task) for r in (baseline, candidate)]
    if scores[0] is not None and scores[1] is not None:
        return scores[0], scores[1]
    answers = [said(r, task) for r in (baseline, candidate)]
    if answers[0] is None or answers[1] is None:
        return None
    known = truth(one, feedback, task)
    if known is not None:
        both = [float(a is not None and same(a, known, task)) for a in answers]
        return both[0], both[1]
    if feedback.correct is False and same(answers[0], answers[1], task):
        return 0.0, 0.0
    return None


def _observed(metric: Metric, rows: list[tuple[float, str, bool, float, int]]) -> Observed:
    rows.sort(key=lambda r: r[0])
    raw = np.array([r[3] for r in rows])
    candidate = np.array([r[2] for r in rows], dtype=bool)
    sides = {"baseline": raw[~candidate], "candidate": raw[candidate]}
    keep = raw > 0 if metric.kind == "log" else np.ones(len(raw), dtype=bool)
    value = np.log(raw[keep]) if metric.kind == "log" else raw
    codes = _codes([r[1] for r in rows])
    times = np.array([r[0] for r in rows])
    parts = np.array([r[4] for r in rows], dtype=int)
    return Observed(
        metric, value, codes[keep], candidate[keep], parts[keep], times[keep], sides, int((~keep).sum())
    )


def _observed_pairs(metric: Metric, rows: list[tuple[float, str, float, float]]) -> Observed:
    rows.sort(key=lambda r: r[0])
    raw = np.array([r[2:] for r in rows]).reshape(-1, 2)
    sides = {"baseline": raw[:, 0], "candidate": raw[:, 1]}
    keep = (raw > 0).all(axis=1) if metric.kind == "log" else np.ones(len(raw), dtype=bool)
    change: Callable[[np.ndarray], np.ndarray] = np.log if metric.kind == "log" else np.asarray
    value = change(raw[keep, 1]) - change(raw[keep, 0])
    times = np.array([r[0] for r in rows])
    everyone = np.ones(int(keep.sum()), dtype=bool)
    codes = _codes([r[1] for r in rows])
    one_part = np.zeros(len(everyone), dtype=int)
    return Observed(metric, value, codes[keep], everyone, one_part, times[keep], sides, int((~keep).sum()))


def _codes(units: Sequence[str]) -> np.ndarray:
    known: dict[str, int] = {}
    return np.array([known.setdefault(u, len(known)) for u in units], dtype=int)


class ArmCounts(TypedDict):
    """What an arm was asked: requests and units drawn into it, and what became of them."""

    requests: int
    units: int
    fallbacks: int
    unanswered: int
    shadowed: int
    request_faults: int


def counts(asked: Sequence[LoggedRequest]) -> dict[Arm, ArmCounts]:
    """Requests, units, fallbacks and errors by assigned arm."""
    table: dict[Arm, ArmCounts] = {}
    for arm in ARMS:
        mine = [one for one in asked if one.assigned == arm]
        table[arm] = {
            "requests": len(mine),
            "units": len({one.unit for one in mine}),
            "fallbacks": sum(one.fell_back for one in mine),
            "unanswered": sum(one.shown is None for one in mine),
            "shadowed": sum(bool(one.shadows) for one in mine),
            "request_faults": sum(one.request_fault for one in mine),
        }
    return table


def crossed_units(asked: Sequence[LoggedRequest]) -> int:
    """Units that were drawn into both arms: the split changed, or the key did not stick."""
    arms: dict[str, set[str]] = {}
    for one in asked:
        arms.setdefault(one.unit, set()).add(one.assigned)
    return sum(len(a) > 1 for a in arms.values())


def versions(asked: Sequence[LoggedRequest]) -> dict[str, list[str]]:
    """The versions that answered behind each arm, in the order of their first request."""
    found: dict[str, dict[str, None]] = {"baseline": {}, "candidate": {}}
    for one in asked:
        for line in (*one.tries, *one.shadows):
            found[line.arm][line.version] = None
    return {arm: list(names) for arm, names in found.items()}


def sources(feedback: Mapping[str, Feedback], asked: Sequence[LoggedRequest]) -> dict[str, int]:
    """Feedback on these requests by who gave it."""
    ids = {one.id for one in asked}
    return dict(Counter(f.by for k, f in feedback.items() if k in ids))


class Described(TypedDict):
    """One arm's values of a metric: count and mean; of times percentiles and the geometric mean too."""

    n: int
    mean: float | None
    p50: NotRequired[float]
    p95: NotRequired[float]
    geometric_mean: NotRequired[float | None]


def describe(metric: Metric, values: np.ndarray) -> Described:
    """Count and mean (and percentiles, of times) of one arm's values."""
    if not len(values):
        return {"n": 0, "mean": None}
    result: Described = {"n": len(values), "mean": float(values.mean())}
    if metric.kind == "log":
        p50, p95 = np.quantile(values, [0.5, 0.95])
        positive = values[values > 0]
        result["p50"], result["p95"] = float(p50), float(p95)
        result["geometric_mean"] = math.exp(float(np.log(positive).mean())) if len(positive) else None
    return result
