"""`unshot data split`: groups stay whole, time runs forward, near-duplicates do not cross."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tune.data.split import NAMES, Splitting, group_name, load_parts, split_file
from unshot.case import SplitSettings
from unshot.contracts.manifest import read_manifest
from unshot.data.rows import read_examples
from unshot.data.seal import record_reading
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
    result = split_file(data, tmp_path / "out", settings=SplitSettings(group_by="customer"))
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
    result = split_file(data, tmp_path / "out", settings=SplitSettings(time="day"))
    days = {n: [e.extra["day"] for e in read_examples(tmp_path / "out" / f"{n}.jsonl")] for n in NAMES}
    assert max(days["train"]) < min(days["validation"]) and max(days["validation"]) < min(days["test"])
    assert result["rows"] == {"train": 160, "validation": 20, "test": 19}
    assert [(m["line"], m["to"], m["like_line"]) for m in result["contamination"]["moved"]] == [
        (200, "aside", 1)
    ]
    assert len(read_examples(tmp_path / "out" / "aside.jsonl")) == 1


def test_a_time_that_is_none_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 1: `customer` is 'c\d+'"):
        split_file(data, tmp_path / "out", settings=SplitSettings(time="customer"))


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


def tiny_rows(data: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("times", "part"),
    [
        (lambda i: float("nan") if i == 7 else i, "line 8: `when` is nan"),
        (lambda i: 1.7e9 + i if i % 2 else (1.7e9 + i) * 1000, "in seconds, but milliseconds in"),
        (lambda i: "2026-01-01" if i == 3 else 1.7e9 + i, "in days, but seconds in"),
        (lambda i: None if i == 3 else i, "line 4: `when` is null"),
        (lambda i: 10**400 if i == 3 else i, "line 4: `when` is inf"),
        (lambda i: f"2026-01-01T00:{i % 60:02d}:00" + ("Z" if i % 2 else ""), "dates with a time zone"),
    ],
)  # fmt: skip
def test_times_that_cannot_be_ordered_are_refused(tmp_path: Path, times: Any, part: str) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"prompt": f"word{i} other{i * 7}", "completion": "a", "when": times(i)} for i in range(40)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    with pytest.raises(InputError, match=part):
        split_file(path, tmp_path / "out", settings=SplitSettings(time="when"))


def test_splits_by_group_and_time_are_the_same_in_tune(data: Path, tmp_path: Path) -> None:
    """`Loaded.divide` is what `tune` calls; its parts are those that `data split` writes."""
    for plan in (Splitting(group_by="customer"), Splitting(time="day")):
        written = tmp_path / f"{plan.group_by}"
        split_file(data, written, settings=SplitSettings(group_by=plan.group_by, time=plan.time))
        cleaned, _ = load_parts(data, plan, read_examples).divide(stratum=lambda e: e.answer or "", seed=0)
        for name in NAMES:
            there = [e.text for e in read_examples(written / f"{name}.jsonl")]
            assert [e.text for e in getattr(cleaned.parts, name)] == there
        again = load_parts(written, Splitting(), read_examples)
        parts = again.divide(stratum=lambda e: "", seed=0)[0].parts
        assert [e.text for e in parts.test] == [e.text for e in read_examples(written / "test.jsonl")]
    with pytest.raises(InputError, match="is split already"):
        load_parts(written, Splitting(group_by="customer"), read_examples)


def test_own_files_keep_their_rows_and_what_is_like_them_is_said(data: Path, tmp_path: Path) -> None:
    rows = tiny_rows(data)
    test, rest = rows[:20], rows[20:]
    rest[5]["prompt"] = test[3]["prompt"].upper() + "!"
    for name, part in (("test", test), ("rest", rest)):
        text = "".join(json.dumps(r) + "\n" for r in part)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    plan = Splitting(test=tmp_path / "test.jsonl")
    loaded = load_parts(tmp_path / "rest.jsonl", plan, read_examples)
    cleaned, _ = loaded.divide(stratum=lambda e: e.answer or "", seed=0)
    assert [e.text for e in cleaned.parts.test] == [r["prompt"] for r in test]
    assert len(cleaned.parts.train) == 160 and len(cleaned.parts.validation) == 20
    assert [(m.line, m.source, m.to, m.like_line) for m in cleaned.kept] == [(4, "test", "test", 6)]
    both = Splitting(validation=tmp_path / "test.jsonl", test=tmp_path / "test.jsonl", time="day")
    with pytest.raises(InputError, match="nothing is left to split"):
        load_parts(tmp_path / "rest.jsonl", both, read_examples)


def test_a_test_set_read_by_several_runs_is_one_seal(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNSHOT_DATA", str(tmp_path / "own"))
    rows = read_examples(data)
    first = record_reading(rows, "tune", tmp_path / "a")
    assert (first.before, first.runs, first.warning()) == (0, 0, None)
    for name in ("b", "c"):
        seal = record_reading(list(reversed(rows)), "tune", tmp_path / name)
    assert (seal.before, seal.runs, seal.others) == (2, 2, 2) and seal.sha256 == first.sha256
    assert record_reading(rows, "eval", tmp_path / "c").others == 2
    assert "read 2 times before, by 2 runs" in (seal.warning() or "")
    assert record_reading(rows[1:], "eval", tmp_path / "a").before == 0


def test_the_case_file_says_columns_and_split_and_flags_stand_over_it(unshot: Run, tmp_path: Path) -> None:
    rows = [{"title": f"t{i} w{i * 7}", "body": f"b{i} {i * 13}", "topic": "ab"[i % 2], "customer": i // 3, "day": i}
            for i in range(60)]  # fmt: skip
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    (tmp_path / "unshot.toml").write_text(
        '[rows]\ninput_column = ["title", "body"]\noutput_column = "topic"\n'
        '[split]\ngroup_by = "customer"\nshares = "60/20/20"\n',
        encoding="utf-8",
    )
    for flags, group in (((), "customer"), (("--group", "day"), "day"), (("--group-by", "day"), "day")):
        out = tmp_path / f"out{len(flags)}{''.join(flags)}"
        done = unshot("data", "split", "d.jsonl", "--out", out, *flags, cwd=tmp_path)
        assert done.returncode == 0 and "columns `title`, `body` and `topic`" in done.stderr, done.stderr
        config = read_manifest(out).config
        assert (config["group_by"], config["shares"]) == (group, [0.6, 0.2, 0.2])


@pytest.mark.parametrize(
    ("values", "groups"), [((7, 7.0, "7 "), 1), ((True, "true"), 1), (("a", "A", "b"), 3), ((1.5, "1.5"), 1)]
)
def test_a_group_is_one_however_its_value_is_written(values: tuple[Any, ...], groups: int) -> None:
    assert len({group_name(value) for value in values}) == groups
