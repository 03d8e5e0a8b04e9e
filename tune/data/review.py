"""`unshot data review`: what people say of a teacher's labels, on the sheet of `unshot eval --review`.

A sheet holds a uniform sample, from which the teacher's error rate is told, and a queue of doubtful rows, which tells
nothing about the rate but finds errors. Read back, it corrects or drops rows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from tune.data.select import Chosen, Labelled, select
from tune.evaluate.review import Key, KeyRow, count_votes, draw, majority, read_key, read_sheet, shown
from unshot.console import Output
from unshot.contracts.document import Document
from unshot.contracts.manifest import Manifest, describe_file, staged
from unshot.contracts.record import Record
from unshot.contracts.task import Task
from unshot.data.rows import Example, write_jsonl
from unshot.errors import InputError
from unshot.metrics.answers import INVALID
from unshot.metrics.intervals import Interval, share

LABELLED = "labelled.jsonl"
RANDOM = "random"


class Errors(Record):
    """Wrong labels among the rows that people judged."""

    judged: int
    wrong: int
    rate: Interval | None = None


class LabelReview(Document):
    """`review.json`: the teacher's error rate by the random rows, and what became of the rows."""

    FILE: ClassVar[str] = "review.json"
    WRITTEN_BY: ClassVar[str] = "`unshot data review`"

    review: str
    reviewers: int
    rows: int
    drawn: int
    # Of the uniform sample: the only figures that speak for all rows.
    error_rate: Interval
    not_judged: int
    by_class: dict[str, Errors]
    # Of the queue, by why a row was in it.
    queue: dict[str, Errors]
    right: int
    corrected: int
    dropped: int


def labelled_file(path: Path) -> Path:
    """The rows of a directory of `unshot data label`, or the file itself."""
    return path / LABELLED if path.is_dir() else path


def draw_labels(
    path: Path, rows: Sequence[Example], task: Task, vectors: object, *, queue: int, sample: int, seed: int
) -> tuple[list[dict[str, str]], list[Chosen]]:
    """The blinded sheet of a labelled file and why its rows are on it; the key goes to `reviews/` beside the file."""
    answers = [row.answer or "" for row in rows]
    classes = [task.label(answer) for answer in answers] if task.labels else None
    data = Labelled(
        [row.text for row in rows],
        classes,
        [_number(row, "confidence") for row in rows],
        [_number(row, "margin") for row in rows],
    )
    chosen = select(data, vectors, queue=queue, sample=sample, seed=seed)
    other = list(answers)
    for pick in chosen:
        # A second opinion can be shown beside an answer that is nothing but its label.
        if pick.second is not None and classes and answers[pick.row].strip() == classes[pick.row]:
            other[pick.row] = pick.second
    sheet = draw(
        path.parent, task, rows, answers, other, count=len(chosen), seed=seed,
        why={pick.row: pick.why for pick in chosen},
    )  # fmt: skip
    return sheet, chosen


def _number(row: Example, name: str) -> float | None:
    value = row.extra.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def read_labels(
    path: Path,
    rows: Sequence[Example],
    task: Task,
    sheets: Sequence[Path],
    final: Path,
    out: Output,
    *,
    overwrite: bool = False,
) -> LabelReview:
    """Read filled sheets of `path` and write `final`: the rows corrected, those dropped, `review.json`.

    A label that was refused is replaced by the other answer if that was accepted, or by a comment that is nothing but
    a label; else the row is dropped. Raises `InputError` for a sheet of other rows or without a judged random row.
    """
    given = {str(sheet): read_sheet(sheet) for sheet in sheets}
    key = read_key(path.parent, given)
    by_line = {row.line: row for row in rows}
    for fact in key.rows:
        row = by_line.get(fact.line)
        if row is None or shown(row) != fact.request or (row.answer or "") != fact.answer:
            raise InputError(
                f"{path}, line {fact.line}: not the row that the sheet shows; it was drawn from another file"
            )
    facts = {row.id: row for row in key.rows}
    votes = count_votes(given, facts)
    right = {item: said for item, v in votes.items() if (said := majority(v.ok)) is not None}
    fixes: dict[int, str | None] = {}
    for item, fine in right.items():
        if not fine:
            fact = facts[item]
            other = not fact.equal and majority(votes[item].other_ok) is True
            written = [
                c
                for rows_ in given.values()
                for r in rows_
                if r.id == item and (c := _label(task, r.comment))
            ]
            fixes[fact.line] = fact.against if other else majority(written)
    report = _report(key, facts, right, task, len(sheets), len(rows), fixes)
    if report.not_judged:
        out.warn(
            f"{report.not_judged} of the random rows were not judged: the error rate holds for all rows only if they "
            "were left out by chance"
        )
    sure = {facts[item].line for item, fine in right.items() if fine}
    with staged(final, overwrite=overwrite) as work:
        write_jsonl(
            work / LABELLED, [_row(row, fixes, sure) for row in rows if fixes.get(row.line, "") is not None]
        )
        write_jsonl(work / "dropped.jsonl", [row.row() for row in rows if fixes.get(row.line, "") is None])
        report.write(work)
        manifest = Manifest(
            "data-review", inputs=[describe_file(path), *(describe_file(sheet) for sheet in sheets)]
        )
        manifest.result = report.plain()
        manifest.finish(work)
    return report


def _label(task: Task, comment: str) -> str | None:
    """The label that a comment is, alone."""
    word = comment.strip()
    if not word or not task.labels:
        return None
    found = task.label(word) if task.answer_field is None else INVALID
    return found if found != INVALID and found.casefold() == word.casefold() else None


def _row(row: Example, fixes: dict[int, str | None], sure: set[int]) -> dict[str, object]:
    if row.line in sure:
        return {**row.row(), "labelled_by": "teacher, reviewed"}
    if (fixed := fixes.get(row.line)) is not None:
        return {**replace(row, answer=fixed).row(), "labelled_by": "person"}
    return row.row()


def _report(
    key: Key,
    facts: dict[str, KeyRow],
    right: dict[str, bool],
    task: Task,
    reviewers: int,
    rows: int,
    fixes: dict[int, str | None],
) -> LabelReview:
    sample = [item for item, fact in facts.items() if fact.why == RANDOM]
    judged = [item for item in sample if item in right]
    if not judged:
        raise InputError(
            "no random row is judged (put yes or no into ok_1): the teacher's error rate is not known"
        )
    wrong = sum(not right[item] for item in judged)
    classes: dict[str, list[str]] = defaultdict(list)
    for item in judged if task.labels else ():
        classes[task.label(facts[item].answer)].append(item)
    reasons: dict[str, list[str]] = defaultdict(list)
    for item, fact in facts.items():
        if fact.why != RANDOM and item in right:
            reasons[fact.why].append(item)
    fates = Counter("dropped" if fixed is None else "corrected" for fixed in fixes.values())
    return LabelReview(
        review=key.review,
        reviewers=reviewers,
        rows=rows,
        drawn=len(facts),
        error_rate=share(wrong, len(judged)),
        not_judged=len(sample) - len(judged),
        by_class={name: _errors(items, right, rate=True) for name, items in sorted(classes.items())},
        queue={name: _errors(items, right) for name, items in reasons.items()},
        right=sum(right.values()),
        corrected=fates["corrected"],
        dropped=fates["dropped"],
    )


def _errors(items: Sequence[str], right: dict[str, bool], *, rate: bool = False) -> Errors:
    wrong = sum(not right[item] for item in items)
    return Errors(len(items), wrong, share(wrong, len(items)) if rate else None)
