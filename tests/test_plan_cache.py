"""Counts and prices taken over from an earlier run are those a fresh run would give, and hold no text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from planner.count import Counts
from planner.prices import _lookup, api_price
from planner.settings import Settings
from tests.conftest import ROOT
from tests.planner_files import few_shot, inputs, model_folder
from unshot.case import Case, load_case
from unshot.memo import remember
from unshot.text.tokenizers import Paths


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNSHOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("UNSHOT_NO_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "plan"


def case(folder: Path, shots: int = 12) -> Case:
    prompt, rows = few_shot(folder / "shots.jsonl", shots), inputs(folder / "inputs.jsonl")
    given = {"task.examples": prompt, "task.inputs": rows, "task.system": "A secret system prompt."}
    return load_case(None, {**given, "baseline.model": "smollm2-135m", "candidate.model": "smollm2-135m"})


def count(found: Case, model: Path) -> Any:
    counts = Counts(found, Settings(paths=Paths.parse([str(model)])))
    return counts.usage("smollm2-135m", "long", api=False)


def test_counts_are_taken_over_and_equal(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_folder(tmp_path / "model")
    fresh = count(case(tmp_path), model)
    assert list(cache.glob("tokens-*.json"))
    # The second run must not need the tokenizer at all.
    monkeypatch.setattr("planner.count.counter_for", lambda *_, **__: pytest.fail("counted again"))
    assert count(case(tmp_path), model) == fresh


def test_another_prompt_or_tokenizer_is_counted_anew(cache: Path, tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    first = count(case(tmp_path, 12), model)
    assert count(case(tmp_path, 13), model).prefix > first.prefix
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = "{{ bos_token }}" * 50 + config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert count(case(tmp_path, 12), model).prefix == first.prefix + 50


def test_a_price_is_kept_for_its_day_and_one_by_the_hour_for_half_an_hour(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    day = datetime(2026, 11, 26, tzinfo=UTC)
    hours = [day + timedelta(hours=h) for h in range(24)]
    fresh = [_lookup("deepseek-chat", hour)["standard"]["input"][0][1] for hour in hours]
    assert len(set(fresh)) > 1
    for _ in range(2):
        assert [api_price("deepseek-chat", when=hour).input for hour in hours] == fresh
    first = api_price("gpt-4", when=hours[1])
    monkeypatch.setattr("planner.prices._lookup", lambda *_: pytest.fail("looked up again"))
    assert api_price("gpt-4", when=hours[20]) == first


def test_no_text_is_kept(cache: Path, tmp_path: Path) -> None:
    count(case(tmp_path), model_folder(tmp_path / "model"))
    for path in cache.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "secret" not in text and "Clause" not in text and "supplier" not in text


def test_a_damaged_or_unwritable_cache_changes_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def compute() -> int:
        calls.append(1)
        return 7

    assert [remember("x", 1, compute), remember("x", 1, compute)] == [7, 7] and len(calls) == 1
    for path in cache.glob("x-*"):
        path.write_text("{half", encoding="utf-8")
    assert remember("x", 1, compute) == 7 and len(calls) == 2
    (cache.parent / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("UNSHOT_CACHE", str(cache.parent / "file"))
    assert remember("x", 1, compute) == 7 and len(calls) == 3
    monkeypatch.setenv("UNSHOT_NO_CACHE", "1")
    assert remember("x", 1, compute) == 7 and len(calls) == 4


AHEAD = """
import os, sys
from unshot.memo import ahead, remember

parent = os.getpid()

def where():
    return os.getpid()

def broken():
    if os.getpid() != parent:
        print("from the child")
        raise ValueError("seen by nobody")
    return "made here"

threaded = [__import__(name) for name in sys.argv[1:]]
ahead([("a", 1, where), ("a", 2, where)])
ahead([("b", 1, broken)])
found = [remember("a", n, where) for n in (1, 2)]
print([pid == parent for pid in found], found[0] == found[1], remember("b", 1, broken))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="forks on Linux, with two cores"
)
def test_what_is_computed_ahead_is_taken_over_and_what_fails_there_is_made_here(cache: Path) -> None:
    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", AHEAD, *arguments], capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        return done.stdout

    assert run("torch") == "[True, True] True made here\n"
    for path in cache.iterdir():
        path.unlink()
    assert run() == "[False, False] True made here\n"
    # What the cache holds starts no process.
    assert run() == "[False, False] True made here\n"


def test_a_plan_counted_ahead_is_the_plan_counted_in_turn(cache: Path, tmp_path: Path) -> None:
    prompt, model = few_shot(tmp_path / "shots.jsonl", 12), model_folder(tmp_path / "model")
    flags = [
        "--prompt",
        str(prompt),
        "--rate",
        "5",
        "--model",
        "smollm2-135m",
        "--baseline-model",
        "smollm2-135m",
    ]
    command = [
        sys.executable,
        "-m",
        "unshot",
        "plan",
        *flags,
        "--gpu",
        "l4",
        "--tokenizer",
        str(model),
        "--json",
    ]

    def run(**environment: str) -> str:
        given = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        return subprocess.run(command, env=given, capture_output=True, text=True, check=True).stdout

    assert run() == run(UNSHOT_NO_CACHE="1")
    assert list(cache.glob("tokens-*.json"))
