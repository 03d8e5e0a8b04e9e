"""What a right answer is: the part of a case that every stage needs to score answers, kept as `task.json`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unshot.case import Metric, TaskSettings
from unshot.contracts.record import Record, RecordError
from unshot.data.rows import Example, read_text
from unshot.errors import InputError, OutsideError
from unshot.metrics.scores import INVALID, Interval, class_scores, parse_answer, score, score_interval

MAX_LABELS = 200


class Task(Record):
    """Instruction of the tuned model, labels and metric of the answer.

    `labels` None means free text, scored by exact match. `answer_field` names the field of a JSON answer that
    holds the label; None means that the answer is the label.
    """

    name: str = "case"
    instruction: str | None = None
    labels: list[str] | None = None
    answer_field: str | None = None
    metric: Metric = "exact_match"
    max_answer_tokens: int | None = None
    answer_schema: dict[str, Any] | None = None

    def label(self, answer: str) -> str:
        """The label (or the whole text) an answer states, `INVALID` where it states none."""
        return parse_answer(answer, labels=self.labels, field=self.answer_field)

    def scores(self, truth: Sequence[str], answers: Sequence[str], *, seed: int = 0) -> dict[str, Any]:
        """Score raw answers against raw references.

        Returns the metric with its interval, accuracy, macro-F1, the share of invalid answers and, with labels,
        the per-class scores.
        """
        true, guess = [self.label(t) for t in truth], [self.label(a) for a in answers]
        interval: Interval = score_interval(self.metric, true, guess, seed=seed)
        classes = self.labels or []
        return {
            "metric": self.metric,
            "score": interval.value,
            "low": interval.low,
            "high": interval.high,
            "accuracy": score("accuracy", true, guess),
            "macro_f1": score("macro_f1", true, guess) if classes else None,
            "invalid": guess.count(INVALID) / len(guess),
            "rows": len(true),
            "classes": {k: vars(v) for k, v in class_scores(true, guess, classes).items()}
            if classes
            else None,
        }


def derive_task(section: TaskSettings, examples: Sequence[Example]) -> Task:
    """Fill what the case leaves open from the data: a label field, the labels, the metric.

    A JSON answer's label field must be named; without one the whole answer is the label where few distinct
    answers recur, else free text. Raises `InputError` for answers outside the labels, naming the line.
    """
    answers = [example.answer or "" for example in examples]
    schema = read_schema(section.answer_schema) if section.answer_schema else None
    labels, metric = section.labels, section.metric
    field = section.answer_field
    if field is None and section.labels is None and all(isinstance(_json(a), dict) for a in answers):
        field = _label_field([_json(a) for a in answers])
    if labels is None:
        values = [parse_answer(a, field=field) for a in answers]
        counts = Counter(v for v in values if v != INVALID)
        if len(counts) <= min(MAX_LABELS, len(answers) // 2):
            labels = sorted(counts)
    if metric is None:
        metric = "macro_f1" if labels else "exact_match"
    task = Task(
        name=section.name, instruction=section.instruction, labels=labels, answer_field=field, metric=metric,
        answer_schema=schema,
    )  # fmt: skip
    fault = schema_check(schema) if schema else None
    for example in examples:
        where = example.where or f"line {example.line}"
        if fault and (problem := fault(_json(example.answer or ""))):
            raise InputError(f"{where}: the answer does not fit {section.answer_schema} ({problem})")
        if task.label(example.answer or "") == INVALID:
            known = f"; labels: {', '.join(labels[:8])}" if labels else ""
            raise InputError(
                f"{where}: the answer {example.answer!r:.80} is not a JSON object with a text "
                f"`{field}`{known}"
                if field
                else f"{where}: the answer {example.answer!r:.80} is not one of the labels{known}"
            )
    return task


def read_schema(path: Path) -> dict[str, Any]:
    """A JSON schema's content; `InputError` where the file holds none."""
    try:
        schema = json.loads(read_text(path))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(schema, dict):
        raise InputError(f"{path}: a JSON schema of an answer is an object")
    schema_check(schema, str(path))
    return schema


def schema_check(schema: dict[str, Any], where: str = "answer_schema") -> Callable[[Any], str | None]:
    """What is wrong with a value under a schema, in a few words; None for a value that fits. Nothing is fetched."""
    try:
        import jsonschema
    except ImportError as error:
        raise OutsideError(
            f"checking an answer_schema needs jsonschema ({error}); run `pip install 'unshot[tune]'`"
        ) from None
    kind = jsonschema.validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise InputError(f"{where}: not a JSON schema ({error.message})") from None
    validator = kind(schema)

    def problem(value: Any) -> str | None:
        found = jsonschema.exceptions.best_match(validator.iter_errors(value))
        return None if found is None else f"{found.json_path}: {found.message[:120]}"

    return problem


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _label_field(rows: list[dict[str, Any]]) -> str | None:
    """The field of all JSON answers with the fewest distinct texts that recur, None where none does."""
    best: tuple[int, str] | None = None
    for name in rows[0]:
        values = [row.get(name) for row in rows]
        if all(isinstance(v, str) for v in values):
            distinct = len(set(values))
            if distinct <= min(MAX_LABELS, len(rows) // 2) and (best is None or distinct < best[0]):
                best = (distinct, name)
    return best[1] if best else None


def read_task(path: Path) -> Task:
    """Read a `task.json`; `InputError` where it is not one."""
    try:
        return Task.from_json(read_text(path))
    except RecordError as error:
        raise InputError(f"{path}: not a task file ({error})") from None
