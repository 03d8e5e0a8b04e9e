"""The registries of engines and servers: help, checks and docs are made from them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from unshot.engines.registry import ENGINES, open_engine, parse_spec, spec_forms
from unshot.engines.server import SERVERS, serve_forms
from unshot.errors import InputError

ROOT = Path(__file__).parent.parent


def test_the_docs_list_what_the_registries_hold() -> None:
    table = re.findall(
        r"^\| `([^`]+)` \| (.+) \|$", (ROOT / "docs" / "bench.md").read_text(), flags=re.MULTILINE
    )
    forms = {kind.form: kind.runs for kind in ENGINES.values()}
    forms |= {f"serve:{kind.form}": kind.runs for kind in SERVERS.values()}
    shown = dict(table)
    assert {form: shown.get(form) for form in forms} == forms


def test_every_accepted_kind_opens_something_of_its_own() -> None:
    for name, kind in ENGINES.items():
        assert parse_spec(f"{name}:x") == (name, "x")
        assert kind.form in spec_forms()
        with pytest.raises(InputError):
            open_engine(f"{name}:/no/such/model")
    assert len({kind.implementation for kind in ENGINES.values()}) == len(ENGINES)
    assert all(f"serve:{name}:" in serve_forms() for name in SERVERS)
