"""ROUGE-1, -2 and -L F-measures (Lin 2004), equal to the package rouge-score without stemming."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

KINDS = ("rouge1", "rouge2", "rougeL")


def words(text: str) -> list[str]:
    """Lower-case runs of a-z and 0-9, as rouge-score cuts them: other scripts have no words here."""
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge(truth: str, answer: str) -> dict[str, float]:
    """F1 of shared words, of shared word pairs, and of the longest common subsequence."""
    a, b = words(truth), words(answer)
    return {
        "rouge1": _ngram(a, b, 1),
        "rouge2": _ngram(a, b, 2),
        "rougeL": _f1(_common(a, b), len(a), len(b)),
    }


def rouge_l(truth: str, answer: str) -> float:
    """ROUGE-L alone."""
    a, b = words(truth), words(answer)
    return _f1(_common(a, b), len(a), len(b))


def _ngram(a: Sequence[str], b: Sequence[str], n: int) -> float:
    one, other = (Counter(tuple(w[i : i + n]) for i in range(len(w) - n + 1)) for w in (a, b))
    return _f1((one & other).total(), one.total(), other.total())


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        last = 0
        for j, other in enumerate(b, start=1):
            above = row[j]
            row[j] = last + 1 if word == other else max(above, row[j - 1])
            last = above
    return row[-1]


def _f1(shared: int, truth: int, answer: int) -> float:
    return 2 * shared / (truth + answer) if shared else 0.0
