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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tune.data.agreement import agreement as several
from tune.evaluate.agreement import agree, wilson
from tune.evaluate.judge import Judge, Pair, judge_pairs
from unshot.console import Output
from unshot.contracts.gates import Gate, add_gate
from unshot.contracts.task import Task
from unshot.data.files import write_text
from unshot.data.rows import Example, read_text
from unshot.errors import InputError
from unshot.report.formats import sheet_cell

FOLDER = "reviews"
COLUMNS = ("id", "request", "answer_1", "answer_2", "ok_1", "ok_2", "better", "comment")
SHEETS = (".csv", ".html", ".htm")
# Share of the run's answers that reviewers must accept, as the lower end of its interval.
ACCEPT = 0.8
YES, NO = ("yes", "y", "1", "true", "ok"), ("no", "n", "0", "false")
BETTER = {"1": "1", "2": "2", "tie": "tie", "=": "tie", "0": "tie", "both": "tie", "same": "tie"}


def draw(
    run: Path,
    task: Task,
    rows: Sequence[Example],
    answers: Sequence[str],
    other: Sequence[str] | None,
    *,
    count: int,
    seed: int,
) -> list[dict[str, str]]:
    """Blinded rows, and their key written to the run. `other` None: the reference answers are the other side.

    Rows are drawn at random, without regard to whether an answer was right. Equal answers are shown once.
    """
    chance = random.Random(f"{seed} {len(rows)}")
    chosen = sorted(chance.sample(range(len(rows)), min(count, len(rows))))
    chance.shuffle(chosen)
    against = other if other is not None else [row.answer or "" for row in rows]
    digest = hashlib.sha256(json.dumps([[rows[i].text, answers[i], against[i]] for i in chosen]).encode())
    name = f"r{digest.hexdigest()[:8]}"
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
        right = task.label(answers[i]) == task.label(rows[i].answer or "")
        key.append(
            {"id": item, "line": rows[i].line, "ours": ours, "equal": equal, "automatic": right,
             "request": shown(rows[i]), "answer": answers[i], "against": against[i]}
        )  # fmt: skip
    facts = {
        "review": name,
        "seed": seed,
        "against": "run" if other is not None else "reference",
        "rows": key,
    }
    write_text(run / FOLDER / f"{name}.json", json.dumps(facts, ensure_ascii=False, indent=1) + "\n")
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


def read_sheet(path: Path) -> list[dict[str, Any]]:
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
        read = {
            "id": item,
            "ok_1": _yes(where, "ok_1", row["ok_1"]),
            "ok_2": _yes(where, "ok_2", row["ok_2"]),
            "better": BETTER.get(better),
        }
        if any(read[k] is not None for k in ("ok_1", "ok_2", "better")):
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


def read_key(run: Path, sheets: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The key of the review that all sheets belong to; `InputError` where it is not this run's."""
    names = {row["id"].rsplit("-", 1)[0] for rows in sheets.values() for row in rows}
    if len(names) != 1:
        raise InputError(
            f"the sheets are of different reviews ({', '.join(sorted(names))}); read one at a time"
        )
    path = run / FOLDER / f"{Path(names.pop()).name}.json"
    if not path.is_file():
        raise InputError(f"{path}: no such review; the sheet was not drawn from {run}")
    try:
        key: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = {row["id"] for row in key["rows"]}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not a review's key; it was changed by hand") from None
    for sheet, rows in sheets.items():
        for row in rows:
            if row["id"] not in known:
                raise InputError(f"{sheet}: {row['id']} is not a row of this review")
    return key


def from_review(
    run: Path,
    paths: Sequence[Path],
    judge: Judge | None,
    out: Output,
    *,
    accept: float = ACCEPT,
    seed: int = 0,
) -> dict[str, Any]:
    """What the reviewers said, with intervals; appends the gate `review` to the run.

    Several sheets of one review are several reviewers: the majority counts, and their agreement is reported. With a
    judge it rates the same pairs, and its agreement with the people is reported.
    """
    sheets = {str(path): read_sheet(path) for path in paths}
    key = read_key(run, sheets)
    facts = {row["id"]: row for row in key["rows"]}
    votes: dict[str, dict[str, list[Any]]] = {}
    for rows in sheets.values():
        for row in rows:
            fact = facts[row["id"]]
            own = votes.setdefault(row["id"], {"ok": [], "other_ok": [], "better": []})
            ours, theirs = ("ok_1", "ok_2") if fact["ours"] == 1 else ("ok_2", "ok_1")
            own["ok"].append(row[ours])
            own["other_ok"].append(row[ours if fact["equal"] else theirs])
            own["better"].append("tie" if fact["equal"] else _side(row["better"], fact["ours"]))
    ok = {item: _majority(v["ok"]) for item, v in votes.items()}
    judged = [item for item in facts if ok.get(item) is not None]
    if not judged:
        raise InputError("no row says whether the answer is acceptable; fill in ok_1 and ok_2 (yes or no)")
    result: dict[str, Any] = {
        "review": key["review"],
        "against": key["against"],
        "drawn": len(facts),
        "reviewers": len(sheets),
        "accepted": wilson(sum(bool(ok[i]) for i in judged), len(judged)),
        "rows": len(judged),
    }
    other = [v for v in (_majority(v["other_ok"]) for v in votes.values()) if v is not None]
    result["other_accepted"] = wilson(sum(other), len(other)) if other else None
    better = {item: _majority(v["better"]) for item, v in votes.items()}
    settled = [item for item in facts if better.get(item) is not None]
    if settled:
        counts = {side: sum(better[i] == side for i in settled) for side in ("first", "second", "tie")}
        result["preference"] = {
            "rows": len(settled),
            "run": counts["first"],
            "other": counts["second"],
            "ties": counts["tie"],
            # Of the rows on which somebody had a preference.
            "run_preferred": wilson(counts["first"], decided)
            if (decided := counts["first"] + counts["second"])
            else None,
        }
    if len(judged) >= 2:
        people = ["yes" if ok[i] else "no" for i in judged]
        metric = ["yes" if facts[i]["automatic"] else "no" for i in judged]
        result["metric_human"] = agree(people, metric, seed=seed)
    if len(sheets) > 1:
        ratings: dict[int, dict[str, str]] = {}
        for number, item in enumerate(facts):
            given = {
                name: str(row[f"ok_{facts[item]['ours']}"])
                for name, rows in sheets.items()
                for row in rows
                if row["id"] == item and row[f"ok_{facts[item]['ours']}"] is not None
            }
            ratings[number] = given
        result["between_reviewers"] = several(ratings)
    if judge is not None:
        result["judge"] = _judge_agreement(judge, facts, settled, better, out, seed)
    gate = review_gate(result, accept)
    result["gate"] = gate.plain()
    add_gate(run, gate)
    return result


def _judge_agreement(
    judge: Judge,
    facts: dict[str, dict[str, Any]],
    settled: Sequence[str],
    better: dict[str, Any],
    out: Output,
    seed: int,
) -> dict[str, Any]:
    """The judge on the pairs that people compared; equal answers are no evidence and are left out."""
    differing = [item for item in settled if not facts[item]["equal"]]
    if not differing:
        raise InputError(
            "no row with two different answers has `better` filled in; there is nothing to hold the judge to"
        )
    pairs = [Pair(facts[i]["request"], facts[i]["answer"], facts[i]["against"]) for i in differing]
    summary, verdicts = judge_pairs(judge, pairs, out, seed=seed)
    return {**summary, "human": agree([better[i] for i in differing], list(verdicts), seed=seed)}


def review_gate(result: dict[str, Any], accept: float) -> Gate:
    """Passed where the interval of accepted answers lies at or above `accept`, failed where it lies below."""
    share = result["accepted"]
    passed = True if share.low >= accept else False if share.high < accept else None
    detail = (
        f"{result['reviewers']} reviewer(s), {result['rows']} rows: {share} of the answers accepted, asked for "
        f"{accept:g}" + ("; too few rows to tell" if passed is None else "")
    )
    figures = {
        "review": result["review"],
        "rows": result["rows"],
        "reviewers": result["reviewers"],
        "accepted": vars(share),
        "accept": accept,
    }
    return Gate(name="review", passed=passed, detail=detail, figures=figures)


def _side(better: str | None, ours: int) -> str | None:
    if better is None or better == "tie":
        return better
    return "first" if int(better) == ours else "second"


def _majority(values: Sequence[Any]) -> Any:
    """The most usual vote; an even split of yes and no is no, of preferences a tie; None without votes."""
    given = [v for v in values if v is not None]
    if not given:
        return None
    ranked = sorted(set(given), key=lambda v: (-given.count(v), str(v)))
    if len(ranked) > 1 and given.count(ranked[0]) == given.count(ranked[1]):
        return False if isinstance(ranked[0], bool) else "tie"
    return ranked[0]
