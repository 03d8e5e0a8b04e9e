"""Every score of a list of answers, with bootstrap intervals; and two lists against each other."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unshot.contracts.task import Task, schema_check
from unshot.metrics.rouge import KINDS, rouge
from unshot.metrics.scores import INVALID, Interval, accuracy, class_scores, confusion, macro_f1

DRAWS = 2000


def draws(strata: Sequence[Any], *, count: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Row indices resampled within each stratum, int32 of shape `(count, rows)`."""
    generator = np.random.default_rng(seed)
    keys = np.asarray([str(s) for s in strata])
    parts = []
    for key in np.unique(keys):
        own = np.flatnonzero(keys == key).astype(np.int32)
        parts.append(own[generator.integers(len(own), size=(count, len(own)))])
    return np.concatenate(parts, axis=1)


def interval(values: np.ndarray, point: float, level: float = 0.95) -> Interval:
    """Percentile interval of resampled values (Efron and Tibshirani 1993, ch. 13)."""
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(point, float(low), float(high), level)


def mean_interval(per_row: np.ndarray, chosen: np.ndarray) -> Interval:
    """The mean over rows, with its interval."""
    return interval(per_row[chosen].mean(axis=1), float(per_row.mean()))


class Answers:
    """One system's answers to the rows of a test, scored under a task. `chosen` are the draws of `draws`."""

    def __init__(self, task: Task, truth: Sequence[str], answers: Sequence[str], *, seed: int = 0) -> None:
        self.task, self.raw_truth, self.raw = task, list(truth), list(answers)
        self.truth, self.guess = [task.label(t) for t in truth], [task.label(a) for a in answers]
        self.chosen = draws(self.truth if task.labels else [""] * len(self.truth), seed=seed)
        self.right = np.array([t == g for t, g in zip(self.truth, self.guess, strict=True)], dtype=float)

    def report(self) -> dict[str, Any]:
        """All scores that fit the task: each an `Interval`, or a table."""
        exact = np.array([t.strip() == a.strip() for t, a in zip(self.raw_truth, self.raw, strict=True)])
        result: dict[str, Any] = {
            "rows": len(self.truth),
            "metric": self.task.metric,
            "score": self.metric(),
            "accuracy": mean_interval(self.right, self.chosen),
            "exact_match": mean_interval(exact.astype(float), self.chosen),
            "invalid": self.guess.count(INVALID) / len(self.guess),
        }
        if self.task.labels:
            result["macro_f1"] = self.macro()
            result["classes"] = self.classes()
            names = [*self.task.labels, INVALID]
            table = confusion(self.truth, self.guess, self.task.labels)
            result["confusion"] = {"rows": self.task.labels, "columns": names, "counts": table.tolist()}
        if fields := self.fields():
            result["json"] = fields
        if not self.task.labels and not fields:
            each = [rouge(t, a) for t, a in zip(self.raw_truth, self.raw, strict=True)]
            result["rouge"] = {
                kind: mean_interval(np.array([r[kind] for r in each]), self.chosen) for kind in KINDS
            }
        return result

    def bertscore(self, path: Path) -> dict[str, Any]:
        """BERTScore with the embedder in a directory: its mean precision, recall and F1 with intervals."""
        from unshot.engines.embedder import Embedder
        from unshot.metrics.bertscore import bertscore

        embedder = Embedder(path)
        values = bertscore(embedder, self.raw_truth, self.raw)
        means = {kind: mean_interval(each, self.chosen) for kind, each in values.items()}
        return {"embedder": embedder.name, "layer": embedder.layers, **means}

    def metric(self) -> Interval:
        """The task's own metric."""
        return self.macro() if self.task.metric == "macro_f1" else mean_interval(self.right, self.chosen)

    def macro(self) -> Interval:
        """Macro-F1 over the classes that occur among the references."""
        return interval(self.macro_draws(), macro_f1(self.truth, self.guess))

    def macro_draws(self) -> np.ndarray:
        """Macro-F1 of each draw, shape `(draws,)`. Draws are stratified, so that every class is in each."""
        _, _, f1 = self._resampled(sorted(set(self.truth)))
        return f1.mean(axis=1)

    def classes(self) -> dict[str, Any]:
        """Precision, recall, F1 with intervals, and support, of each label; a zero denominator scores 0."""
        labels = self.task.labels or []
        points = class_scores(self.truth, self.guess, labels)
        resampled = dict(zip(("precision", "recall", "f1"), self._resampled(labels), strict=True))
        return {
            label: {
                **{
                    name: interval(values[:, i], getattr(points[label], name))
                    for name, values in resampled.items()
                },
                "support": points[label].support,
            }
            for i, label in enumerate(labels)
        }

    def _resampled(self, labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Precision, recall, F1 of each draw and label, three arrays of shape `(draws, labels)`."""
        code = {label: i for i, label in enumerate(labels)}
        size = len(labels)
        true = np.array([code[t] for t in self.truth])
        guess = np.array([code.get(g, size) for g in self.guess])
        hit = np.where(true == guess, true, size)
        rows, columns, hits = (_counts(values, self.chosen, size) for values in (true, guess, hit))
        zero = np.zeros_like(hits)
        return (
            np.divide(hits, columns, out=zero.copy(), where=columns > 0),
            np.divide(hits, rows, out=zero.copy(), where=rows > 0),
            np.divide(2 * hits, rows + columns, out=zero.copy(), where=rows + columns > 0),
        )

    def fields(self) -> dict[str, Any] | None:
        """Scores of JSON answers, None where the references are no JSON objects.

        `valid` is the share of answers that are JSON objects, `schema` the share that fit the task's answer_schema
        (without one: that have all fields of the reference in the same JSON types). A field counts as found where its
        value equals the reference's.
        """
        truth = [json_object(t) for t in self.raw_truth]
        if not all(t is not None for t in truth):
            return None
        given = [json_object(a) for a in self.raw]
        fault = schema_check(self.task.answer_schema) if self.task.answer_schema else None
        valid = np.array([g is not None for g in given], dtype=float)
        fits = np.array(
            [
                g is not None and fault(g) is None
                if fault
                else g is not None and all(k in g and _type(g[k]) is _type(v) for k, v in (t or {}).items())
                for t, g in zip(truth, given, strict=True)
            ],
            dtype=float,
        )
        names = sorted({k for t in truth for k in t or {}} | {k for g in given for k in g or {}})
        each: dict[str, Any] = {}
        sums = np.zeros((3, len(truth)))
        for name in names:
            has = np.array([name in (t or {}) for t in truth], dtype=float)
            says = np.array([name in (g or {}) for g in given], dtype=float)
            equal = np.array(
                [
                    name in (t or {}) and name in (g or {}) and _same((t or {})[name], (g or {})[name])
                    for t, g in zip(truth, given, strict=True)
                ],
                dtype=float,
            )
            if has.any():
                each[name] = self._field_scores(np.stack([equal, has, says]))
            sums += np.stack([equal, has, says])
        return {
            "valid": mean_interval(valid, self.chosen),
            "schema": mean_interval(fits, self.chosen),
            "fields": each,
            "micro": self._field_scores(sums),
        }

    def _field_scores(self, table: np.ndarray) -> dict[str, Any]:
        equal, has, says = table.sum(axis=1)
        drawn = table[:, self.chosen].sum(axis=2)
        total = drawn[1] + drawn[2]
        values = np.divide(2 * drawn[0], total, out=np.zeros(len(total)), where=total > 0)
        return {
            "precision": float(equal / says) if says else 0.0,
            "recall": float(equal / has) if has else 0.0,
            "f1": interval(values, float(2 * equal / (has + says))),
        }


def compare(first: Answers, second: Answers) -> dict[str, Any]:
    """Second minus first on the same rows: McNemar's test, and the paired bootstrap of accuracy and the metric.

    `p_bootstrap` is two-sided: twice the smaller share of draws on one side of 0, at least 1 / draws.
    """
    only_first = int(((first.right == 1) & (second.right == 0)).sum())
    only_second = int(((first.right == 0) & (second.right == 1)).sum())
    result: dict[str, Any] = {
        "rows": len(first.right),
        "only_first_right": only_first,
        "only_second_right": only_second,
        "mcnemar_p": mcnemar(only_first, only_second),
    }
    by_name: dict[str, tuple[np.ndarray, float]] = {
        "accuracy": (
            (second.right - first.right)[first.chosen].mean(axis=1),
            accuracy(second.truth, second.guess) - accuracy(first.truth, first.guess),
        )
    }
    if first.task.labels:
        by_name["macro_f1"] = (
            second.macro_draws() - first.macro_draws(),
            macro_f1(second.truth, second.guess) - macro_f1(first.truth, first.guess),
        )
    for name, (values, point) in by_name.items():
        side = min(float((values <= 0).mean()), float((values >= 0).mean()))
        result[name] = {
            "difference": interval(values, point),
            "p_bootstrap": min(1.0, max(2 * side, 1 / len(values))),
        }
    return result


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar test: a binomial test of the discordant pairs at 1/2 (McNemar 1947)."""
    total = only_first + only_second
    if total == 0:
        return 1.0
    half = -total * math.log(2)
    tail = math.fsum(
        math.exp(math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) + half)
        for k in range(min(only_first, only_second) + 1)
    )
    return min(1.0, 2 * tail)


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object a text is (a Markdown fence around it is forgiven), else None."""
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text.strip(), flags=re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _counts(values: np.ndarray, chosen: np.ndarray, size: int) -> np.ndarray:
    """How often each code below `size` is drawn, shape `(draws, size)`."""
    flat: np.ndarray = np.apply_along_axis(np.bincount, 1, values[chosen], minlength=size + 1)
    return flat[:, :size].astype(float)


def _type(value: Any) -> type:
    return float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, str) and isinstance(b, str):
        return a.strip() == b.strip()
    return _type(a) is _type(b) and bool(a == b)
