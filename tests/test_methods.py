"""The registry of tuning methods: what names a method anywhere is made from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tune.base import Shape
from tune.defaults import choose_defaults, learning_rate
from unshot.case import TuneSettings
from unshot.case_file import keys
from unshot.errors import OutsideError
from unshot.methods import METHODS

SHAPE = Shape("llama", 2048, 24, 32_000, 8192, 4096, 0)


def test_the_flag_and_the_case_file_accept_the_registered_methods() -> None:
    assert set(keys()["tune.method"].accepted()) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_prepared_explained_and_rated(name: str) -> None:
    assert callable(METHODS[name].prepare())
    defaults = choose_defaults(TuneSettings(method=name), SHAPE, 100)
    assert METHODS[name].reason in defaults.reasons["trained"] and "{" not in defaults.reasons["trained"]
    assert defaults.learning_rate == learning_rate(name, 2048)[0] > 0


def test_the_docs_name_every_method() -> None:
    text = (Path(__file__).parent.parent / "docs" / "tune.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in METHODS)


def test_what_a_method_needs_is_said_before_any_work() -> None:
    with pytest.raises(OutsideError, match="NVIDIA GPU"):
        METHODS["qlora"].check("cpu")
    METHODS["lora"].check("cpu")
