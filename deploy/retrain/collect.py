"""Which rows the next model is tuned on: the original ones, corrected by what users and reviewers said."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from deploy.answers import LoggedRequest, failed, stated
from unshot.contracts.request_log import USER, Feedback
from unshot.contracts.task import Task
from unshot.data.example import fold
from unshot.data.rows import Example, Message
from unshot.errors import InputError
from unshot.metrics.answers import INVALID

# With this many corrections a fifth of them is kept out of training, to see whether the mistakes are mended.
ENOUGH_FOR_FRESH = 25
FRESH = 5


Row = dict[str, object]


@dataclass
class Collected:
    """Rows for training and testing, and what happened to which. Rows are dicts as they are written."""

    sealed: list[Row]
    train: list[Row] = field(default_factory=list)
    fresh: list[Row] = field(default_factory=list)
    added: list[Row] = field(default_factory=list)
    replaced: list[Row] = field(default_factory=list)
    # Users' corrections that contradict an original row: an expert wrote that, so that nothing is changed.
    contested: list[Row] = field(default_factory=list)
    disputed: list[Row] = field(default_factory=list)
    unusable: list[Row] = field(default_factory=list)
    to_label: list[Row] = field(default_factory=list)
    held_back: list[Row] = field(default_factory=list)

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
            "contested",
            "disputed",
            "unusable",
            "to_label",
            "held_back",
        )
        return {name: len(getattr(self, name)) for name in names}


@dataclass(frozen=True)
class Correction:
    """What was said of one request: the right answer as a row, who said it, and in whose conversation."""

    row: Row
    by: str
    unit: str
    time: float

    @property
    def expert(self) -> bool:
        return self.by != USER

    def outranks(self, other: Correction) -> bool:
        """Experts before users, then the newer one."""
        return (self.expert, self.time) >= (other.expert, other.time)


def collect(
    original: Sequence[Example],
    sealed: Sequence[Example],
    asked: Sequence[LoggedRequest],
    feedback: Mapping[str, Feedback],
    task: Task,
    *,
    per_user: int | None = None,
) -> Collected:
    """Merge corrections into the original rows.

    Of an input's corrections an expert's counts above users', then the last one. An expert's replaces the original's
    answer; a user's that contradicts it is put aside. One user (a sticky key of the gateway) changes at most `per_user`
    inputs. An input of the sealed test stays out of training whatever was said of it; where a correction contradicts
    the test, that is reported and nothing changed.
    """
    result = Collected([row.row() for row in sealed])
    kept_out = {fold(row.text): row for row in sealed}
    corrections: dict[str, Correction] = {}
    changed: dict[str, set[str]] = {}
    for one in asked:
        found = _correction(result, one, feedback.get(one.id), task)
        if found is None:
            continue
        key = fold(text_of(found.row))
        answer = _answer(found.row)
        if key in kept_out:
            if task.label(kept_out[key].answer or "") != task.label(answer):
                result.disputed.append(
                    {"input": text_of(found.row), "test": kept_out[key].answer, "correction": answer,
                     "request": one.id, "by": found.by}
                )  # fmt: skip
            continue
        own = changed.setdefault(found.unit, set())
        if not found.expert and per_user is not None and key not in own and len(own) >= per_user:
            result.unusable.append({"request": one.id, "why": f"this user has corrected {per_user} inputs"})
            continue
        if not found.expert:
            own.add(key)
        if key not in corrections or found.outranks(corrections[key]):
            corrections.pop(key, None)
            corrections[key] = found
    sealed_inputs = {fold(row.identity) for row in sealed}
    unsealed = [row for row in original if fold(row.identity) not in sealed_inputs]
    _merge(result, unsealed, corrections, task)
    return result


def _correction(
    result: Collected, one: LoggedRequest, said: Feedback | None, task: Task
) -> Correction | None:
    """The correction of a request; None where there is none that can be used, which is noted."""
    line = one.shown or one.tries[-1]
    if said is None or said.correction is None:
        wrong = said is not None and said.correct is False
        if line.input is not None and not line.cut and (wrong or one.failed or failed(line)):
            result.to_label.append({"input": line.input, "answer": line.answer, "request": one.id})
        return None
    why = None
    if line.input is None:
        why = "the log has no text of the input"
    elif line.cut:
        why = "the log has only the beginning of the text"
    answer = completion(said.correction, task)
    if why is None and answer is None:
        why = f"not one of the labels: {said.correction[:80]}"
    if why is not None or line.input is None or answer is None:
        result.unusable.append({"request": one.id, "why": why})
        return None
    row = row_of(line.input, answer, one.id, said.by)
    if line.answer and task.label(line.answer) != task.label(answer):
        row["rejected"] = line.answer  # what `tune --method dpo` learns from
    return Correction(row, said.by, one.unit, said.time)


def completion(correction: str, task: Task) -> str | None:
    """The correction as the model should answer it: a whole answer as it is, else the label in its field."""
    if task.label(correction) != INVALID:
        return correction.strip()
    label = stated(correction, task)
    if label == INVALID or task.answer_field is None:
        return None
    return json.dumps({task.answer_field: label}, ensure_ascii=False)


def row_of(text: str, answer: str, request: str, by: str) -> Row:
    """A training row out of the log."""
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "source": "log", "request": request, "by": by}


def text_of(row: Mapping[str, object]) -> str:
    """The input text of a row as it is written: its last user message."""
    return next(m["content"] for m in reversed(messages_of(row)) if m["role"] == "user")


def messages_of(row: Mapping[str, object]) -> list[Message]:
    """The messages of a row."""
    return cast("list[Message]", row["messages"])


def _answer(row: Mapping[str, object]) -> str:
    return messages_of(row)[-1]["content"]


def _merge(
    result: Collected, original: Sequence[Example], corrections: dict[str, Correction], task: Task
) -> None:
    """Every original row stays, corrected where its whole input is the text that the log has of a request.

    A conversation with earlier turns is another input than its last message alone.
    """
    known: dict[str, list[Example]] = defaultdict(list)
    for example in original:
        if fold(example.dialogue) == fold(example.text):
            known[fold(example.text)].append(example)

    def agrees(found: Correction, old: Example) -> bool:
        return task.label(_answer(found.row)) == task.label(old.answer or "")

    for key, found in list(corrections.items()):
        olds = known.get(key, [])
        if olds and not found.expert and not any(agrees(found, old) for old in olds):
            result.contested.append({**found.row, "was": olds[0].answer, "line": olds[0].line})
            del corrections[key]
    fresh = _fresh(corrections)
    result.fresh = [corrections[key].row for key in fresh]
    for example in original:
        key = fold(example.text)
        alone = any(example is old for old in known.get(key, ()))
        if alone and key in fresh:
            continue
        replaced = corrections.get(key) if alone else None
        if replaced is None or agrees(replaced, example) or not replaced.expert:
            result.train.append(example.row())
            continue
        result.replaced.append({**replaced.row, "was": example.answer, "line": example.line})
        result.train.append({**replaced.row, "messages": [*example.messages, messages_of(replaced.row)[-1]]})
    for key, found in corrections.items():
        if key not in known and key not in fresh:
            result.added.append(found.row)
            result.train.append(found.row)


def _fresh(corrections: Mapping[str, Correction]) -> set[str]:
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
        pairs = [sorted((int(pair["line"]), int(pair["like_line"]))) for pair in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{duplicates}: cannot be read ({error}); delete its directory and run again"
        ) from None
    for low, high in pairs:
        if low <= first < high:
            alike.add(high - first - 1)
    collected.held_back = [row for i, row in enumerate(collected.train) if i in alike]
    collected.train = [row for i, row in enumerate(collected.train) if i not in alike]
    gone = {fold(text_of(row)) for row in collected.held_back}
    for name in ("added", "replaced"):
        rows = getattr(collected, name)
        setattr(collected, name, [row for row in rows if fold(text_of(row)) not in gone])
