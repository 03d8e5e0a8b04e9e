"""The case file and `unshot init`."""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import fields

from tests.conftest import run_unshot
from unshot.case import Case
from unshot.case_file import load_case
from unshot.contracts.record import Record
from unshot.errors import InputError
from unshot.init import template


def sections(model: type[Record], path: str = "") -> Iterator[tuple[str, str]]:
    """Every `(table, key)` of the case file."""
    for field in fields(model):
        if isinstance(field.type, type) and issubclass(field.type, Record):
            yield from sections(field.type, f"{path}.{field.name}".strip("."))
        elif path:  # [gpu.NAME] and [model.NAME] are tables of the user's own names
            yield path, field.name


def test_the_template_mentions_every_key_and_its_values_are_valid(tmp_path: Path) -> None:
    text = template()
    for table, key in sections(Case):
        start = text.index(f"\n[{table}]")
        end = text.find("\n[", start + 1)
        assert f"\n{key} = " in text[start:end].replace("\n# ", "\n"), (
            f"[{table}] {key} is not in the template"
        )
    path = tmp_path / "unshot.toml"
    path.write_text(text)
    case = load_case(path)
    assert case.traffic.rate == 5.0
    assert case.task.examples == tmp_path / "few_shot.jsonl"


def test_commented_keys_of_the_template_are_valid_too() -> None:
    Case.of(tomllib.loads(re.sub(r"^# (\w+ = )", r"\1", template(), flags=re.MULTILINE)))


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "case.toml"
    path.write_text("[traffic]\nrate = 3\npeak_factor = 4\n")
    case = load_case(path, {"traffic.rate": 9.0, "traffic.peak_factor": None})
    assert (case.traffic.rate, case.traffic.peak_factor) == (9.0, 4.0)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[traffic]\nrate = 0\n", ("traffic.rate", "0", "expected a number > 0")),
        ("[traffic]\nrate = nan\n", ("traffic.rate", "NaN")),
        ("[traffic]\nrate = inf\n", ("traffic.rate", "finite")),
        ("[traffic]\nrate = 'two'\n", ("traffic.rate", '"two"', "expected a number")),
        ("[task]\ndata = 3\n", ("task.data", "3", "path")),
        ("[traffic]\nrat = 1\n", ("traffic.rat", "did you mean rate")),
        ("[tune]\nmethod = 'lorra'\n", ("tune.method", "lorra", "'lora'", "'dora'")),
        ("[task]\nmetric = 'f1'\n", ("task.metric", "'macro_f1'")),
        ("[traffic.slo]\npercentile = 100\n", ("traffic.slo.percentile", "< 100")),
        ("[traffic\n", ("not valid TOML", "line 1")),
    ],
)
def test_an_error_names_file_key_and_accepted_values(
    tmp_path: Path, text: str, parts: tuple[str, ...]
) -> None:
    path = tmp_path / "case.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_case(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    for part in parts:
        assert part in message


ODD = {
    "deep": "a = " + "[" * 3000 + "]" * 3000,
    "deep tables": "[" + ".".join(["a"] * 3000) + "]",
    "huge integer": "[tune]\nrank = " + "9" * 400,
    "huge number": "[traffic]\nrate = " + "9" * 400,
    "too many digits": "[tune]\nrank = " + "9" * 5000,
    "date": "[tune]\nlearning_rate = 1979-05-27",
    "section is a value": "task = 3",
    "key is a table": "[tune.rank]\nx = 1",
    "list of lists": 'export = {to = [["gguf:q8_0"]]}',
    "list with a number": "[candidate]\ngpu = [3]",
    "NUL in a text": '[task]\nname = "a\\u0000b"',
    "NUL in a path": '[task]\ndata = "a\\u0000b"',
    "NUL in a list": '[candidate]\ngpu = ["a\\u0000b"]',
    "empty path": '[task]\ndata = ""',
    "empty model": '[candidate]\nmodel = " "',
    "claim upside down": "[bench.claim]\nlow = 5\nhigh = 2",
    "no list at all": "[export]\nto = []",
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_case_file_is_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "case.toml"
    path.write_text(ODD[name] + "\n")
    done = run_unshot("plan", "--case", path, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {path}: ") and done.stderr.count("\n") == 1, done.stderr


@given(st.text(max_size=60))
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_a_case_file_or_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "case.toml"
    path.write_text(text, encoding="utf-8", errors="replace")
    with contextlib.suppress(InputError):
        load_case(path)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [("task.fails", '[" Cost", "FORMAT"]', ["cost", "format"]), ("candidate.engine", '" VLLM "', "vllm")],
)
def test_a_name_of_a_registry_is_read_in_any_case(tmp_path: Path, key: str, text: str, value: object) -> None:
    section, name = key.split(".")
    path = tmp_path / "unshot.toml"
    path.write_text(f"[{section}]\n{name} = {text}\n")
    assert getattr(getattr(load_case(path), section), name) == value


@pytest.mark.parametrize("labels", ['["a", "b", "a "]', '["caf\u00e9", "cafe\u0301"]', "[]"])
def test_labels_that_are_no_list_of_classes_are_refused(tmp_path: Path, labels: str) -> None:
    path = tmp_path / "unshot.toml"
    path.write_text(f"[task]\nlabels = {labels}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"twice|empty"):
        load_case(path)
