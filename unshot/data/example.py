"""One row of a data file: a conversation up to the answer, the answer, and where it stood."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

ROLES = ("system", "user", "assistant", "tool", "developer")


class Message(TypedDict):
    """One turn of a conversation. `content` is text; "" for a turn that only calls tools."""

    role: str
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[list[Mapping[str, object]]]
    tool_call_id: NotRequired[str]
    # OpenAI's mark of an assistant turn: 0 where it must not be learnt.
    weight: NotRequired[int]
    # Function definitions of the whole request, on its first message (`with_tools`).
    tools: NotRequired[list[Mapping[str, object]]]


@dataclass(frozen=True)
class Example:
    """One row: what goes in (`messages`, without the final answer), the answer, and where it stood.

    `answer` is None for rows that have only an input. `extra` holds the row's other columns, `tools` the function
    definitions it came with, `where` the file and line as a message names them.
    """

    messages: tuple[Message, ...]
    answer: str | None
    line: int
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)
    tools: tuple[Mapping[str, object], ...] = ()
    where: str = field(default="", compare=False)

    @property
    def text(self) -> str:
        """The user's text: the content of the last user message."""
        for message in reversed(self.messages):
            if message["role"] == "user":
                return message["content"]
        return self.messages[-1]["content"] if self.messages else ""

    @property
    def system(self) -> str:
        """The row's own system prompt; "" where it has none."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else ""

    @property
    def dialogue(self) -> str:
        """Every turn of the input but the system prompt, one after the other."""
        return "\n".join(_content(m) for m in self.messages[bool(self.system) :])

    @property
    def identity(self) -> str:
        """What makes two inputs the same: the whole conversation before the answer."""
        return "\n".join(_content(m) for m in self.messages)

    @property
    def by_teacher(self) -> bool:
        """Whether a model labelled the row (`unshot data label`) and no person has judged it."""
        return self.extra.get("labelled_by") == "teacher"

    @property
    def synthetic(self) -> bool:
        """Whether a model wrote the input too: such a row is never tested on."""
        return self.extra.get("synthetic") is True

    def row(self) -> dict[str, Any]:
        """The row as unshot writes it: `{"messages": [...]}`, plus the other columns."""
        messages = list(self.messages)
        if self.answer is not None:
            messages.append({"role": "assistant", "content": self.answer})
        tools = {"tools": list(self.tools)} if self.tools else {}
        return {"messages": messages, **tools, **self.extra}


@dataclass(frozen=True)
class Fault:
    """A malformed row: its line (as an editor counts; the row's number where there are no lines), and what is wrong."""

    line: int
    problem: str
    where: str = field(default="", compare=False)


def normal(text: str) -> str:
    """A text as it is compared: without outer white space, in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", text.strip())


def fold(text: str) -> str:
    """`text` with case, white space and Unicode's form (NFC) folded: what makes two inputs equal."""
    return " ".join(normal(text).casefold().split())


def with_tools(messages: list[Message], tools: Sequence[Mapping[str, object]]) -> list[Message]:
    """A request that carries function definitions, so that every renderer and server gets them."""
    return [{**messages[0], "tools": list(tools)}, *messages[1:]] if tools and messages else messages


def without_tools(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """The messages alone, and the function definitions that they carry; None where there are none."""
    plain = [{k: v for k, v in message.items() if k != "tools"} for message in messages]
    return plain, next((m["tools"] for m in messages if m.get("tools")), None)


def _content(message: Message) -> str:
    calls = message.get("tool_calls")
    return message["content"] + (json.dumps(calls, sort_keys=True) if calls else "")
