"""The quality gate: both sides' scores on the same rows, and whether the candidate is not worse beyond the margin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unshot.contracts.task import Task
from unshot.errors import InputError
from unshot.metrics.intervals import paired_score_difference

PASSED, FAILED, UNDECIDED = "passed", "failed", "inconclusive"


def judge(
    task: Task,
    truth: Sequence[str],
    baseline: Sequence[str],
    candidate: Sequence[str],
    *,
    margin: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of both sides and the gate.

    Non-inferiority at one-sided 95%: the gate passes where the lower bound of candidate minus baseline is above
    `-margin`, fails where it does not pass and the candidate's score is lower by more than `margin`, or where the
    whole interval is below `-margin`; else the rows are too few to tell.
    """
    if not truth:
        raise InputError("no rows with an answer; the quality gate needs labelled rows")
    sides = {
        "baseline": task.scores(truth, baseline, seed=seed),
        "candidate": task.scores(truth, candidate, seed=seed),
    }
    labels = [[task.label(text) for text in texts] for texts in (truth, baseline, candidate)]
    # Two-sided 90% bounds are the one-sided 95% bounds of the test.
    difference = paired_score_difference(task.metric, *labels, level=0.90, seed=seed)
    wide = paired_score_difference(task.metric, *labels, level=0.95, seed=seed)
    if difference.low >= -margin:
        gate = PASSED
    elif difference.value < -margin:
        gate = FAILED
    else:
        gate = UNDECIDED
    correct = {
        side: sum(t == g for t, g in zip(labels[0], guesses, strict=True)) / len(truth)
        for side, guesses in zip(sides, labels[1:], strict=True)
    }
    only = {
        "baseline": sum(t == b != c for t, b, c in zip(*labels, strict=True)),
        "candidate": sum(t == c != b for t, b, c in zip(*labels, strict=True)),
    }
    return {
        "metric": task.metric,
        "rows": len(truth),
        **sides,
        "correct_share": correct,
        "right_only": only,
        "difference": {"value": wide.value, "low": wide.low, "high": wide.high, "level": 0.95},
        "lower_bound": difference.low,
        "margin": margin,
        "gate": gate,
    }
