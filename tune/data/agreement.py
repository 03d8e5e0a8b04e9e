"""How far annotators agree beyond chance: Cohen's and Fleiss' kappa, Krippendorff's alpha (nominal)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from unshot.contracts.record import Record


class Disputed(Record):
    """An input whose annotators disagree: its lines, the answers by annotator, the text cut at 200 characters."""

    lines: list[int]
    answers: dict[str, str]
    text: str


class SettleFirst(Record):
    """Disputed inputs, the most even splits first."""

    total: int
    listed: list[Disputed]


class AnnotatorAgreement(Record, kw_only=True):
    """Coefficients over items rated by two annotators or more; only `items` and `note` where there are none."""

    items: int
    note: str | None = None
    annotators: list[str] | None = None
    unanimous: float | None = None
    cohen_kappa: float | None = None
    fleiss_kappa: float | None = None
    fleiss_items: int | None = None
    fleiss_ratings: int | None = None
    krippendorff_alpha: float | None = None
    settle_first: SettleFirst | None = None


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> float:
    """Kappa of two annotators over the same items (Cohen 1960); nan where chance alone gives full agreement."""
    classes = {c: i for i, c in enumerate(sorted({*first, *second}))}
    table = np.zeros((len(classes), len(classes)))
    for a, b in zip(first, second, strict=True):
        table[classes[a], classes[b]] += 1
    table /= table.sum()
    expected = float(table.sum(axis=0) @ table.sum(axis=1))
    return (float(np.trace(table)) - expected) / (1 - expected) if expected < 1 else float("nan")


def fleiss_kappa(counts: np.ndarray) -> float:
    """Kappa of a table of shape `(items, classes)` whose rows have equal sums of at least 2 (Fleiss 1971)."""
    raters = counts[0].sum()
    observed = float((((counts**2).sum(axis=1) - raters) / (raters * (raters - 1))).mean())
    expected = float(((counts.sum(axis=0) / counts.sum()) ** 2).sum())
    return (observed - expected) / (1 - expected) if expected < 1 else float("nan")


def krippendorff_alpha(counts: np.ndarray) -> float:
    """Nominal alpha of a table of shape `(items, classes)`; items with one rating drop out.

    1 - observed / expected disagreement over the coincidence matrix (Krippendorff, "Computing Krippendorff's
    Alpha-Reliability", 2011).
    """
    counts = counts[counts.sum(axis=1) >= 2].astype(float)
    if not len(counts):
        return float("nan")
    ratings = counts.sum(axis=1)
    totals = counts.sum(axis=0)
    total = totals.sum()
    observed = float(((ratings**2 - (counts**2).sum(axis=1)) / (ratings - 1)).sum()) / total
    expected = float(total**2 - (totals**2).sum()) / (total * (total - 1))
    return 1 - observed / expected if expected > 0 else float("nan")


def agreement(ratings: Mapping[int, Mapping[str, str]]) -> AnnotatorAgreement | None:
    """Coefficients over items rated by two annotators or more; None where there are none.

    `ratings` maps an item to its annotators' answers. Fleiss' kappa takes the items with the most usual number
    of ratings; Cohen's stands where just two annotators share items.
    """
    shared = {item: given for item, given in ratings.items() if len(given) >= 2}
    if not shared:
        return None
    classes = {c: i for i, c in enumerate(sorted({v for given in shared.values() for v in given.values()}))}
    table = np.zeros((len(shared), len(classes)), dtype=np.int64)
    for row, given in enumerate(shared.values()):
        for value in given.values():
            table[row, classes[value]] += 1
    people = sorted({name for given in shared.values() for name in given})
    usual = Counter(table.sum(axis=1).tolist()).most_common(1)[0][0]
    regular = table[table.sum(axis=1) == usual]
    cohen = None
    if len(people) == 2:
        cohen = cohen_kappa(*([given[name] for given in shared.values()] for name in people))
    return AnnotatorAgreement(
        annotators=people,
        items=len(shared),
        unanimous=float((table.max(axis=1) == table.sum(axis=1)).mean()),
        cohen_kappa=cohen,
        fleiss_kappa=fleiss_kappa(regular),
        fleiss_items=len(regular),
        fleiss_ratings=int(usual),
        krippendorff_alpha=krippendorff_alpha(table),
    )


def settle_first(ratings: Mapping[int, Mapping[str, str]]) -> list[int]:
    """Items on which annotators disagree, the most even splits (highest entropy) and most ratings first."""

    def entropy(given: Mapping[str, str]) -> float:
        shares = np.array(list(Counter(given.values()).values())) / len(given)
        return float(-(shares * np.log2(shares)).sum())

    disputed = [item for item, given in ratings.items() if len(set(given.values())) > 1]
    return sorted(disputed, key=lambda item: (-entropy(ratings[item]), -len(ratings[item]), item))
