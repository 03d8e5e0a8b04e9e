"""Scores of answers against references, with bootstrap confidence intervals. numpy only."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unshot.metrics.intervals import Interval

INVALID = "(invalid)"


def parse_answer(text: str, *, labels: Sequence[str] | None = None, field: str | None = None) -> str:
    """The label an answer states, or `INVALID`.

    With `field` the answer must be a JSON object (a Markdown fence around it is forgiven) and the label is that
    field's value; else it is the stripped text. With `labels` anything else is `INVALID`; case is forgiven.
    """
    value: Any = text.strip()
    if field is not None:
        fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", value, flags=re.DOTALL)
        try:
            loaded = json.loads(fenced[1] if fenced else value)
        except ValueError:
            return INVALID
        if not isinstance(loaded, dict) or not isinstance(loaded.get(field), str):
            return INVALID
        value = loaded[field].strip()
    if labels is None:
        return value or INVALID
    for label in labels:
        if value.casefold() == label.casefold():
            return label
    return INVALID


@dataclass(frozen=True)
class ClassScores:
    """Precision, recall, F1 and support of one class."""

    precision: float
    recall: float
    f1: float
    support: int


def confusion(truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Counts, shape `(len(labels), len(labels) + 1)`: rows truth, columns prediction, last column anything else."""
    index = {label: i for i, label in enumerate(labels)}
    table = np.zeros((len(labels), len(labels) + 1), dtype=np.int64)
    for true, guess in zip(truth, predicted, strict=True):
        table[index[true], index.get(guess, len(labels))] += 1
    return table


def class_scores(
    truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]
) -> dict[str, ClassScores]:
    """Per-class scores; a zero denominator scores 0, as scikit-learn's `zero_division=0`."""
    table = confusion(truth, predicted, labels)
    hits, rows, columns = np.diag(table), table.sum(axis=1), table[:, :-1].sum(axis=0)
    precision = np.divide(hits, columns, out=np.zeros(len(labels)), where=columns > 0)
    recall = np.divide(hits, rows, out=np.zeros(len(labels)), where=rows > 0)
    total = precision + recall
    f1 = np.divide(2 * precision * recall, total, out=np.zeros(len(labels)), where=total > 0)
    return {
        label: ClassScores(float(precision[i]), float(recall[i]), float(f1[i]), int(rows[i]))
        for i, label in enumerate(labels)
    }


def macro_f1(truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str] | None = None) -> float:
    """Unweighted mean F1 over `labels` (default: the classes that occur in `truth`)."""
    names = list(labels) if labels is not None else sorted(set(truth))
    return float(np.mean([s.f1 for s in class_scores(truth, predicted, names).values()]))


def accuracy(truth: Sequence[str], predicted: Sequence[str]) -> float:
    """Share of equal pairs."""
    return float(np.mean([t == p for t, p in zip(truth, predicted, strict=True)]))


def score(metric: str, truth: Sequence[str], predicted: Sequence[str]) -> float:
    """The case's metric, 0 to 1."""
    if metric == "macro_f1":
        return macro_f1(truth, predicted)
    return accuracy(truth, predicted)


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    rows: int,
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    strata: Sequence[Any] | None = None,
) -> Interval:
    """Percentile bootstrap over row indices (Efron and Tibshirani 1993, ch. 13).

    `statistic` takes an int array of row indices, shape `(rows,)`. `strata` resamples within groups, so that a
    class of a stratified test set never drops out of a draw.
    """
    generator = np.random.default_rng(seed)
    everything = np.arange(rows)
    if strata is None:
        groups = [everything]
    else:
        keys = np.asarray([str(s) for s in strata])
        groups = [everything[keys == key] for key in np.unique(keys)]
    values = np.empty(draws)
    for draw in range(draws):
        values[draw] = statistic(np.concatenate([generator.choice(g, len(g)) for g in groups]))
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(statistic(everything), float(low), float(high), level)


def score_interval(
    metric: str, truth: Sequence[str], predicted: Sequence[str], *, draws: int = 2000, seed: int = 0
) -> Interval:
    """`score` with a stratified bootstrap interval."""
    true, guess = np.asarray(truth, dtype=object), np.asarray(predicted, dtype=object)
    return bootstrap(
        lambda rows: score(metric, true[rows].tolist(), guess[rows].tolist()),
        len(true),
        draws=draws,
        seed=seed,
        strata=list(true),
    )
