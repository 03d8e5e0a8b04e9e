"""How much of the task's score a quantisation loses, paired row by row, and what few rows cannot tell."""

from __future__ import annotations

from dataclasses import dataclass

from unshot.metrics.answers import Answers
from unshot.metrics.scores import score_difference, value_of


@dataclass(frozen=True)
class Loss:
    """Score of the evaluated model less that of the export on the same rows, with its 95% interval.

    `broken` rows went from right to wrong, `mended` from wrong to right, of `rows`.
    """

    reference: float
    score: float
    loss: float
    low: float
    high: float
    broken: int
    mended: int
    rows: int


def paired_loss(metric: str, reference: Answers, export: Answers) -> Loss:
    """The loss by the paired interval of `unshot.metrics.intervals.paired`, which no few equal rows make certain."""
    found = score_difference(metric, reference, export)
    return Loss(
        reference=value_of(metric, reference),
        score=value_of(metric, export),
        loss=-found.value,
        low=-found.high,
        high=-found.low,
        broken=int(((reference.right == 1) & (export.right == 0)).sum()),
        mended=int(((reference.right == 0) & (export.right == 1)).sum()),
        rows=len(reference),
    )
