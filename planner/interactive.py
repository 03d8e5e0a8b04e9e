"""`unshot plan --interactive`: ask for what the case leaves open and the verdict hangs on; write it into the case."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from msgspec.structs import replace

from planner import price_data
from unshot.case import Case
from unshot.case_file import keys
from unshot.data.files import write_text
from unshot.errors import InputError
from unshot.flags import option_settings

# Asked in this order, where the case has no value of its own.
QUESTIONS = (
    "task.fails", "baseline.api", "traffic.rate", "traffic.reasoning_tokens", "traffic.slo.ttft_ms", "task.current",
    "task.target", "task.examples_at_hand",
)  # fmt: skip


def value_of(case: Case, name: str) -> Any:
    """What a case has for a dotted key."""
    for part in name.split("."):
        case = getattr(case, part)
    return case


def silent(case: Case, name: str) -> bool:
    """Whether the case leaves a question open; what its other answers make pointless is not asked."""
    if value_of(case, name) != keys()[name].default:
        return False
    if name == "baseline.api":
        return case.baseline.model is None
    if name == "traffic.reasoning_tokens":
        return case.baseline.api is not None and price_data.reasons(case.baseline.api)
    return True


def ask(case: Case, path: Path) -> Case:
    """The case with the answers; an empty answer leaves a question open.

    What was answered is written to `path`; all that the case holds, where there is no such file yet. Raises
    `InputError` when the input ends.
    """
    answers: dict[str, Any] = {}
    for name in QUESTIONS:
        if not silent(case, name):
            continue
        value = _answer(name)
        if value in (None, [], ()):
            continue
        answers[name] = value
        case = _with(case, name.split("."), value)
    new = not path.is_file()
    kept = (
        {n: value_of(case, n) for n, key in keys().items() if value_of(case, n) != key.default} if new else {}
    )
    if kept or answers:
        write_text(path, with_values("" if new else path.read_text(encoding="utf-8"), {**kept, **answers}))
        click.echo(f"written to {path}: {', '.join({**kept, **answers})}", err=True)
    return case


def _with(record: Any, parts: list[str], value: Any) -> Any:
    """A copy of a record with one key, by its path, set."""
    first, *rest = parts
    return replace(record, **{first: _with(getattr(record, first), rest, value) if rest else value})


def _answer(name: str) -> Any:
    key = keys()[name]
    kind = option_settings(key)["type"]
    choices = f" ({', '.join(key.accepted())})" if key.accepted() else ""
    while True:
        try:
            text = click.prompt(
                f"{key.text.rstrip('.')}{choices} [{name}; empty: leave it open]",
                default="",
                show_default=False,
                err=True,
            ).strip()
        except click.Abort:
            click.echo(err=True)  # the question stands on a line of its own
            raise InputError(
                f"--interactive: the input ended before `{name}` was answered; nothing was written"
            ) from None
        if not text:
            return None
        try:
            found = kind.convert(text, None, None)
        except (click.BadParameter, InputError) as error:
            click.echo(f"  {getattr(error, 'message', error)}", err=True)
            continue
        return list(found) if isinstance(found, tuple) else found


def with_values(text: str, values: Mapping[str, Any]) -> str:
    """A case file's text with these keys set, each at the head of its table; comments and all else stay as they are."""
    for name, value in values.items():
        table, _, last = name.rpartition(".")
        line = f"{last} = {json.dumps(value if not isinstance(value, Path) else str(value), ensure_ascii=False)}\n"
        head = re.search(rf"(?m)^\[{re.escape(table)}\][^\n]*\n", text)
        if head is None:
            text = f"{text.rstrip()}\n\n[{table}]\n{line}".lstrip("\n")
        else:
            text = text[: head.end()] + line + text[head.end() :]
    return text
