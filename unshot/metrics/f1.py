"""Macro-F1 and the F1 of classes: values, intervals, and what each row adds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from unshot.metrics.intervals import LEVEL, Interval, bounded, share

DRAWS = 1000
# Rows' worth of the overall accuracy that a class's own is drawn towards.
SHRINK = 4.0


def macro_f1(
    truth: np.ndarray,
    guess: np.ndarray,
    labels: int,
    *,
    level: float = LEVEL,
    seed: int = 0,
    draws: int = DRAWS,
) -> Interval:
    """Macro-F1 over the classes that occur in `truth`: codes 0 to `labels` - 1, in `guess` also `labels` (invalid).

    A smoothed, parametric bootstrap within classes (Efron and Tibshirani 1993, ch. 6.5): test sets are drawn from the
    confusion table with each class's accuracy drawn towards the overall one and each class's errors towards all
    labels, so that a class with one row has a spread. They give the variance and the bias of F1 from few rows a class;
    the bounds are those of `bounded` around the value less its bias. If labels occur in no row, the interval also
    covers the value if they hold the share of the population that Good and Turing estimate (Good 1953).
    """
    # Fewer draws of many rows, whose spread is small anyway.
    draws = min(draws, max(200, 20_000_000 // len(truth)))
    rows = np.bincount(truth, minlength=labels)
    present = rows > 0
    confusion = np.zeros((labels, labels + 1))
    np.add.at(confusion, (truth, guess), 1)
    value = float(f1(np.diag(confusion), rows, confusion.sum(axis=0)[:labels])[present].mean())
    chances = _smoothed(confusion, rows)
    drawn = _drawn_f1(truth, chances, rows, draws, np.random.default_rng(seed))[:, present].mean(axis=1)
    prevalences = [rows / len(truth)]
    unseen = labels - int(present.sum())
    if unseen:
        missing = min((rows == 1).sum() / len(truth), unseen / (unseen + 1))
        prevalences.append(np.where(present, prevalences[0] * (1 - missing), missing / unseen))
    found = []
    for prevalence in prevalences:
        hits = prevalence * np.diag(chances)
        truly = f1(hits, prevalence, (prevalence[:, None] * chances).sum(axis=0)[:labels])[present].mean()
        centre = value - float(drawn.mean() - truly)
        found.append(bounded(centre, float(drawn.var()), len(truth), level=level, method=""))
    low, high = min(f.low for f in found), max(f.high for f in found)
    return Interval(
        value, min(low, value), max(high, value), level, "smoothed bootstrap within classes", len(truth)
    )


def f1(hits: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """F1 of classes from their right answers, rows and answers; 0 for a class with neither."""
    total = rows + columns
    found: np.ndarray = np.divide(2 * hits, total, out=np.zeros(np.shape(total)), where=total > 0)
    return found


def _smoothed(confusion: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The chance of each answer given the class, shape `(labels, labels + 1)`."""
    labels, hits = len(rows), np.diag(confusion)
    overall = (hits.sum() + 0.5) / (rows.sum() + 1)
    accuracy = (hits + SHRINK * overall) / (rows + SHRINK)
    errors = confusion.copy()
    np.fill_diagonal(errors, 0)
    weight = max(1.0, labels / 4)
    anywhere = (errors.sum(axis=0) + weight / (labels + 1)) / (errors.sum() + weight)
    errors += anywhere
    np.fill_diagonal(errors, 0)
    chances: np.ndarray = errors / errors.sum(axis=1, keepdims=True) * (1 - accuracy)[:, None]
    np.fill_diagonal(chances, accuracy)
    return chances


def _drawn_f1(
    truth: np.ndarray, chances: np.ndarray, rows: np.ndarray, draws: int, generator: np.random.Generator
) -> np.ndarray:
    """F1 of each class in test sets drawn with the same classes, shape `(draws, labels)`."""
    labels = len(rows)
    cumulative = np.cumsum(chances, axis=1)
    # One sorted array for all classes: class c lies in [c, c + 1).
    flat = (cumulative / cumulative[:, -1:] + np.arange(labels)[:, None]).ravel()
    hits, columns = np.zeros((draws, labels)), np.zeros((draws, labels + 1))
    # In parts, so that a large test set does not fill the memory.
    step = max(1, 4_000_000 // max(len(truth), 1))
    for begin in range(0, draws, step):
        count = min(step, draws - begin)
        spot = truth + generator.random((count, len(truth))) * (1 - 1e-9)
        answer = np.minimum(np.searchsorted(flat, spot, side="right") - truth * (labels + 1), labels)
        place = np.arange(count)[:, None]
        columns[begin : begin + count] = np.bincount(
            (place * (labels + 1) + answer).ravel(), minlength=count * (labels + 1)
        ).reshape(count, labels + 1)
        hits[begin : begin + count] = np.bincount(
            (place * labels + truth)[answer == truth], minlength=count * labels
        ).reshape(count, labels)
    return f1(hits, rows, columns[:, :labels])


def influence_of_macro_f1(truth: np.ndarray, guess: np.ndarray, labels: int) -> np.ndarray:
    """What each row adds to macro-F1, to first order, shape `(rows,)`, mean 0.

    F1 of a class is 2 hits / (rows + answers): a row adds (2 hit - F1 (in the class) - F1 (answered so)) / (their sum)
    (Takahashi et al. 2022, Applied Intelligence 52, 4961-4972).
    """
    rows = np.bincount(truth, minlength=labels + 1)
    columns = np.bincount(guess, minlength=labels + 1)
    hits = np.bincount(truth[truth == guess], minlength=labels + 1)
    present = rows[:labels] > 0
    own = np.append(np.where(present, f1(hits, rows, columns)[:labels], 0.0), 0.0)
    weight = np.append(
        np.divide(1.0, rows + columns, out=np.zeros(labels + 1), where=rows + columns > 0)[:labels] * present,
        0.0,
    )
    hit = (truth == guess).astype(float)
    each: np.ndarray = weight[truth] * (2 * hit - own[truth]) - weight[guess] * own[guess]
    return each * len(truth) / max(int(present.sum()), 1)


def class_f1(hits: int, others: int, *, level: float = LEVEL) -> Interval:
    """F1 of one class with `others` misses and false alarms together: a rising function of the share of hits in them.

    F1 = 2 J / (1 + J) with J = hits / (hits + others).
    """
    if not hits + others:
        return Interval(0.0, 0.0, 1.0, level, "no rows", 0)
    jaccard = share(hits, hits + others, level=level)
    value, low, high = (2 * j / (1 + j) for j in (jaccard.value, jaccard.low, jaccard.high))
    return replace(jaccard, value=value, low=low, high=high)
