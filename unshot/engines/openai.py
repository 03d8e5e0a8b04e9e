"""The OpenAI-compatible API, chat and completions: requests, and what a finished stream says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from unshot.data.rows import Message
from unshot.engines.http import Address, Exchange, request_bytes

CHAT, COMPLETIONS = "chat", "completions"
PATHS = {CHAT: "/chat/completions", COMPLETIONS: "/completions"}


@dataclass(frozen=True)
class Api:
    """How to talk to one server."""

    address: Address
    model: str
    kind: str = CHAT
    key: str | None = field(default=None, repr=False)
    extra: dict[str, Any] = field(default_factory=dict)

    def request(self, prompt: Sequence[Message] | str, max_tokens: int) -> bytes:
        """A greedy streaming request: messages for chat, a text for completions."""
        return self.wrap(self.body(prompt, max_tokens))

    def body(self, prompt: Sequence[Message] | str, max_tokens: int) -> bytes:
        """The request's JSON alone."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }
        if self.kind == CHAT:
            body["messages"] = list(prompt)
        else:
            body["prompt"] = prompt
        return json.dumps(body, ensure_ascii=False).encode()

    def wrap(self, body: bytes) -> bytes:
        """The whole request of a body: path, headers, and the key where there is one."""
        headers = {"Accept": "text/event-stream"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        return request_bytes(self.address, PATHS[self.kind], body, headers)


@dataclass
class Answer:
    """A read stream: arrival time of each piece of text, the text, and the server's own counts."""

    times: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish: str | None = None
    ended: float = 0.0
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    error: str | None = None
    detail: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(self.texts)


def read_answer(exchange: Exchange, kind: str) -> Answer:
    """Read a finished exchange; a failure of any kind is in `error`."""
    answer = Answer(error=exchange.error, detail=exchange.detail)
    if answer.error is None and exchange.status != 200:
        answer.error = f"http {exchange.status}"
        answer.detail = b"".join(piece for _, piece in exchange.pieces)[:200].decode(errors="replace")
        return answer
    if "application/json" in exchange.headers.get("content-type", ""):
        _read_whole(exchange, kind, answer)
    else:
        _read_events(exchange, kind, answer)
    if answer.error is None and not answer.times:
        if answer.finish == "stop" and answer.ended:
            # The model's first token was its last: an answer, and its time is known.
            answer.times.append(answer.ended)
        else:
            answer.error, answer.detail = "empty", "the stream held no text"
    return answer


def _read_events(exchange: Exchange, kind: str, answer: Answer) -> None:
    """Server-sent events (WHATWG HTML, 9.2): one line of data an event, LF or CRLF."""
    tail = b""
    done = False
    for when, piece in exchange.pieces:
        lines = (tail + piece).replace(b"\r\n", b"\n").split(b"\n")
        tail = lines.pop()
        for line in lines:
            if not line.startswith(b"data:"):
                if line and not line.startswith((b":", b"event:", b"id:", b"retry:")):
                    _bad(answer, line)
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                done = True
            elif data:
                _read_chunk(data, when, kind, answer)
    if tail.strip() and answer.error is None and not done:
        _bad(answer, tail)
    if answer.error is None and not done and answer.finish is None:
        answer.error, answer.detail = "cut short", "the stream ended without a finish reason or [DONE]"


def _read_chunk(data: bytes, when: float, kind: str, answer: Answer) -> None:
    try:
        chunk = json.loads(data)
        if not isinstance(chunk, dict):
            raise ValueError("not an object")
    except ValueError:
        _bad(answer, data)
        return
    if chunk.get("error"):
        if answer.error is None:
            answer.error, answer.detail = "server error", str(chunk["error"])[:200]
        return
    _read_usage(chunk.get("usage"), answer)
    if "golden" in chunk:
        answer.extra["golden"] = chunk["golden"]
    for choice in chunk.get("choices") or ():
        part = choice.get("text") if kind == COMPLETIONS else (choice.get("delta") or {}).get("content")
        if part:
            answer.times.append(when)
            answer.texts.append(part)
        if choice.get("finish_reason"):
            answer.finish = choice["finish_reason"]
            answer.ended = when


def _read_whole(exchange: Exchange, kind: str, answer: Answer) -> None:
    """A server that does not stream: one JSON object; the first token is only known with the last."""
    if answer.error is not None:
        return
    try:
        loaded = json.loads(b"".join(piece for _, piece in exchange.pieces))
        choice = loaded["choices"][0]
        text = choice["text"] if kind == COMPLETIONS else choice["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        _bad(answer, exchange.pieces[0][1] if exchange.pieces else b"")
        return
    answer.times.append(exchange.pieces[-1][0])
    answer.texts.append(text or "")
    answer.finish = choice.get("finish_reason")
    answer.extra["not_streamed"] = True
    _read_usage(loaded.get("usage"), answer)


def _read_usage(usage: Any, answer: Answer) -> None:
    if not isinstance(usage, dict):
        return
    answer.prompt_tokens = _count(usage.get("prompt_tokens"), answer.prompt_tokens)
    answer.output_tokens = _count(usage.get("completion_tokens"), answer.output_tokens)
    details = usage.get("prompt_tokens_details")
    if isinstance(details, dict):
        answer.cached_tokens = _count(details.get("cached_tokens"), answer.cached_tokens)


def _count(value: Any, before: int | None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else before


def _bad(answer: Answer, data: bytes) -> None:
    if answer.error is None:
        answer.error = "bad stream"
        answer.detail = f"not a server-sent event with JSON: {data[:80].decode(errors='replace')!r}"
