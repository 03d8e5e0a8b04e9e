"""Lists that several processes append to: a line torn by a kill is cut off, and costs no other line."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from unshot.contracts.gates import Gate, add_gate, read_gates
from unshot.contracts.manifest import Manifest
from unshot.data.example import Example
from unshot.data.files import append_after
from unshot.data.seal import folder, record_reading


def test_a_gate_after_a_torn_line_is_read(tmp_path: Path) -> None:
    Manifest("tune").finish(tmp_path)
    add_gate(tmp_path, Gate("review", True, "first"))
    with (tmp_path / "gates.jsonl").open("a") as handle:
        handle.write('{"name": "hum')
    add_gate(tmp_path, Gate("claim", False, "second"))
    assert {name: gate.passed for name, gate in read_gates(tmp_path).items()} == {
        "review": True,
        "claim": False,
    }


def test_a_torn_reading_does_not_swallow_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSHOT_DATA", str(tmp_path))
    rows = [Example(({"role": "user", "content": "x"},), "y", 1)]
    assert record_reading(rows, "tune", tmp_path / "a").before == 0
    path = next((folder() / "readings").iterdir())
    with path.open("a") as handle:
        handle.write('{"at": "2026')
    seen = record_reading(rows, "eval", tmp_path / "b")
    assert (seen.before, seen.others) == (1, 1)
    assert (again := record_reading(rows, "eval", tmp_path / "b")).before == 2 and again.runs == 2


def test_each_line_sees_all_before_it(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    threads = [
        threading.Thread(target=append_after, args=(path, lambda lines: json.dumps(len(lines))))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [json.loads(line) for line in path.read_text().splitlines()] == list(range(8))
