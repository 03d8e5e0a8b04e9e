"""Every option of every command with values that are none of its kind: refused in one line with exit code 2.

Random command lines are in `tests/fuzz.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.conftest import run_unshot
from tests.test_flags import COMMANDS
from unshot import options as kinds

NOT_NUMBERS = ("nan", "inf", "-inf", "1e999", "", " ", "x", "1,5", "[/red]", "\udcff", "9" * 5000)


def bad_values(parameter: click.Parameter) -> Iterator[str]:
    """Values that an option's type must refuse."""
    kind = parameter.type
    if isinstance(kind, kinds.Number):
        yield from NOT_NUMBERS
        for sign, bound, _ in kind.bounds:
            yield repr(bound - 1 if sign.startswith(">") else bound + 1)
            if len(sign) == 1:
                yield repr(bound)
        if kind.whole:
            yield "1.5"
    elif isinstance(kind, click.Choice):
        yield from ("", "no such choice", "[/red]", "\udcff")
    elif isinstance(kind, kinds.PathName | kinds.Text):
        yield from ("", " ")
    elif isinstance(kind, kinds.TextOrFile):
        yield from ("./none", "none.txt", "@none", "./folder", "binary.txt", "empty.md", "/")
    elif isinstance(kind, kinds.Price):
        yield from (
            "",
            "x",
            "1",
            "1,2,3,4",
            "input=nan,output=1",
            "input=-1,output=1",
            "none.toml",
            "binary.toml",
            "=",
        )
    elif isinstance(kind, kinds.Factor):
        yield from ("", "x", "10-5", "0-5", "nan-5", "5-inf", "-")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of all kinds."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.md").write_text("\n")
    return tmp_path


def one_line(code: int, err: str, line: str) -> None:
    assert code in (0, 1, 2, 3), f"exit code {code}: {line}"
    assert "internal error" not in err and "Traceback" not in err, f"{line}\n{err}"
    if code > 1:
        assert len([one for one in err.splitlines() if one.startswith("error: ")]) == 1, f"{line}\n{err}"


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=[path for path, _ in COMMANDS])
def test_a_value_of_another_kind_is_refused(path: str, command: click.Command, folder: Path) -> None:
    for parameter in command.params:
        if not isinstance(parameter, click.Option) or parameter.is_flag:
            continue
        for value in bad_values(parameter):
            words = [*path.split()[1:], f"{parameter.opts[0]}={value}"]
            done = run_unshot(*words, cwd=folder)
            one_line(done.returncode, done.stderr, f"{words}")
            assert done.returncode == 2, f"{words[:-1]} {words[-1][:80]}: {done.stderr}"
    assert {p.name for p in folder.iterdir()} == {"folder", "binary.txt", "binary.toml", "empty.md"}
