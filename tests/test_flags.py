"""Flags: the same forms on every command, and one line with exit code 2 for what is not one of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.conftest import ROOT
from unshot.case import Case
from unshot.case_file import FileText, keys, load_case, text_or_file
from unshot.cli import cli
from unshot.errors import InputError
from unshot.flags import FLAGS
from unshot.options import TEXT_OR_FILE, Names, Number, TextOrFile
from unshot.reference import walk

COMMANDS = [(path, command) for path, command in walk(cli, "unshot") if not isinstance(command, click.Group)]
COMMANDS += [
    (path, command) for path, command in walk(cli, "unshot") if path in ("unshot plan", "unshot bench")
]


def options(name: str) -> Iterator[tuple[str, click.Option]]:
    """The options called `name` of all commands."""
    for path, command in COMMANDS:
        for parameter in command.params:
            if isinstance(parameter, click.Option) and name in parameter.opts:
                yield path, parameter


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("prompt.txt", "Say yes."),
        ("./prompt.txt", "Say yes."),
        ("@prompt.txt", "Say yes."),
        ("prompt", "No suffix."),
        ("Classify the clause.", "Classify the clause."),
        ("Answer yes/no", "Answer yes/no"),
        ("yes/no", "yes/no"),
        ("", ""),
        ("x" * 5000, "x" * 5000),
        ("the file is prompt.txt\n", "the file is prompt.txt\n"),
        ("folder", "folder"),
        ("a\0b", "a\0b"),
    ],
)
def test_a_text_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, found: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.txt").write_text("Say yes.\n")
    (tmp_path / "prompt").write_text("No suffix.")
    (tmp_path / "folder").mkdir()
    text = text_or_file(value)
    assert text == found
    assert isinstance(text, FileText) == (found in ("Say yes.", "No suffix."))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("promt.txt", "promt.txt: no such file"),
        ("my prompt.md", "my prompt.md: no such file"),
        ("./prompt", "no such file"),
        ("/nowhere/prompt", "/nowhere/prompt: no such file"),
        ("@prompt", "no such file"),
        ("./folder", "is a directory"),
        ("empty.txt", "empty.txt: empty"),
        ("latin.txt", "not UTF-8"),
        ("prompt.docx", "prompt.docx: no such file"),
        ("'prompt.py'", "no such file"),
        ("folder/v2", "folder/v2: no such file"),
    ],
)
def test_what_looks_like_a_path_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=re.escape(words)):
        text_or_file(value)


def test_an_instruction_is_read_from_its_file_by_every_command() -> None:
    found = {path: option for name in ("--instruction", "--system") for path, option in options(name)}
    assert {"unshot plan", "unshot tune", "unshot bench", "unshot bench load"} <= set(found)
    for path, option in found.items():
        assert isinstance(option.type, TextOrFile), path


def test_the_case_file_reads_a_text_from_a_file_beside_it_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from unshot.console import Output

    (tmp_path / "prompt.txt").write_text("Say yes.\n")
    path = tmp_path / "unshot.toml"
    path.write_text('[task]\nsystem = "prompt.txt"\ninstruction = "Answer."\n')
    case = load_case(path, out=Output())
    assert (case.task.system, case.task.instruction) == ("Say yes.", "Answer.")
    assert "task.system: read from" in capsys.readouterr().err
    path.write_text('[task]\nsystem = "promt.txt"\n')
    with pytest.raises(InputError, match=r"unshot.toml: `task.system`: .*promt.txt: no such file"):
        load_case(path)
    given = TEXT_OR_FILE.convert(str(tmp_path / "prompt.txt"), None, None)
    case = load_case(None, {"task.instruction": given}, Output())
    assert case.task.instruction == "Say yes." and type(case.task.instruction) is str
    assert "instruction: read from" in capsys.readouterr().err
    json.dumps(case.plain())


@pytest.mark.parametrize("name", sorted(FLAGS))
def test_a_flag_means_its_key_and_takes_one_form_on_every_command(name: str) -> None:
    """A command that needs its own bounds (a default, a least number) still takes the same kind of value."""
    assert FLAGS[name] == "bench.claim" or FLAGS[name] in keys()
    kinds = {path: type(option.type).__name__ for path, option in options(name)}
    assert kinds, f"no command has {name}"
    forms = set(kinds.values())
    assert len(forms) == 1, kinds


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=[path for path, _ in COMMANDS])
def test_every_number_is_bounded_and_finite(path: str, command: click.Command) -> None:
    for parameter in command.params:
        assert not isinstance(parameter.type, click.types.FloatParamType | click.types.IntParamType), (
            parameter.name
        )
        assert not isinstance(parameter.type, click.Path), (
            f"{parameter.name}: unshot.options.PATH refuses an empty one"
        )


@pytest.mark.parametrize("value", ["nan", "NaN", "inf", "-inf", "1e999", "", "x", "1,5", "0x1", "9" * 5000])
@pytest.mark.parametrize("kind", [Number(), Number(ge=0, whole=True), Number(gt=0, le=1)])
def test_a_number_is_finite_and_in_bounds(kind: Number, value: str) -> None:
    with pytest.raises(click.UsageError, match="expected a"):
        kind.convert(value, None, None)


def test_numbers_and_names() -> None:
    assert Number(ge=0).convert("1e3", None, None) == 1000
    assert Number(whole=True).convert("12", None, None) == 12
    assert Names().convert("a, b", None, None) == ["a", "b"]
    for bad in ("a,,b", "", ","):
        with pytest.raises(click.BadParameter):
            Names().convert(bad, None, None)
    with pytest.raises(click.BadParameter, match="did you mean cost"):
        Names(lambda: ("cost", "latency")).convert("costs", None, None)


def test_every_key_is_about_something_and_its_sample_is_valid() -> None:
    for key in keys().values():
        assert key.text.endswith("."), key.name
        for value in (key.init, key.sample):
            if value is not None:
                *sections, last = key.name.split(".")
                raw: dict[str, object] = {last: value}
                for section in reversed(sections):
                    raw = {section: raw}
                Case.of(raw)


def test_every_flag_of_the_case_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "unshot.toml"
    path.write_text("[tune]\nrank = 4\n[traffic.slo]\nttft_ms = 5\n")
    case = load_case(path, {"tune.rank": 8, "traffic.slo.e2e_ms": 9.0, "tune.epochs": None})
    assert (case.tune.rank, case.traffic.slo.ttft_ms, case.traffic.slo.e2e_ms) == (8, 5, 9)
    assert case.tune.epochs == 5


def test_the_demo_case_is_read() -> None:
    assert load_case(ROOT / "unshot" / "demo" / "unshot.toml").candidate.gpu == ["cpu"]
