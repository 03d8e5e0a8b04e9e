"""`unshot data split`: groups stay whole, time runs forward, near-duplicates do not cross."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.conftest import Run
from tune.data.split import NAMES, split_file
from unshot.contracts.manifest import read_manifest
from unshot.data.rows import read_examples
from unshot.errors import InputError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """200 rows of random words, two classes, 40 customers, one row a day."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnopqrst", k=7)) for _ in range(500)]
    rows = [
        {
            "prompt": " ".join(chance.sample(words, 8)),
            "completion": "high" if i % 4 == 0 else "low",
            "customer": f"c{i % 40}",
            "day": f"2026-{1 + i // 28:02d}-{1 + i % 28:02d}",
        }
        for i in range(200)
    ]
    chance.shuffle(rows)
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def test_a_group_is_on_one_side_and_the_shares_are_near(data: Path, tmp_path: Path) -> None:
    result = split_file(data, tmp_path / "out", group_by="customer")
    parts = {n: read_examples(tmp_path / "out" / f"{n}.jsonl") for n in NAMES}
    groups = {n: {e.extra["customer"] for e in rows} for n, rows in parts.items()}
    assert (
        not groups["train"] & (groups["test"] | groups["validation"])
        and not groups["test"] & groups["validation"]
    )
    assert sum(map(len, parts.values())) == 200
    assert result["rows"] == {"train": 160, "validation": 20, "test": 20}
    assert all(len({e.answer for e in rows}) == 2 for rows in parts.values())
    read_manifest(tmp_path / "out", stage="data-split")


def test_time_splits_train_on_the_past_and_set_contaminated_rows_aside(data: Path, tmp_path: Path) -> None:
    rows = sorted((json.loads(line) for line in data.read_text().splitlines()), key=lambda r: r["day"])
    rows[-1]["prompt"] = rows[0]["prompt"].upper() + "!"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    result = split_file(data, tmp_path / "out", time="day")
    days = {n: [e.extra["day"] for e in read_examples(tmp_path / "out" / f"{n}.jsonl")] for n in NAMES}
    assert max(days["train"]) < min(days["validation"]) and max(days["validation"]) < min(days["test"])
    assert result["rows"] == {"train": 160, "validation": 20, "test": 19}
    assert [(m["line"], m["to"], m["like_line"]) for m in result["contamination"]["moved"]] == [
        (200, "aside", 1)
    ]
    assert len(read_examples(tmp_path / "out" / "aside.jsonl")) == 1


def test_a_time_that_is_none_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 1: `customer` is 'c\d+'"):
        split_file(data, tmp_path / "out", time="customer")


def test_moved_rows_are_replaced_and_reported_by_tune_too(
    unshot: Run, tiny_model: Path, small_data: Path, tmp_path: Path
) -> None:
    """Ten rows once more with a greeting: where a copy stood across the split, it is moved and put on record."""
    rows = [json.loads(line) for line in small_data.read_text().splitlines()]
    rows += [{**r, "prompt": f"Well: {r['prompt']}!"} for r in rows[:30]]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    done = unshot(
        "tune",
        data,
        "--base",
        tiny_model,
        "--out",
        tmp_path / "run",
        "--epochs",
        "1",
        "--rank",
        "4",
        "-q",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    moved = json.loads((tmp_path / "run" / "metrics.json").read_text())["contamination"]["moved"]
    assert moved and "near-duplicates" in done.stderr
    parts = {n: (tmp_path / "run" / "splits" / f"{n}.jsonl").read_text() for n in NAMES}
    for line in (m["line"] for m in moved if m["to"] == "train"):
        assert json.dumps(rows[line - 1]["prompt"], ensure_ascii=False) in parts["train"]
    plain = {n: {e.text.removeprefix("Well: ").rstrip("!") for e in read_examples(tmp_path / "run" / "splits" / f"{n}.jsonl")} for n in NAMES}  # fmt: skip  # noqa: E501
    assert not plain["train"] & plain["test"] and not plain["train"] & plain["validation"]
