"""Requests to an OpenAI-compatible API, chat and completions; `bench/answer.py` reads the streams that come back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from unshot.data.example import without_tools
from unshot.data.rows import Message
from unshot.engines.address import Address
from unshot.engines.http import request_bytes

CHAT, COMPLETIONS = "chat", "completions"
PATHS = {CHAT: "/chat/completions", COMPLETIONS: "/completions"}
LIMITS = ("max_tokens", "max_completion_tokens")
# A decoded JSON value; what a server sends is taken apart with care below.
Json = Any


@dataclass(frozen=True)
class Api:
    """How to talk to one server.

    `limit_field` is the name under which it takes the longest answer's tokens; `ask_usage` False if it refuses to be
    asked for its token counts.
    """

    address: Address
    model: str
    kind: str = CHAT
    key: str | None = field(default=None, repr=False)
    extra: Mapping[str, Json] = field(default_factory=dict)
    limit_field: str = LIMITS[0]
    ask_usage: bool = True

    @property
    def url(self) -> str:
        """The base URL, without key."""
        return f"{'https' if self.address.tls else 'http'}://{self.address.authority}{self.address.path}"

    def adapted(self, error: str | None, detail: str | None) -> Api | None:
        """This API without a field that the server has just refused (HTTP 400, by name); None if it is not that.

        OpenAI's newer models take `max_completion_tokens` alone, and older servers know no `stream_options`.
        """
        if error not in ("http 400", "http 422") or detail is None:
            return None
        if self.limit_field == LIMITS[0] and LIMITS[1] in detail:
            return replace(self, limit_field=LIMITS[1])
        if self.ask_usage and "stream_options" in detail:
            return replace(self, ask_usage=False)
        return None

    def limit(self, max_tokens: int) -> int | None:
        """The longest answer that is asked for, tokens: what `extra` says by any name, else `max_tokens`."""
        asked = next((self.extra[name] for name in LIMITS if name in self.extra), max_tokens)
        return asked if isinstance(asked, int) else None

    def request(self, prompt: Sequence[Message] | str, max_tokens: int) -> bytes:
        """A greedy streaming request: messages for chat, a text for completions."""
        return self.wrap(self.body(prompt, max_tokens))

    def body(self, prompt: Sequence[Message] | str, max_tokens: int) -> bytes:
        """The request's JSON alone. A length that `extra` asks for by any name stands in place of `max_tokens`."""
        limit = {} if any(name in self.extra for name in LIMITS) else {self.limit_field: max_tokens}
        text: dict[str, Json] = {"prompt": prompt}
        if self.kind == CHAT and not isinstance(prompt, str):
            messages, tools = without_tools(prompt)
            text = {"messages": messages, **({"tools": tools} if tools else {})}
        body: dict[str, Json] = {
            "model": self.model,
            **limit,
            "temperature": 0,
            "stream": True,
            **({"stream_options": {"include_usage": True}} if self.ask_usage else {}),
            **self.extra,
            **text,
        }
        return json.dumps(body, ensure_ascii=False).encode()

    def wrap(self, body: bytes) -> bytes:
        """The whole request of a body: path, headers, and the key where there is one."""
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        return request_bytes(self.address, PATHS[self.kind], body, headers)


def served_models(body: bytes) -> list[list[str]]:
    """The models in an answer of `/models`, each by its names: id, files, an adapter's base. None if it is not one."""
    try:
        entries = json.loads(body)["data"]
        named = [[entry.get(k) for k in ("id", "root", "parent")] for entry in entries]
        return [
            [name for name in names if isinstance(name, str)] for names in named if isinstance(names[0], str)
        ]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
