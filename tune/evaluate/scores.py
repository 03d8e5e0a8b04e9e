"""Every score of a list of answers that fits the task, with intervals; and two lists against each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from unshot.contracts.evaluation import (
    Bertscore,
    ClassFigures,
    Comparison,
    Confusion,
    Difference,
    FieldFigures,
    Figures,
    JsonFigures,
)
from unshot.contracts.task import Task, schema_check
from unshot.metrics.answers import INVALID, Answers, field_table, json_type
from unshot.metrics.f1 import class_f1
from unshot.metrics.intervals import mcnemar, mean, paired_p, ratio_of_sums, share
from unshot.metrics.rouge import KINDS, rouge
from unshot.metrics.scores import (
    confusion,
    doubts,
    score_difference,
    score_interval,
)


def figures(task: Task, answers: Answers, *, embedder: Path | None = None, seed: int = 0) -> Figures:
    """All scores that fit the task. `embedder` is a directory, for BERTScore of free text."""
    found = score_interval(task.metric, answers, seed=seed)
    result = Figures(
        rows=len(answers),
        metric=task.metric,
        score=found,
        accuracy=mean(answers.right),
        exact_match=score_interval("exact_match", answers),
        invalid=answers.invalid,
        caution="; ".join([*doubts(answers), *([found.caution] if found.caution else [])]) or None,
    )
    if task.labels:
        result.macro_f1 = score_interval("macro_f1", answers, seed=seed)
        result.classes = classes(answers)
        table = confusion(answers.truth, answers.guess, task.labels)
        result.confusion = Confusion(list(task.labels), [*task.labels, INVALID], table.tolist())
    if answers.objects:
        result.json = _json(task, answers)
    elif not task.labels:
        each = [rouge(t, a) for t, a in zip(answers.references, answers.texts, strict=True)]
        result.rouge = {kind: mean(np.array([r[kind] for r in each])) for kind in KINDS}
        if embedder is not None:
            result.bertscore = _bertscore(embedder, answers)
    return result


def classes(answers: Answers) -> dict[str, ClassFigures]:
    """Precision, recall, F1 with intervals, and support, of each label; 0 within [0, 1] if there is none to count."""
    table = confusion(answers.truth, answers.guess, answers.classes)
    found = {}
    for i, label in enumerate(answers.classes):
        hits, rows, columns = int(table[i, i]), int(table[i].sum()), int(table[:, i].sum())
        found[label] = ClassFigures(
            precision=share(hits, columns) if columns else class_f1(0, 0),
            recall=share(hits, rows) if rows else class_f1(0, 0),
            f1=class_f1(hits, rows + columns - 2 * hits),
            support=rows,
        )
    return found


def _json(task: Task, answers: Answers) -> JsonFigures:
    """Scores of JSON answers.

    `schema` is the share of answers that fit the task's answer_schema (without one: that have all fields of the
    reference in the same JSON types). A field counts as found if its value equals the reference's.
    """
    fault = schema_check(task.answer_schema) if task.answer_schema else None
    valid = np.array([g is not None for g in answers.given_objects], dtype=float)
    fits = np.array(
        [
            g is not None
            and (
                fault(text) is None
                if fault
                else all(k in g and json_type(g[k]) is json_type(v) for k, v in t.items())
            )
            for t, g, text in zip(answers.objects, answers.given_objects, answers.texts, strict=True)
        ],
        dtype=float,
    )
    tables = {name: field_table(answers, name) for name in answers.fields}
    return JsonFigures(
        valid=mean(valid),
        schema=mean(fits),
        fields={name: _field(table) for name, table in tables.items() if table[:, 1].any()},
        micro=_field(sum(tables.values(), np.zeros((len(answers), 3)))),
    )


def _field(table: np.ndarray) -> FieldFigures:
    equal, has, says = table.sum(axis=0)
    return FieldFigures(
        precision=float(equal / says) if says else 0.0,
        recall=float(equal / has) if has else 0.0,
        f1=ratio_of_sums(np.stack([2 * table[:, 0], table[:, 1] + table[:, 2]], axis=1)),
    )


def _bertscore(path: Path, answers: Answers) -> Bertscore:
    from unshot.engines.embedder import Embedder
    from unshot.metrics.bertscore import bertscore

    embedder = Embedder(path)
    values = bertscore(embedder, answers.references, answers.texts)
    means = {kind: mean(np.clip(each, 0, 1)) for kind, each in values.items()}
    return Bertscore(embedder=embedder.name, layer=embedder.layers, **means)


def compare(task: Task, first: Answers, second: Answers) -> Comparison:
    """Second minus first on the same rows: McNemar's test, and paired intervals of the metric and of accuracy."""
    only_first = int(((first.right == 1) & (second.right == 0)).sum())
    only_second = int(((first.right == 0) & (second.right == 1)).sum())
    return Comparison(
        rows=len(first),
        only_first_right=only_first,
        only_second_right=only_second,
        mcnemar_p=mcnemar(only_first, only_second),
        score=_difference(task.metric, first, second),
        accuracy=_difference("accuracy", first, second),
        macro_f1=_difference("macro_f1", first, second) if task.labels else None,
    )


def _difference(name: str, first: Answers, second: Answers) -> Difference:
    found = score_difference(name, first, second)
    return Difference(found, paired_p(found))
