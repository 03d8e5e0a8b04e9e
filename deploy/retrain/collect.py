"""Which rows the next model is tuned on: the original ones, corrected by what users and reviewers said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.answers import LoggedRequest, failed, fold, stated
from unshot.contracts.request_log import Feedback
from unshot.contracts.task import Task
from unshot.data.rows import Example
from unshot.errors import InputError
from unshot.metrics.answers import INVALID

# With this many corrections a fifth of them is kept out of training, to see whether the mistakes are mended.
ENOUGH_FOR_FRESH = 25
FRESH = 5


@dataclass
class Collected:
    """Rows for training and testing, and what happened to which. Rows are dicts as they are written."""

    sealed: list[dict[str, Any]]
    train: list[dict[str, Any]] = field(default_factory=list)
    fresh: list[dict[str, Any]] = field(default_factory=list)
    added: list[dict[str, Any]] = field(default_factory=list)
    replaced: list[dict[str, Any]] = field(default_factory=list)
    disputed: list[dict[str, Any]] = field(default_factory=list)
    unusable: list[dict[str, Any]] = field(default_factory=list)
    to_label: list[dict[str, Any]] = field(default_factory=list)
    held_back: list[dict[str, Any]] = field(default_factory=list)

    @property
    def new(self) -> int:
        """Corrections that can teach something: added or replaced rows, and those kept for the fresh test."""
        return len(self.added) + len(self.replaced) + len(self.fresh)

    def counts(self) -> dict[str, int]:
        """How many rows went where."""
        names = (
            "train",
            "sealed",
            "fresh",
            "added",
            "replaced",
            "disputed",
            "unusable",
            "to_label",
            "held_back",
        )
        return {name: len(getattr(self, name)) for name in names}


def collect(
    original: Sequence[Example],
    sealed: Sequence[Example],
    asked: Sequence[LoggedRequest],
    feedback: Mapping[str, Feedback],
    task: Task,
) -> Collected:
    """Merge corrections into the original rows.

    The last correction of an input counts, above the original's answer. An input of the sealed test stays out of
    training whatever was said of it; where a correction contradicts the test, that is reported and nothing changed.
    """
    result = Collected([row.row() for row in sealed])
    kept_out = {fold(row.text): row for row in sealed}
    corrections: dict[str, dict[str, Any]] = {}
    for one in asked:
        said = feedback.get(one.id)
        line = one.shown or one.tries[-1]
        if said is None or said.correction is None:
            wrong = said is not None and said.correct is False
            if line.input is not None and (wrong or one.failed or failed(line)):
                result.to_label.append({"input": line.input, "answer": line.answer, "request": one.id})
            continue
        if line.input is None:
            result.unusable.append({"request": one.id, "why": "the log has no text of the input"})
            continue
        answer = completion(said.correction, task)
        if answer is None:
            result.unusable.append(
                {"request": one.id, "why": f"not one of the labels: {said.correction[:80]}"}
            )
            continue
        key = fold(line.input)
        if key in kept_out:
            if task.label(kept_out[key].answer or "") != task.label(answer):
                result.disputed.append(
                    {
                        "input": line.input,
                        "test": kept_out[key].answer,
                        "correction": answer,
                        "request": one.id,
                    }
                )
            continue
        corrections.pop(key, None)
        corrections[key] = row_of(line.input, answer, one.id, said.by)
    _merge(result, original, kept_out, corrections, task)
    return result


def completion(correction: str, task: Task) -> str | None:
    """The correction as the model should answer it: a whole answer as it is, else the label in its field."""
    if task.label(correction) != INVALID:
        return correction.strip()
    label = stated(correction, task)
    if label == INVALID or task.answer_field is None:
        return None
    return json.dumps({task.answer_field: label}, ensure_ascii=False)


def row_of(text: str, answer: str, request: str, by: str) -> dict[str, Any]:
    """A training row out of the log."""
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "source": "log", "request": request, "by": by}


def text_of(row: Mapping[str, Any]) -> str:
    """The input text of a row as it is written: its last user message."""
    return next(str(m["content"]) for m in reversed(row["messages"]) if m["role"] == "user")


def _merge(
    result: Collected,
    original: Sequence[Example],
    kept_out: Mapping[str, Example],
    corrections: dict[str, dict[str, Any]],
    task: Task,
) -> None:
    fresh = _fresh(corrections)
    result.fresh = [corrections[key] for key in fresh]
    placed: set[str] = set()
    for example in original:
        key = fold(example.text)
        if key in kept_out or key in fresh or key in placed:
            continue
        placed.add(key)
        row = corrections.get(key)
        if row is None:
            result.train.append(example.row())
            continue
        answer = row["messages"][-1]["content"]
        if task.label(answer) != task.label(example.answer or ""):
            result.replaced.append({**row, "was": example.answer, "line": example.line})
            messages = [*example.messages, row["messages"][-1]]
            result.train.append({**row, "messages": messages})
        else:
            result.train.append(example.row())
    for key, row in corrections.items():
        if key not in placed and key not in fresh:
            result.added.append(row)
            result.train.append(row)


def _fresh(corrections: Mapping[str, Any]) -> set[str]:
    """The inputs kept for the fresh test: the same ones in every run with the same corrections."""
    if len(corrections) < ENOUGH_FOR_FRESH:
        return set()
    ranked = sorted(corrections, key=lambda key: hashlib.sha256(key.encode()).digest())
    return set(ranked[: len(ranked) // FRESH])


def drop_alike(collected: Collected, duplicates: Path) -> None:
    """Take rows out of training that are nearly test rows.

    `duplicates` is the list that `unshot data check` wrote of sealed, fresh and training rows in one file, in that
    order. Raises `InputError` where it is damaged.
    """
    first = len(collected.sealed) + len(collected.fresh)
    alike: set[int] = set()
    try:
        lines = [json.loads(line) for line in duplicates.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(
            f"{duplicates}: cannot be read ({error}); delete its directory and run again"
        ) from None
    for pair in lines:
        low, high = sorted((int(pair["line"]), int(pair["like_line"])))
        if low <= first < high:
            alike.add(high - first - 1)
    collected.held_back = [row for i, row in enumerate(collected.train) if i in alike]
    collected.train = [row for i, row in enumerate(collected.train) if i not in alike]
    gone = {fold(text_of(row)) for row in collected.held_back}
    for name in ("added", "replaced"):
        rows = getattr(collected, name)
        setattr(collected, name, [row for row in rows if fold(text_of(row)) not in gone])
