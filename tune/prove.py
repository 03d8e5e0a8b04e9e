"""The chat template shown on the first rows, before anything is trained: what the model would see, and learn to say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import cast

from unshot.data.example import without_tools
from unshot.data.files import optional_object
from unshot.data.rows import Example, Message
from unshot.errors import InputError
from unshot.models import Source
from unshot.text.chat import Chat
from unshot.text.repair import thinks

ROWS = 8
WAY_OUT = "give a template that does (--chat-template FILE)"


def prove_template(
    chat: Chat, source: Source, rows: Sequence[Example], requests: Sequence[list[Message]]
) -> list[str]:
    """Check instruction, input, answer and end token on the first rows; return what there is to know, in words.

    `requests` are the messages with which the model is asked, of the rows that `rows_to_prove` picks. Raises
    `InputError`, naming the row and what to set, for a template that leaves out the instruction or the input, or that
    puts the answer into a thinking block.
    """
    notes: dict[str, None] = {}
    for row, messages in zip(rows, requests, strict=True):
        where = row.where or f"line {row.line}"
        text = chat.render(messages)
        wanted = [("instruction", m) for m in messages if m["role"] in ("system", "developer")]
        asked = [("input", m) for m in messages if m["role"] == "user"]
        wanted += asked[-1:] + [("earlier turns", m) for _, m in asked[:-1]]
        for what, message in wanted:
            if not _stands_in(str(message["content"]), text):
                raise InputError(f"{where}: the chat template leaves out the {what}; {WAY_OUT}")
        if any(m["role"] == "tool" and not _stands_in(m["content"], text) for m in messages):
            notes["it leaves out the tools' results: the model never sees them"] = None
        if row.tools and text == chat.render(cast("list[Message]", without_tools(messages)[0])):
            notes["it leaves out the rows' function definitions (`tools`): the model never sees them"] = None
        if opened := thinks(text):
            raise InputError(
                f"{where}: the prompt ends inside a {opened} block, where the answer would be thought and not said; "
                f"{WAY_OUT}"
            )
    return [*chat.tokenizer.repairs, *notes, *_ends(chat, source)]


def rows_to_prove(rows: Sequence[Example]) -> list[Example]:
    """The first rows; of the others the longest, and the first with several turns, function definitions and tools."""
    rest = rows[ROWS:]
    kinds: list[Callable[[Example], bool]] = [
        lambda row: len(row.messages) > 2,
        lambda row: bool(row.tools),
        lambda row: any(m["role"] == "tool" for m in row.messages),
    ]
    longest = sorted(rest, key=lambda row: -len(row.dialogue))[:1]
    return [*rows[:ROWS], *longest, *(row for kind in kinds for row in [r for r in rest if kind(r)][:1])]


def _stands_in(content: str, text: str) -> bool:
    """Whether a content is in a rendered prompt: blanks aside, as it is or as JSON has it."""
    forms = (content, json.dumps(content, ensure_ascii=False)[1:-1])
    squeezed = " ".join(text.split())
    return any(" ".join(form.split()) in squeezed for form in forms)


def _ends(chat: Chat, source: Source) -> list[str]:
    """What to know about the token that ends an answer."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = source.path / name
        ids = optional_object(path).get("eos_token_id")
        found += [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
    if not found or chat.end in found:
        return []
    others = ", ".join(repr(chat.tokenizer.token(i)) for i in dict.fromkeys(found))
    return [
        f"answers end with {chat.tokenizer.token(chat.end)!r}, while the base's own settings stop at {others}: exports "
        "stop at the first; a server that runs base and adapter must be told to"
    ]
