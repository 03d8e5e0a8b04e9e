"""The quality gate of the report: both sides' scores on the same rows, and `unshot.metrics.quality`'s verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from unshot.contracts.task import Task
from unshot.metrics import quality
from unshot.metrics.quality import FAILED, PASSED, Verdict
from unshot.metrics.scores import Scores, all_scores

UNDECIDED = quality.INCONCLUSIVE
__all__ = ["FAILED", "PASSED", "UNDECIDED", "Quality", "judge"]


class Bounds(TypedDict):
    """A figure with its interval."""

    value: float
    low: float
    high: float
    level: float


class Quality(TypedDict):
    """The report's `quality`; shares are by side."""

    metric: str
    rows: int
    baseline: dict[str, object]
    candidate: dict[str, object]
    correct_share: dict[str, float]
    right_only: dict[str, int]
    difference: Bounds
    lower_bound: float
    margin: float
    gate: Verdict
    why: str


def judge(
    task: Task,
    truth: Sequence[str],
    baseline: Sequence[str | None],
    candidate: Sequence[str | None],
    *,
    margin: float,
    requests: Sequence[str] | None = None,
    seed: int = 0,
) -> Quality:
    """Scores of both sides and the gate; an unanswered request (None) is a wrong answer."""
    first = task.answers(truth, baseline, requests=requests)
    second = task.answers(truth, candidate, requests=requests)
    found = quality.compare(task.metric, first, second, margin, seed=seed)
    scores: dict[str, Scores] = {
        "baseline": all_scores(task.metric, first, seed=seed),
        "candidate": all_scores(task.metric, second, seed=seed),
    }
    d = found.difference
    return {
        "metric": task.metric,
        "rows": len(truth),
        "baseline": scores["baseline"].plain(),
        "candidate": scores["candidate"].plain(),
        "correct_share": {"baseline": float(first.right.mean()), "candidate": float(second.right.mean())},
        "right_only": {
            "baseline": int(((first.right == 1) & (second.right == 0)).sum()),
            "candidate": int(((second.right == 1) & (first.right == 0)).sum()),
        },
        "difference": {"value": d.value, "low": d.low, "high": d.high, "level": d.level},
        "lower_bound": found.lower_bound,
        "margin": margin,
        "gate": found.verdict,
        "why": found.why,
    }
