"""`unshot data review` and the correction of scores by a review."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import SHARED, Run
from tune.data.select import Labelled, k_centre, rare, select, uncertain
from unshot.metrics.intervals import corrected

TOPICS = {
    "card": ["lost card", "new card", "card blocked", "card number", "card arrived"],
    "loan": ["loan rate", "pay loan", "loan term", "new loan", "loan denied"],
    "fee": ["fee charged", "why fee", "monthly fee", "fee refund", "fee list"],
}


def topic(name: str, number: int) -> str:
    return f"question {number}: {random.Random(f'{name}{number}').choice(TOPICS[name])} please help"


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[Path, list[str]]:
    """120 rows as `data label` writes them, every eighth label wrong; and the true labels."""
    truth = [list(TOPICS)[n % 3] for n in range(120)]
    folder = tmp_path / "labelled"
    folder.mkdir()
    lines = []
    for number, name in enumerate(truth):
        said = list(TOPICS)[(number + 1) % 3] if number % 8 == 3 else name
        messages = [{"role": "user", "content": topic(name, number)}, {"role": "assistant", "content": said}]
        lines.append(json.dumps({"messages": messages, "labelled_by": "teacher", "confidence": 1.0}))
    (folder / "labelled.jsonl").write_text("\n".join(lines) + "\n")
    return folder, truth


def fill(sheet: Path, folder: Path, truth: list[str], judge: Callable[[str, str, int], bool | None]) -> None:
    """Write people's words into a drawn sheet."""
    review = json.loads(next((folder / "reviews").glob("*.json")).read_text())
    lines = {row["id"]: row["line"] for row in review["rows"]}
    with sheet.open(encoding="utf-8-sig", newline="") as handle:
        rows = list(csv.DictReader(handle))
    for row in rows:
        number = lines[row["id"]] - 1
        for side in ("1", "2"):
            if row[f"answer_{side}"]:
                said = judge(row[f"answer_{side}"], truth[number], number)
                row[f"ok_{side}"] = "" if said is None else "yes" if said else "no"
    with sheet.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_review_tells_the_error_rate_and_mends_the_rows(
    unshot: Run, labelled: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, truth = labelled
    sheet = tmp_path / "sheet.csv"
    line = ("data", "review", folder, "--embedder", "off", "-q")
    done = unshot(*line, "--sheet", sheet, "--rows", "30", "--random", "40", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["rows"] == 70 and facts["why"]["random"] == 40
    text = sheet.read_text(encoding="utf-8-sig")
    # Blinded: neither why a row is there nor whose an answer is.
    assert not any(word in text for word in ("random", "boundary", "far", "teacher", "likely"))
    fill(sheet, folder, truth, lambda answer, right, number: answer == right)
    done = unshot(*line, "--from-review", sheet, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    drawn = {
        r["line"] - 1: r for r in json.loads(next((folder / "reviews").glob("*.json")).read_text())["rows"]
    }
    sample = [n for n, row in drawn.items() if row["why"] == "random"]
    assert report["error_rate"]["n"] == 40
    assert report["error_rate"]["value"] == pytest.approx(sum(n % 8 == 3 for n in sample) / 40)
    assert sum(found["judged"] for found in report["by_class"].values()) == 40
    wrong = [n for n in drawn if n % 8 == 3]
    assert report["corrected"] + report["dropped"] == len(wrong) > 5 and report["corrected"] > 0
    rows = [json.loads(row) for row in (tmp_path / "out" / "labelled.jsonl").read_text().splitlines()]
    assert len(rows) == 120 - report["dropped"]
    by_text = {topic(name, n): (n, name) for n, name in enumerate(truth)}
    for row in rows:
        number, name = by_text[row["messages"][0]["content"]]
        if number in drawn:
            assert row["messages"][-1]["content"] == name and row["labelled_by"] != "teacher"
        else:
            assert row["labelled_by"] == "teacher"


def test_what_a_review_lacks_is_said(unshot: Run, labelled: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, truth = labelled
    sheet = tmp_path / "sheet.csv"
    line = ("data", "review", folder, "--embedder", "off", "-q")
    assert unshot(*line).returncode == unshot(*line, "--sheet", tmp_path / "s.txt").returncode == 2
    assert unshot(*line, "--sheet", sheet, "--rows", "10", "--random", "20").returncode == 0
    assert "already there" in unshot(*line, "--sheet", sheet).stderr
    assert "nothing is filled in" in unshot(*line, "--from-review", sheet, "--out", tmp_path / "out").stderr
    fill(sheet, folder, truth, lambda answer, right, number: None if number % 5 == 0 else answer == right)
    done = unshot(*line, "--from-review", sheet, "--out", tmp_path / "out")
    assert done.returncode == 0 and "random rows were not judged" in done.stderr
    # Another file than the one that was drawn from.
    rows = (folder / "labelled.jsonl").read_text().splitlines()
    (folder / "labelled.jsonl").write_text("\n".join(rows[1:]) + "\n")
    done = unshot(*line, "--from-review", sheet, "--out", tmp_path / "other")
    assert done.returncode == 2 and "not the row that the sheet shows" in done.stderr


def test_selection_draws_each_row_once_and_the_random_ones_without_regard_to_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tune.data.select.has_cleanlab", lambda: False)
    chance = np.random.default_rng(0)
    vectors = chance.normal(size=(200, 8))
    classes = ["a"] * 100 + ["b"] * 95 + ["c"] * 5
    data = Labelled([str(n) for n in range(200)], classes, [0.6] * 10 + [1.0] * 190, [None] * 200)
    chosen = select(data, vectors, queue=60, sample=30, seed=1)
    assert len({pick.row for pick in chosen}) == 90 and {"uncertain", "boundary", "rare", "far"} < {
        p.why for p in chosen
    }
    # The same random rows whatever is known of them.
    plain = Labelled(data.texts, None, [None] * 200, [None] * 200)
    other = select(plain, vectors, queue=5, sample=30, seed=1)
    assert [p.row for p in chosen[:30]] == [p.row for p in other[:30]] and {p.why for p in other} == {
        "random",
        "far",
    }
    assert len(select(plain, vectors, queue=500, sample=500, seed=1)) == 200
    assert uncertain(data)[:10] == list(range(10)) and rare(classes) == [195, 196, 197]


def test_k_centre_takes_the_far_rows_first() -> None:
    from scipy import sparse

    vectors = np.array([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [1.0, 0.02], [-1.0, 0.0]])
    assert set(k_centre(vectors, 3)) == {2, 4} == set(k_centre(sparse.csr_matrix(vectors), 3))


def test_likely_wrong_labels_come_first_where_cleanlab_is_there() -> None:
    pytest.importorskip("cleanlab.filter", reason="unshot[review] is not installed")
    chance = np.random.default_rng(0)
    labels = np.arange(300) % 3
    vectors = np.eye(3)[labels] + chance.normal(size=(300, 3)) / 5
    wrong = set(range(0, 300, 14))
    classes = ["abc"[(label + 1) % 3 if i in wrong else label] for i, label in enumerate(labels)]
    data = Labelled([""] * 300, classes, [None] * 300, [None] * 300)
    first = [pick for pick in select(data, vectors, queue=28, sample=1, seed=0) if pick.why == "likely wrong"]
    assert len(wrong & {pick.row for pick in first}) >= 18
    assert all(pick.second == "abc"[labels[pick.row]] for pick in first if pick.row in wrong)


def review_of(chance: np.random.Generator, right: np.ndarray, teacher: np.ndarray, rows: int, n: int) -> Any:
    """The corrected accuracy of one simulated review of a test drawn from all rows."""
    test = chance.integers(0, len(right), rows)
    judged = test[:n]
    return corrected(int(teacher[test].sum()), rows, teacher[judged].tolist(), right[judged].tolist())


def test_the_corrected_accuracy_covers_the_truth() -> None:
    """With fewer simulations than `tests/benchmarks/bench_review.py`."""
    chance = np.random.default_rng(0)
    right = chance.random(4000) < 0.85
    # The teacher errs in a tenth of the rows: it calls right answers wrong there, and wrong ones rarely right.
    errs = chance.random(4000) < 0.1
    teacher = np.where(errs, ~right & (chance.random(4000) < 0.1), right)
    found = [review_of(chance, right, teacher, 500, 100) for _ in range(400)]
    truth = right.mean()
    assert 0.92 <= np.mean([c.corrected.low <= truth <= c.corrected.high for c in found]) <= 0.985
    assert np.mean([c.corrected.value for c in found]) == pytest.approx(truth, abs=0.006)
    # By the teacher's word alone the truth is missed; by the reviewed rows alone the interval is wider.
    assert np.mean([c.by_teacher.low <= truth <= c.by_teacher.high for c in found]) < 0.2
    widths = np.mean(
        [[c.corrected.high - c.corrected.low, c.by_people.high - c.by_people.low] for c in found], axis=0
    )
    assert widths[0] < 0.9 * widths[1]


def test_a_review_of_all_rows_is_peoples_word_alone() -> None:
    people = [True] * 30 + [False] * 10
    found = corrected(20, 40, [True] * 20 + [False] * 20, people)
    assert found.weight == 0 and found.corrected.value == found.by_people.value == 0.75
    useless = corrected(250, 500, [True, False] * 20, people)
    assert useless.weight == pytest.approx(0, abs=0.1)
    with pytest.raises(ValueError, match="two"):
        corrected(1, 4, [True], [True])


@pytest.mark.skipif(not (SHARED / "banking77").is_dir(), reason="the banking77 files are not there")
def test_the_queue_finds_planted_errors_on_banking77() -> None:
    pytest.importorskip("cleanlab.filter", reason="unshot[review] is not installed")
    from tests.benchmarks.bench_review import planted, queue_of

    texts, truth, said = planted(classes=12, per_class=30, wrong=0.1)
    rows = queue_of(texts, said, "hashed", queue=36)
    found = sum(truth[i] != said[i] for i in rows)
    assert found / len(rows) > 3 * np.mean([a != b for a, b in zip(truth, said, strict=True)])
