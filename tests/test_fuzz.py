"""Seeded fuzzing of the gateway and of the command line; `make fuzz` goes on for an hour."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("aiohttp")

from tests.fuzz import fuzz_files, fuzz_lines, fuzz_requests


@pytest.mark.cli
def test_a_thousand_odd_requests_are_all_answered_and_break_nothing(tmp_path: Path) -> None:
    faults = fuzz_requests(tmp_path, 21, 1000)
    assert not faults, "\n".join(faults[:20])


def test_a_thousand_odd_command_lines_end_as_documented(tmp_path: Path) -> None:
    faults = fuzz_lines(tmp_path / "work", 21, 1000)
    assert not faults, "\n".join(faults[:20])


@pytest.mark.slow
def test_damaged_files_end_every_command_as_documented(tmp_path: Path) -> None:
    faults = fuzz_files(tmp_path, 21, 100)
    assert not faults, "\n".join(faults[:20])
