"""Answers read under a task: the label, the JSON object or the text that each states."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from unshot.data.example import normal
from unshot.errors import InputError

if TYPE_CHECKING:
    from unshot.metrics.judge import Judge

INVALID = "(invalid)"
# A decoded JSON object: values of any JSON type.
JsonObject = dict[str, Any]


def find_label(text: str, labels: Iterable[str]) -> str:
    """The label that a text is, `INVALID` if it is none.

    An exact match comes first; case is forgiven only if one label alone fits, so that `US` and `us` stay two.
    Composed and decomposed forms of a letter are one.
    """
    wanted = normal(text)
    known = {normal(label): label for label in labels}
    if wanted in known:
        return known[wanted]
    folded = [label for form, label in known.items() if form.casefold() == wanted.casefold()]
    return folded[0] if len(folded) == 1 else INVALID


def parse_answer(text: str, *, labels: Sequence[str] | None = None, field: str | None = None) -> str:
    """The label an answer states, or `INVALID`.

    With `field` the answer must be a JSON object (a Markdown fence around it is forgiven) and the label is that
    field's value; else it is the text. With `labels` anything else is `INVALID`.
    """
    value: str = text
    if field is not None:
        loaded = json_object(text)
        if loaded is None or not isinstance(loaded.get(field), str):
            return INVALID
        value = loaded[field]
    if labels is None:
        return normal(value) or INVALID
    return find_label(value, labels)


def json_value(text: str) -> Any:
    """The JSON value a text is (a Markdown fence around it is forgiven). Raises `ValueError` if it is none."""
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text.strip(), flags=re.DOTALL)
    try:
        return json.loads(fenced[1] if fenced else text)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def json_object(text: str) -> JsonObject | None:
    """The JSON object a text is (a Markdown fence around it is forgiven), else None."""
    try:
        value = json_value(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def json_type(value: object) -> type:
    """The JSON type of a decoded value: whole and other numbers are one."""
    return float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)


def same_value(a: object, b: object) -> bool:
    """Whether two decoded JSON values are equal; texts are compared as `normal` has them, at any depth."""
    if isinstance(a, str) and isinstance(b, str):
        return normal(a) == normal(b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same_value(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(v, b[k]) for k, v in a.items())
    return json_type(a) is json_type(b) and bool(a == b)


@dataclass(frozen=True)
class Tools:
    """What some metrics need beside the answers: a judge, an embedder's name or directory (None: the one installed)."""

    judge: Judge | None = None
    embedder: str | None = None


NO_TOOLS = Tools()


@dataclass
class Answers:
    """One system's answers to rows with references; None stands for a request that was not answered.

    `labels` are the classes (None: the references' own), `answer_field` the one of a JSON answer that holds the label,
    `requests` the users' texts (for a judge). An unanswered row is wrong under every metric.
    """

    references: list[str]
    given: list[str | None]
    labels: list[str] | None = None
    answer_field: str | None = None
    requests: list[str] | None = None
    tools: Tools = NO_TOOLS
    # Figures of each metric, so that a judge is asked once.
    cache: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.references) != len(self.given):
            raise ValueError("references and answers must have one length")
        if not self.references:
            raise InputError("no rows with a right answer; scores need labelled rows")

    def __len__(self) -> int:
        return len(self.references)

    @property
    def texts(self) -> list[str]:
        """The answers' texts; an unanswered row's is empty."""
        return [g or "" for g in self.given]

    @cached_property
    def answered(self) -> np.ndarray:
        """Whether each row was answered, bool of shape `(rows,)`."""
        return np.array([g is not None for g in self.given], dtype=bool)

    @cached_property
    def truth(self) -> list[str]:
        """The label (or the text) of each reference. Raises `InputError` if a reference states none of the labels."""
        found = [self._label(text) for text in self.references]
        if INVALID in found and (self.labels is not None or self.answer_field is not None):
            row = found.index(INVALID)
            raise InputError(
                f"row {row + 1}: the reference {self.references[row]!r:.80} states none of the labels"
            )
        return found

    @cached_property
    def guess(self) -> list[str]:
        """The label (or the text) of each answer."""
        return [INVALID if g is None else self._label(g) for g in self.given]

    def _label(self, text: str) -> str:
        return parse_answer(text, labels=self.labels, field=self.answer_field)

    @cached_property
    def right(self) -> np.ndarray:
        """Whether each answer is right, 0 or 1 of shape `(rows,)`: its label, all its fields, or its text."""
        if self.objects and self.answer_field is None and self.labels is None:
            return np.array(
                [
                    g is not None and same_value(t, g)
                    for t, g in zip(self.objects, self.given_objects, strict=True)
                ],
                dtype=float,
            )
        pairs = zip(self.truth, self.guess, self.answered, strict=True)
        return np.array([bool(there) and t == g for t, g, there in pairs], dtype=float)

    @cached_property
    def objects(self) -> list[JsonObject]:
        """The references as JSON objects; empty if one of them is none."""
        found = [json_object(text) for text in self.references]
        return [o for o in found if o is not None] if None not in found else []

    @cached_property
    def given_objects(self) -> list[JsonObject | None]:
        """The answers as JSON objects; None where one is none."""
        return [None if g is None else json_object(g) for g in self.given]

    @cached_property
    def fields(self) -> list[str]:
        """The fields of all references and answers, sorted."""
        given = [o for o in self.given_objects if o is not None]
        return sorted({name for o in (*self.objects, *given) for name in o})

    @property
    def invalid(self) -> float:
        """Share of answers that state no label, no text, or (if the references are JSON objects) are none."""
        if self.objects and self.answer_field is None and self.labels is None:
            return sum(g is None for g in self.given_objects) / len(self)
        return self.guess.count(INVALID) / len(self)

    @cached_property
    def classes(self) -> list[str]:
        """The labels, or the references' own in sorted order."""
        return list(self.labels) if self.labels is not None else sorted(set(self.truth))

    @cached_property
    def codes(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the classes of references and answers, two int arrays; anything else is `len(classes)`."""
        index = {label: i for i, label in enumerate(self.classes)}
        other = len(index)
        return (
            np.array([index[t] for t in self.truth], dtype=int),
            np.array([index.get(g, other) for g in self.guess], dtype=int),
        )

    def subset(self, rows: Sequence[int]) -> Answers:
        """The answers of some rows, under the same classes."""
        return Answers(
            [self.references[i] for i in rows],
            [self.given[i] for i in rows],
            self.classes if self.labels is not None else None,
            self.answer_field,
            [self.requests[i] for i in rows] if self.requests is not None else None,
            self.tools,
        )

    def with_answers(self, given: Sequence[str | None]) -> Answers:
        """Other answers to the same rows."""
        return Answers(
            self.references, list(given), self.labels, self.answer_field, self.requests, self.tools
        )


def field_table(answers: Answers, name: str) -> np.ndarray:
    """Of one field and each row: whether it is equal, in the reference, in the answer; 0 or 1, shape `(rows, 3)`."""
    pairs = zip(answers.objects, answers.given_objects, strict=True)
    return np.array(
        [
            (name in t and name in g and same_value(t[name], g[name]), name in t, name in g)
            for t, g in ((t, g or {}) for t, g in pairs)
        ],
        dtype=float,
    )
