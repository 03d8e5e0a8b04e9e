"""The quality gate of the report: both sides' scores on the same rows, and `unshot.metrics.quality`'s verdict."""

from __future__ import annotations

from collections.abc import Sequence

from unshot.contracts.report import Difference, Quality
from unshot.contracts.task import Task
from unshot.metrics import quality
from unshot.metrics.quality import FAILED, PASSED
from unshot.metrics.scores import all_scores

UNDECIDED = quality.INCONCLUSIVE
__all__ = ["FAILED", "PASSED", "UNDECIDED", "judge"]


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
    d = found.difference
    return Quality(
        metric=task.metric,
        rows=len(truth),
        baseline=all_scores(task.metric, first, seed=seed),
        candidate=all_scores(task.metric, second, seed=seed),
        correct_share={"baseline": float(first.right.mean()), "candidate": float(second.right.mean())},
        right_only={
            "baseline": int(((first.right == 1) & (second.right == 0)).sum()),
            "candidate": int(((second.right == 1) & (first.right == 0)).sum()),
        },
        unanswered={
            "baseline": sum(answer is None for answer in baseline),
            "candidate": sum(answer is None for answer in candidate),
        },
        difference=Difference(d.value, d.low, d.high, d.level),
        lower_bound=found.lower_bound,
        margin=margin,
        gate=found.verdict,
        why=found.why,
    )
