"""Pipes, devices, links in circles and names that are too long in the place of every file that a command reads."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Run
from unshot.contracts.gates import read_gates
from unshot.contracts.manifest import staged
from unshot.contracts.record import RecordError
from unshot.contracts.request_log import Feedback, Request, read_requests
from unshot.data.files import raw_rows, read_text
from unshot.errors import InputError

Make = Callable[[Path], None]


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


# What may stand where a file should: reading some of it never ends.
ODD: dict[str, Make] = {
    "pipe": os.mkfifo,
    "socket": _socket,
    "zero": lambda path: path.symlink_to("/dev/zero"),
    "circle": lambda path: path.symlink_to(path.name),
    "nowhere": lambda path: path.symlink_to("/nowhere/at/all"),
    "unreadable": lambda path: path.symlink_to("/proc/self/mem"),
    "directory": Path.mkdir,
}


@pytest.fixture(autouse=True)
def _ends() -> Iterator[None]:
    """A read that never ends fails the test."""

    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("read", [read_text, lambda path: list(raw_rows(path))], ids=["text", "rows"])
def test_what_is_no_file_is_refused(read: Callable[[Path], object], kind: str, tmp_path: Path) -> None:
    ODD[kind](tmp_path / "x.jsonl")
    with pytest.raises(InputError, match=r"x\.jsonl: "):
        read(tmp_path / "x.jsonl")


@pytest.mark.parametrize("kind", ODD)
def test_a_log_file_that_is_none_is_refused(kind: str, tmp_path: Path) -> None:
    ODD[kind](tmp_path / "requests-20260101.jsonl")
    with pytest.raises(InputError, match=r"requests-20260101\.jsonl: "):
        list(read_requests(tmp_path))


@pytest.mark.parametrize("kind", sorted({*ODD} - {"directory", "nowhere", "unreadable"}))
def test_what_is_no_directory_is_not_written_to(kind: str, tmp_path: Path) -> None:
    ODD[kind](tmp_path / "o")
    for name in ("o", "o/x"):
        with pytest.raises(InputError), staged(tmp_path / name):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


@pytest.mark.parametrize("kind", ["pipe", "zero", "circle", "socket"])
@pytest.mark.parametrize(
    "line",
    [
        ("plan", "--case", "x"),
        ("plan", "--prompt", "x", "--rate", "1"),
        ("data", "check", "x"),
        ("data", "split", "d.jsonl", "--out", "x"),
        ("deploy", "ab", "x"),
        ("deploy", "registry", "list", "--store", "x"),
        ("deploy", "registry", "init", "--store", "x"),
        ("init", "x", "--overwrite"),
        ("tune", "x", "--base", "b", "--out", "o"),
    ],
    ids=" ".join,
)
def test_a_command_line_that_names_one_is_bad_input(
    line: tuple[str, ...], kind: str, tmp_path: Path, unshot: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ODD[kind](tmp_path / "x")
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 5)
    done = unshot(*line, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["a/" * 3000 + "x", "\udcff" * 200, "a" * 300])
def test_a_path_that_no_file_can_have_is_bad_input(name: str, tmp_path: Path, unshot: Run) -> None:
    done = unshot("deploy", "registry", "init", "--store", name, cwd=tmp_path)
    assert done.returncode in (0, 2) and len(done.stderr) < 400
    assert "internal" not in done.stderr


@pytest.mark.parametrize(
    "text",
    [
        '{"id": 5, "id": "x"}',
        '{"id": "a", "time": "x", "time": {"a": 1}}',
        '{"id": {"b": 1}, "id": []}',
        '{"id": "a", "time": [1], "time": null}',
    ],
)
def test_a_key_that_stands_twice_is_an_odd_record(text: str) -> None:
    for kind in (Request, Feedback):
        with pytest.raises(RecordError):
            kind.from_json(text)


def test_a_gate_whose_key_stands_twice_is_bad_input(tmp_path: Path) -> None:
    manifest = {"version": 2, "stage": "tune"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "gates.jsonl").write_text('{"name": "quality", "figures": [1], "figures": {"a": 1}}\n')
    with pytest.raises(InputError, match="gates cannot be read"):
        read_gates(tmp_path)
