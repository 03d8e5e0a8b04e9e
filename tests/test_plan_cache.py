"""Prices and simulations taken over from an earlier run are those a fresh run would give, and hold no text."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from planner.price_data import _look_up, look_up
from planner.prices import api_price
from unshot.cache import cached


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNSHOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("UNSHOT_NO_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "plan"


def test_a_price_is_kept_for_its_day_and_one_by_the_hour_for_half_an_hour(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    day = datetime(2026, 11, 26, tzinfo=UTC)
    hours = [day + timedelta(hours=h) for h in range(24)]
    fresh = []
    for hour in hours:
        found = _look_up("deepseek-chat", hour)
        assert found is not None and found.standard["input"] is not None
        fresh.append(found.standard["input"][0][1])
    assert len(set(fresh)) > 1
    for _ in range(2):
        assert [api_price("deepseek-chat", when=hour).input for hour in hours] == fresh
    first = api_price("gpt-4", when=hours[1])
    monkeypatch.setattr("planner.price_data._look_up", lambda *_: pytest.fail("looked up again"))
    assert api_price("gpt-4", when=hours[20]) == first
    assert look_up("gpt-4", hours[20]).id == "gpt-4"


def test_a_damaged_or_unwritable_cache_changes_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def compute() -> int:
        calls.append(1)
        return 7

    assert [cached("x", 1, compute), cached("x", 1, compute)] == [7, 7] and len(calls) == 1
    for path in cache.glob("x-*"):
        path.write_text("{half", encoding="utf-8")
    assert cached("x", 1, compute) == 7 and len(calls) == 2
    (cache.parent / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("UNSHOT_CACHE", str(cache.parent / "file"))
    assert cached("x", 1, compute) == 7 and len(calls) == 3
    monkeypatch.setenv("UNSHOT_NO_CACHE", "1")
    assert cached("x", 1, compute) == 7 and len(calls) == 4
