"""Scores of answers under the registry's metrics: value, interval, paired difference, and what a metric cannot tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from unshot.contracts.record import Record
from unshot.errors import InputError
from unshot.metrics import f1, intervals
from unshot.metrics.answers import Answers
from unshot.metrics.intervals import LEVEL, Interval
from unshot.metrics.registry import metric as find_metric

# Rows on which a constant answer is scored, evenly spaced: ROUGE of each constant with thousands takes too long.
FLOOR_ROWS = 300


class ClassScores(Record):
    """Precision, recall, F1 and support of one class."""

    precision: float
    recall: float
    f1: float
    support: int


class Scores(Record, kw_only=True):
    """The task's metric with its interval, and what is told beside it. `macro_f1` and `classes`: only with labels."""

    metric: str
    score: float
    low: float
    high: float
    level: float = LEVEL
    # How the interval was drawn.
    method: str = ""
    rows: int
    # Share of right rows, and of answers that state nothing that the task knows.
    accuracy: float
    macro_f1: float | None = None
    invalid: float
    classes: dict[str, ClassScores] | None = None
    # Why the metric cannot tell by these answers (one class, one answer to all, no more than a constant answer scores),
    # and that the rows are few; None: no.
    cannot_tell: str | None = None
    caution: str | None = None


def value_of_rows(name: str, rows: np.ndarray, classes: int) -> float:
    """The score of some rows' figures, as `Metric.of` gives them; `classes` is the number of classes."""
    return _value(find_metric(name).form, rows, classes)


def value_of(name: str, answers: Answers) -> float:
    """The score alone."""
    found = find_metric(name)
    return _value(found.form, found.of(answers), len(answers.classes) if found.form == "macro_f1" else 0)


def score(
    name: str,
    references: Sequence[str],
    given: Sequence[str | None],
    *,
    labels: Sequence[str] | None = None,
    field: str | None = None,
) -> float:
    """The score of answers under a metric, 0 to 1. Raises `InputError` for an unknown metric."""
    return value_of(name, Answers(list(references), list(given), list(labels) if labels else None, field))


def score_interval(name: str, answers: Answers, *, level: float = LEVEL, seed: int = 0) -> Interval:
    """The score with its confidence interval, drawn as the metric's form asks for."""
    found = find_metric(name)
    rows = found.of(answers)
    if found.form == "ratio":
        return intervals.ratio_of_sums(rows, level=level)
    if found.form == "macro_f1":
        return f1.macro_f1(rows[:, 0], rows[:, 1], len(answers.classes), level=level, seed=seed)
    return intervals.mean(rows, level=level)


def score_difference(name: str, first: Answers, second: Answers, *, level: float = LEVEL) -> Interval:
    """Second minus first under a metric, on the same rows."""
    found = find_metric(name)
    one, other = found.of(first), found.of(second)
    if found.form == "mean":
        unscored = np.isnan(one) | np.isnan(other)
        each = np.where(unscored, 0.0, other - one)
        difference = float(each[~unscored].mean()) if not unscored.all() else 0.0
        return intervals.paired(difference, each, level=level, unscored=int(unscored.sum()))
    if found.form == "ratio":
        each = intervals.influence_of_sums(other) - intervals.influence_of_sums(one)
        difference = _value(found.form, other) - _value(found.form, one)
        return intervals.paired(difference, each, level=level)
    size = len(first.classes)
    each = f1.influence_of_macro_f1(other[:, 0], other[:, 1], size)
    each -= f1.influence_of_macro_f1(one[:, 0], one[:, 1], size)
    difference = _value(found.form, other, size) - _value(found.form, one, size)
    counts = np.bincount(one[:, 0], minlength=size)
    counts = counts[counts > 0]
    # What one row of a class moves the score by, in rows: the mean square over the rows.
    jump = float(np.sqrt(len(first) / len(counts) ** 2 * (1 / counts).sum()))
    same = np.where(one[:, 1] == other[:, 1], 0.0, 1.0)
    return intervals.paired(difference, each, level=level, jump=jump, equal=1 - float(same.mean()))


def _value(form: str, rows: np.ndarray, size: int = 0) -> float:
    if form == "macro_f1":
        confusion = np.zeros((size, size + 1))
        np.add.at(confusion, (rows[:, 0], rows[:, 1]), 1)
        support = confusion.sum(axis=1)
        return float(f1.f1(np.diag(confusion), support, confusion.sum(axis=0)[:size])[support > 0].mean())
    if form == "ratio":
        part, whole = rows.sum(axis=0)
        return float(part / whole) if whole else 0.0
    known = rows[~np.isnan(rows)]
    return float(known.mean()) if len(known) else 0.0


def all_scores(name: str, answers: Answers, *, seed: int = 0) -> Scores:
    """The metric with its interval, accuracy, share of invalid answers and, with labels, the scores by class."""
    found = score_interval(name, answers, seed=seed)
    labelled = answers.labels is not None
    problems = doubts(answers)
    if not problems and (least := floor(name, answers)) > 0 and found.low <= least + 1e-9:
        problems = [f"it is not shown to be above the {least:.3f} that a constant answer scores"]
    return Scores(
        metric=name,
        score=found.value,
        low=found.low,
        high=found.high,
        method=found.method,
        rows=len(answers),
        accuracy=float(answers.right.mean()),
        macro_f1=value_of("macro_f1", answers) if labelled else None,
        invalid=answers.invalid,
        classes=class_scores(answers.truth, answers.guess, answers.classes) if labelled else None,
        cannot_tell="; ".join(problems) or None,
        caution=found.caution or None,
    )


def doubts(answers: Answers) -> list[str]:
    """Why no metric can tell a good system by these answers: one reference for all rows, one answer for all rows."""
    found = []
    if len(answers) > 1 and len(set(answers.truth)) == 1:
        found.append(f"every reference is {answers.truth[0]!r:.60}, so that a constant answer is right")
    texts = set(answers.guess if answers.labels is not None else answers.texts)
    if len(answers) > 1 and len(texts) == 1:
        found.append(f"every answer is {next(iter(texts))!r:.60}, whatever was asked")
    return found


def floor(name: str, answers: Answers) -> float:
    """The best score of a constant answer: what can be had without reading the question; 0 where it is not tried."""
    found = find_metric(name)
    if not found.constants:
        return 0.0
    if found.form == "mean" and len(answers) > FLOOR_ROWS:
        answers = answers.subset(np.linspace(0, len(answers) - 1, FLOOR_ROWS).astype(int).tolist())
    if found.form == "macro_f1":
        constants = Counter(answers.truth)
        texts = [
            answers.references[answers.truth.index(label)]
            for label, _ in constants.most_common(found.constants)
        ]
    else:
        texts = [text for text, _ in Counter(answers.references).most_common(found.constants)]
    return max(value_of(name, answers.with_answers([text] * len(answers))) for text in texts)


def confusion(truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Counts, shape `(len(labels), len(labels) + 1)`: rows truth, columns prediction, last column anything else."""
    index = {label: i for i, label in enumerate(labels)}
    table = np.zeros((len(labels), len(labels) + 1), dtype=np.int64)
    for true, guess in zip(truth, predicted, strict=True):
        if true not in index:
            raise InputError(f"the reference {true!r:.80} is none of the labels")
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
    own = f1.f1(hits, rows, columns)
    return {
        label: ClassScores(float(precision[i]), float(recall[i]), float(own[i]), int(rows[i]))
        for i, label in enumerate(labels)
    }
