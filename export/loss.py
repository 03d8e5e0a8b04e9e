"""How much of the task's score a quantisation loses, paired row by row, and what few rows cannot tell. numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unshot.metrics.scores import bootstrap, score

LEVEL = 0.95
TAIL = (1 - LEVEL) / 2


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


def paired_loss(
    metric: str, truth: Sequence[str], reference: Sequence[str], export: Sequence[str], *, draws: int = 2000
) -> Loss:
    """The loss with a paired, stratified bootstrap (Efron and Tibshirani 1993, ch. 13).

    A bootstrap of rows that are nearly all equal is too narrow (all equal: no width at all). So the upper end is
    never below the exact bound (Clopper and Pearson 1934) on the share of rows that break, less those that mended.
    """
    true, old, new = (np.asarray(v, dtype=object) for v in (truth, reference, export))

    def difference(rows: np.ndarray) -> float:
        picked = true[rows].tolist()
        return score(metric, picked, old[rows].tolist()) - score(metric, picked, new[rows].tolist())

    found = bootstrap(difference, len(true), draws=draws, level=LEVEL, strata=list(true))
    broken = int(sum((old == true) & (new != true)))
    mended = int(sum((old != true) & (new == true)))
    bound = upper_share(broken, len(true)) - mended / len(true)
    everything = np.arange(len(true))
    first = score(metric, true.tolist(), old.tolist())
    return Loss(
        first, first - difference(everything), found.value, found.low, max(found.high, bound), broken, mended,
        len(true),
    )  # fmt: skip


def upper_share(hits: int, rows: int, tail: float = TAIL) -> float:
    """The largest share at which `hits` or fewer of `rows` would still be seen with probability `tail`."""
    if hits >= rows:
        return 1.0
    low, high = hits / rows, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _at_most(hits, rows, middle) > tail:
            low = middle
        else:
            high = middle
    return high


def _at_most(hits: int, rows: int, share: float) -> float:
    """Probability of `hits` or fewer successes (binomial), in logarithms so that many rows do not overflow."""
    if share <= 0:
        return 1.0
    if share >= 1:
        return 0.0
    whole = math.lgamma(rows + 1)
    return math.fsum(
        math.exp(
            whole - math.lgamma(k + 1) - math.lgamma(rows - k + 1)
            + k * math.log(share) + (rows - k) * math.log1p(-share)
        )
        for k in range(hits + 1)
    )  # fmt: skip


def rows_needed(loss: float, tail: float = TAIL) -> int:
    """Rows that would show a loss of at most `loss`, were none of them to break: `1 - tail^(1/n) <= loss`."""
    return math.ceil(math.log(tail) / math.log1p(-loss))
