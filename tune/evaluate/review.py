"""Human review: a blinded sample drawn to a sheet, the filled sheet read back with intervals and as a gate.

Blinded: each row shows a request and up to two answers in a random order, one of the run, one of the other side (a
second run, or the reference answer); the sheet does not say which. Which is which stays in the run, in
`reviews/ID.json`, not among its hashed files.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tune.data.agreement import AnnotatorAgreement
from tune.data.agreement import agreement as several
from tune.evaluate.agreement import Agreement, agree
from unshot.console import Output
from unshot.contracts.gates import Gate, add_gate
from unshot.contracts.record import Record, RecordError
from unshot.contracts.task import Task
from unshot.data.files import write_text
from unshot.data.rows import Example, read_text
from unshot.errors import InputError
from unshot.metrics.intervals import Corrected, Interval, corrected, share
from unshot.metrics.judge import Judge, Judged, Pair, judge_pairs
from unshot.metrics.thresholds import REVIEW_ACCEPT
from unshot.report.formats import sheet_cell

FOLDER = "reviews"
V = TypeVar("V", bool, str)
COLUMNS = ("id", "request", "answer_1", "answer_2", "ok_1", "ok_2", "better", "comment")
SHEETS = (".csv", ".html", ".htm")
YES, NO = ("yes", "y", "1", "true", "ok"), ("no", "n", "0", "false")
BETTER = {"1": "1", "2": "2", "tie": "tie", "=": "tie", "0": "tie", "both": "tie", "same": "tie"}


class KeyRow(Record):
    """Which answer of a sheet's row is whose (`ours` is 1 or 2), and what stood there."""

    id: str
    line: int
    ours: int
    equal: bool
    # Whether the task's metric calls the run's answer right.
    automatic: bool
    request: str
    answer: str
    against: str
    # Why the row was drawn; "" where all of them were drawn at random.
    why: str = ""


class Key(Record):
    """What a review was drawn from: `reviews/NAME.json` in the run. `against` is `run` or `reference`."""

    review: str
    seed: int
    against: str
    rows: list[KeyRow]
    # Of all rows that it was drawn from: how many the task's metric calls right, and whether a teacher labelled them.
    of_rows: int | None = None
    of_right: int | None = None
    taught: bool = False


class Filled(Record):
    """A filled row of a sheet; None is an empty cell."""

    id: str
    ok_1: bool | None
    ok_2: bool | None
    better: str | None
    comment: str = ""

    def ok(self, side: int) -> bool | None:
        """Whether the answer of a side (1 or 2) was accepted."""
        return self.ok_1 if side == 1 else self.ok_2


class Preference(Record):
    """How often the run's answer was preferred; `run_preferred` is of the rows with a preference."""

    rows: int
    run: int
    other: int
    ties: int
    run_preferred: Interval | None


class Reviewed(Record, kw_only=True, omit_defaults=True):
    """What the reviewers said of a review's rows, with intervals, and the gate that follows."""

    review: str
    against: str
    drawn: int
    reviewers: int
    rows: int
    accepted: Interval
    other_accepted: Interval | None = None
    preference: Preference | None = None
    # Agreement of the task's metric with the people, of the people with each other, of a judge with the people.
    metric_human: Agreement | None = None
    # Accuracy of all rows by people's word; None where nothing is known of the rows that were not drawn.
    corrected: Corrected | None = None
    taught: bool = False
    between_reviewers: AnnotatorAgreement | None = None
    judge: Judged | None = None
    judge_human: Agreement | None = None
    gate: Gate


def draw(
    run: Path,
    task: Task,
    rows: Sequence[Example],
    answers: Sequence[str],
    other: Sequence[str] | None,
    *,
    count: int,
    seed: int,
    why: Mapping[int, str] | None = None,
) -> list[dict[str, str]]:
    """Blinded rows, and their key written to the run. `other` None: the reference answers are the other side.

    Rows are drawn at random, without regard to whether an answer was right, unless `why` names them by index. Equal
    answers are shown once.
    """
    chance = random.Random(f"{seed} {len(rows)}")
    chosen = (
        sorted(why) if why is not None else sorted(chance.sample(range(len(rows)), min(count, len(rows))))
    )
    chance.shuffle(chosen)
    against = other if other is not None else [row.answer or "" for row in rows]
    digest = hashlib.sha256(json.dumps([[rows[i].text, answers[i], against[i]] for i in chosen]).encode())
    name = f"r{digest.hexdigest()[:8]}"
    right = task.answers([row.answer or "" for row in rows], answers).right
    sheet, key = [], []
    for number, i in enumerate(chosen, start=1):
        equal = answers[i].strip() == against[i].strip()
        ours = 1 if equal or chance.random() < 0.5 else 2
        ordered = (answers[i], against[i]) if ours == 1 else (against[i], answers[i])
        pair = [text.strip() or "(empty)" for text in ordered]
        if equal:
            pair[1] = ""
        item = f"{name}-{number:03d}"
        sheet.append(
            dict.fromkeys(COLUMNS, "")
            | {"id": item, "request": shown(rows[i]), "answer_1": pair[0], "answer_2": pair[1]}
        )
        key.append(
            KeyRow(
                id=item, line=rows[i].line, ours=ours, equal=equal, automatic=bool(right[i]), request=shown(rows[i]),
                answer=answers[i], against=against[i], why=why[i] if why else "",
            )
        )  # fmt: skip
    facts = Key(name, seed, "run" if other is not None else "reference", key)
    if why is None:
        facts.of_rows, facts.of_right = len(rows), round(float(right.sum()))
        facts.taught = any(row.by_teacher for row in rows)
    write_text(run / FOLDER / f"{name}.json", facts.to_json(indent=1) + "\n")
    return sheet


def shown(row: Example) -> str:
    """What the reviewer sees of a request: the user's text, or the turns where there are several."""
    turns = [m for m in row.messages if m["role"] not in ("system", "developer")]
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in turns)


def write_sheet(path: Path, sheet: Sequence[dict[str, str]], instruction: str | None) -> None:
    """A CSV (UTF-8 with a mark, so that spreadsheets read it) or, for `.html`, a page that exports the CSV."""
    if path.suffix.lower() != ".csv":
        from tune.evaluate.review_page import review_page

        write_text(path, review_page(sheet, instruction))
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows({k: sheet_cell(v) for k, v in row.items()} for row in sheet)
    write_text(path, "\ufeff" + text.getvalue())


def read_sheet(path: Path) -> list[Filled]:
    """Filled rows of a sheet: id, `ok_1`, `ok_2` (True, False, None) and `better` (`1`, `2`, `tie`, None).

    Rows nobody filled in are left out. `InputError` for a sheet without its columns or with other words in them.
    """
    text = read_text(path)
    first = text.split("\n", 1)[0]
    delimiter = ";" if first.count(";") > first.count(",") else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    missing = [c for c in ("id", "ok_1", "ok_2", "better") if c not in (reader.fieldnames or ())]
    if missing:
        raise InputError(
            f"{path}: no column {', '.join(f'`{c}`' for c in missing)}; it is not a review sheet"
        )
    found, seen = [], set()
    for row in reader:
        item = (row["id"] or "").strip()
        where = f"{path}, line {reader.line_num}"
        if item in seen:
            raise InputError(f"{where}: {item} stands there twice")
        seen.add(item)
        better = (row["better"] or "").strip().casefold()
        if better and better not in BETTER:
            raise InputError(f"{where}: `better` is {row['better']!r}; accepted: 1, 2 or tie")
        read = Filled(
            item, _yes(where, "ok_1", row["ok_1"]), _yes(where, "ok_2", row["ok_2"]), BETTER.get(better),
            row.get("comment") or "",
        )  # fmt: skip
        if (read.ok_1, read.ok_2, read.better) != (None, None, None):
            found.append(read)
    if not found:
        raise InputError(
            f"{path}: nothing is filled in; put yes or no into ok_1 (and ok_2, and 1/2/tie into better)"
        )
    return found


def _yes(where: str, column: str, value: str | None) -> bool | None:
    word = (value or "").strip().casefold()
    if not word:
        return None
    if word in YES or word in NO:
        return word in YES
    raise InputError(f"{where}: `{column}` is {value!r}; accepted: yes or no")


def read_key(run: Path, sheets: dict[str, list[Filled]]) -> Key:
    """The key of the review that all sheets belong to; `InputError` if it is not this run's."""
    names = {row.id.rsplit("-", 1)[0] for rows in sheets.values() for row in rows}
    if len(names) != 1:
        raise InputError(
            f"the sheets are of different reviews ({', '.join(sorted(names))}); read one at a time"
        )
    path = run / FOLDER / f"{Path(names.pop()).name}.json"
    if not path.is_file():
        raise InputError(f"{path}: no such review; the sheet was not drawn from {run}")
    try:
        key = Key.from_json(path.read_text(encoding="utf-8"))
    except (RecordError, UnicodeDecodeError):
        raise InputError(f"{path}: not a review's key; it was changed by hand") from None
    known = {row.id for row in key.rows}
    for sheet, rows in sheets.items():
        for row in rows:
            if row.id not in known:
                raise InputError(f"{sheet}: {row.id} is not a row of this review")
    return key


@dataclass
class Votes:
    """What the reviewers said of one row, about the run's answer and the other side's."""

    ok: list[bool | None] = field(default_factory=list)
    other_ok: list[bool | None] = field(default_factory=list)
    better: list[str | None] = field(default_factory=list)


def from_review(
    run: Path,
    paths: Sequence[Path],
    judge: Judge | None,
    out: Output,
    *,
    accept: float = REVIEW_ACCEPT.value,
    seed: int = 0,
) -> Reviewed:
    """What the reviewers said, with intervals; appends the gate `review` to the run.

    Several sheets of one review are several reviewers: the majority counts, and their agreement is reported. With a
    judge it rates the same pairs, and its agreement with the people is reported.
    """
    sheets = {str(path): read_sheet(path) for path in paths}
    key = read_key(run, sheets)
    facts = {row.id: row for row in key.rows}
    votes = count_votes(sheets, facts)
    ok = {item: majority(v.ok) for item, v in votes.items()}
    judged = [item for item in facts if ok.get(item) is not None]
    if not judged:
        raise InputError("no row says whether the answer is acceptable; fill in ok_1 and ok_2 (yes or no)")
    accepted = share(sum(bool(ok[i]) for i in judged), len(judged))
    other = [v for v in (majority(v.other_ok) for v in votes.values()) if v is not None]
    result = Reviewed(
        review=key.review,
        against=key.against,
        drawn=len(facts),
        reviewers=len(sheets),
        rows=len(judged),
        accepted=accepted,
        other_accepted=share(sum(other), len(other)) if other else None,
        gate=review_gate(key.review, accepted, len(sheets), accept),
    )
    better = {item: majority(v.better) for item, v in votes.items()}
    settled = [item for item in facts if better.get(item) is not None]
    result.preference = _preference([better[item] for item in settled])
    if len(judged) >= 2:
        people = ["yes" if ok[i] else "no" for i in judged]
        metric = ["yes" if facts[i].automatic else "no" for i in judged]
        result.metric_human = agree(people, metric, seed=seed)
        if key.of_rows is not None and key.of_right is not None:
            result.corrected = corrected(
                key.of_right, key.of_rows, [facts[i].automatic for i in judged], [bool(ok[i]) for i in judged]
            )
            result.taught = key.taught
    if len(sheets) > 1:
        result.between_reviewers = several(
            {
                number: {
                    name: str(row.ok(fact.ours))
                    for name, rows in sheets.items()
                    for row in rows
                    if row.id == fact.id and row.ok(fact.ours) is not None
                }
                for number, fact in enumerate(key.rows)
            }
        )
    if judge is not None:
        result.judge, result.judge_human = _judge_agreement(judge, facts, settled, better, out, seed)
    add_gate(run, result.gate)
    return result


def _preference(sides: Sequence[str | None]) -> Preference | None:
    """What the rows with a verdict prefer: `first` is the run; None without such rows."""
    if not sides:
        return None
    run, other, ties = (sides.count(side) for side in ("first", "second", "tie"))
    return Preference(
        rows=len(sides),
        run=run,
        other=other,
        ties=ties,
        run_preferred=share(run, run + other) if run + other else None,
    )


def count_votes(sheets: dict[str, list[Filled]], facts: dict[str, KeyRow]) -> dict[str, Votes]:
    """The reviewers' words by row, blinding undone."""
    votes: dict[str, Votes] = {}
    for rows in sheets.values():
        for row in rows:
            fact = facts[row.id]
            own = votes.setdefault(row.id, Votes())
            own.ok.append(row.ok(fact.ours))
            own.other_ok.append(row.ok(fact.ours if fact.equal else 3 - fact.ours))
            own.better.append("tie" if fact.equal else _side(row.better, fact.ours))
    return votes


def _judge_agreement(
    judge: Judge,
    facts: dict[str, KeyRow],
    settled: Sequence[str],
    better: dict[str, str | None],
    out: Output,
    seed: int,
) -> tuple[Judged, Agreement]:
    """The judge on the pairs that people compared; equal answers are no evidence and are left out."""
    differing = [item for item in settled if not facts[item].equal]
    if not differing:
        raise InputError(
            "no row with two different answers has `better` filled in; there is nothing to hold the judge to"
        )
    pairs = [Pair(facts[i].request, facts[i].answer, facts[i].against) for i in differing]
    summary, verdicts = judge_pairs(judge, pairs, out)
    return summary, agree([better[i] or "tie" for i in differing], list(verdicts), seed=seed)


def review_gate(review: str, accepted: Interval, reviewers: int, accept: float) -> Gate:
    """Passed if the interval of accepted answers lies at or above `accept`, failed if it lies below."""
    passed = {"met": True, "not met": False}.get(accepted.verdict(accept))
    detail = (
        f"{reviewers} reviewer(s), {accepted.n} rows: {accepted} of the answers accepted, asked for "
        f"{accept:g}" + ("; too few rows to tell" if passed is None else "")
    )
    figures = {
        "review": review,
        "rows": accepted.n,
        "reviewers": reviewers,
        "accepted": vars(accepted),
        "accept": accept,
    }
    return Gate(name="review", passed=passed, detail=detail, figures=figures)


def _side(better: str | None, ours: int) -> str | None:
    if better is None or better == "tie":
        return better
    return "first" if int(better) == ours else "second"


def majority(values: Sequence[V | None]) -> V | None:
    """The most usual vote; an even split of yes and no is no, of preferences a tie; None without votes."""
    given = [v for v in values if v is not None]
    if not given:
        return None
    ranked = sorted(set(given), key=lambda v: (-given.count(v), str(v)))
    if len(ranked) > 1 and given.count(ranked[0]) == given.count(ranked[1]):
        return False if isinstance(ranked[0], bool) else "tie"
    return ranked[0]
