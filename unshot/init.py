"""`unshot init`: write a commented case file, made from the case's records."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from unshot.case import Case
from unshot.case_file import Key, keys
from unshot.console import Output
from unshot.data.files import write_text
from unshot.errors import InputError
from unshot.options import PATH, common

HEAD = """\
# One case: a long few-shot prompt, its traffic, and the small model that it would move into.
# `unshot plan`, `tune`, `export` and `bench` read this file; flags override it. Paths are relative to it.
# A line that begins with "#" and a key shows the default, or what could stand there where there is none.
"""


def template() -> str:
    """The commented case file: every key with what it means, its accepted values, and its default or a sample."""
    lines = [HEAD.rstrip()]
    section = ""
    for key in keys().values():
        table, _, name = key.name.rpartition(".")
        if table != section:
            section = table
            lines += ["", *_comment(_about(table)), f"[{table}]"]
        lines += _comment(meaning(key))
        if key.init is not None:
            lines.append(f"{name} = {as_toml(key.init)}")
        else:
            lines.append(f"# {name} = {as_toml(shown(key))}")
    return "\n".join(lines) + "\n"


def shown(key: Key) -> Any:
    """What a key's line shows: its default, or a sample where there is none."""
    return key.sample if key.default in (None, []) else key.default


def meaning(key: Key) -> str:
    """What a key means, and the values that it accepts if they are enumerated."""
    accepted = key.accepted()
    return f"{key.text} Accepted: {', '.join(accepted)}." if accepted else key.text


def _about(table: str) -> str:
    """What the records say about a table."""
    record: Any = Case()
    for part in table.split("."):
        record = getattr(record, part)
    return " ".join((type(record).__doc__ or "").split())


def _comment(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, 98, initial_indent="# ", subsequent_indent="# ")


def as_toml(value: Any) -> str:
    """A value as TOML: JSON's form of texts, numbers, lists, true and false is TOML's as well."""
    return json.dumps(value, ensure_ascii=False, default=str)


@click.command()
@click.argument("path", type=PATH, default=Path("unshot.toml"))
@click.option("--overwrite", is_flag=True, help="Replace the file where it exists.")
@common
def init(path: Path, overwrite: bool, out: Output) -> None:
    """Write a commented case file to PATH (default ./unshot.toml)."""
    if path.is_dir():
        path = path / "unshot.toml"
    if path.exists() and not overwrite:
        raise InputError(f"{path}: already there; choose another name or pass --overwrite")
    write_text(path, template())
    out.result({"path": str(path)}, f"wrote {path}; edit it, then run `unshot plan --case {path}`")
