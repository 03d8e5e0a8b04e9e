"""The case file and `unshot init`."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import fields

from unshot.case import Case, load_case
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
