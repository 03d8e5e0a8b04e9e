"""The OpenAI-compatible API, chat and completions: requests, and what a finished answer says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from unshot.data.example import without_tools
from unshot.data.rows import Message
from unshot.engines.address import Address
from unshot.engines.http import Exchange, request_bytes
from unshot.engines.sse import DONE, EventParser

CHAT, COMPLETIONS = "chat", "completions"
PATHS = {CHAT: "/chat/completions", COMPLETIONS: "/completions"}
# Where servers put the model's reasoning: vLLM and SGLang first, newer vLLM and OpenRouter second.
REASONING = ("reasoning_content", "reasoning")
# Finish reasons of an answer that the model itself ended.
STOPPED = ("stop", "tool_calls", "function_call")
LIMITS = ("max_tokens", "max_completion_tokens")
# A decoded JSON value; what a server sends is taken apart with care below.
Json = Any
PieceKind = Literal["answer", "reasoning", "tool"]


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
        headers = {"Accept": "text/event-stream"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        return request_bytes(self.address, PATHS[self.kind], body, headers)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer that holds tokens: when it arrived, what it is, its text."""

    time: float
    kind: PieceKind
    text: str


@dataclass
class Answer:
    """A read answer: its pieces, how and when it ended, and the server's own counts (None: not given).

    `error` is the kind of failure, else None; `sent` what a golden server says it did and when.
    """

    pieces: list[Piece] = field(default_factory=list)
    finish: str | None = None
    ended: float = 0.0
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    error: str | None = None
    detail: str | None = None
    streamed: bool = True
    golden: Json = None

    def text_of(self, kind: PieceKind) -> str:
        """The text of all pieces of one kind."""
        return "".join(piece.text for piece in self.pieces if piece.kind == kind)

    @property
    def text(self) -> str:
        """The answer without its reasoning; of an answer that only calls tools, the calls' text."""
        return self.text_of("answer") or self.text_of("tool")

    @property
    def times(self) -> list[float]:
        """When each piece arrived, reasoning and tool calls included."""
        return [piece.time for piece in self.pieces]

    @property
    def first_answer(self) -> float | None:
        """When the first token of the answer itself came (a tool call is one); None where only reasoning did."""
        return next((piece.time for piece in self.pieces if piece.kind != "reasoning"), None)

    @property
    def stop_token_counted(self) -> bool:
        """Whether the server's count holds a stop token, which has no piece of its own.

        Told where the pieces are single tokens: then the count is one more than they are. Where a piece may hold
        several tokens it cannot be told, and the count is taken as it is.
        """
        return self.finish in STOPPED and self.output_tokens == len(self.pieces) + 1

    def fail(self, error: str, detail: str) -> None:
        """Note the first failure; later ones are its consequences."""
        if self.error is None:
            self.error, self.detail = error, detail[:300]


def read_answer(exchange: Exchange, kind: str) -> Answer:
    """Read a finished exchange. Whatever came, this returns: a failure of any kind is in `error`."""
    answer = Answer(error=exchange.error, detail=exchange.detail)
    if answer.error is None and exchange.status != 200:
        body = b"".join(piece for _, piece in exchange.pieces)
        answer.fail(f"http {exchange.status}", body[:200].decode(errors="replace"))
        return answer
    whole = "application/json" in exchange.headers.get("content-type", "")
    try:
        (_read_whole if whole else _read_events)(exchange, kind, answer)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        answer.fail("bad stream", f"not an answer of the API: {error}")
    if answer.error is None and not answer.pieces:
        if answer.finish in STOPPED and answer.ended:
            # The model's first token was its last: an answer, and its time is known.
            answer.pieces.append(Piece(answer.ended, "answer", ""))
        else:
            answer.fail("empty", "the stream held no token")
    return answer


def _read_events(exchange: Exchange, kind: str, answer: Answer) -> None:
    """A stream: each event's time is the arrival of the piece that completed it."""
    parser = EventParser()
    done = seen = False
    for when, piece in exchange.pieces:
        for event in parser.feed(piece):
            seen = True
            if event.data.strip() == DONE:
                done = True
            elif event.data.strip():
                read_chunk(event.data, when, kind, answer)
    if not seen and exchange.pieces:
        start = b"".join(piece for _, piece in exchange.pieces)[:80]
        answer.fail("bad stream", f"not server-sent events: {start.decode(errors='replace')!r}")
    if not done and answer.finish is None:
        answer.fail("cut short", "the stream ended without a finish reason or [DONE]")


def read_chunk(data: str, when: float, kind: str, answer: Answer) -> None:
    """Add what one event says to `answer`; what is not a chunk of the API makes the answer a failed one."""
    try:
        chunk = json.loads(data)
    except (ValueError, RecursionError):
        answer.fail("bad stream", f"not JSON: {data[:80]!r}")
        return
    if not isinstance(chunk, dict):
        answer.fail("bad stream", f"an event is not an object: {data[:80]!r}")
        return
    if chunk.get("error"):
        answer.fail("server error", str(chunk["error"]))
        return
    _read_usage(chunk.get("usage"), answer)
    if "golden" in chunk:
        answer.golden = chunk["golden"]
    choices = chunk.get("choices") or []
    if not isinstance(choices, list):
        answer.fail("bad stream", f"`choices` is no list: {data[:80]!r}")
        return
    for choice in choices:
        part = choice.get("delta") if kind == CHAT and isinstance(choice, dict) else choice
        if not isinstance(choice, dict) or not isinstance(part or {}, dict):
            answer.fail("bad stream", f"a choice is no object: {data[:80]!r}")
            return
        for piece_kind, text in _parts(part or {}, kind):
            answer.pieces.append(Piece(when, piece_kind, text))
        finish = choice.get("finish_reason")
        if finish:
            answer.finish, answer.ended = str(finish), when


def _parts(part: Mapping[str, Json], kind: str) -> list[tuple[PieceKind, str]]:
    """The texts that a delta (or a whole message) holds, by kind. Raises `TypeError` for what is no text."""
    if kind == COMPLETIONS:
        text = _string(part.get("text"), "text")
        return [("answer", text)] if text else []
    found: list[tuple[PieceKind, str]] = []
    reasoning = next((part[name] for name in REASONING if part.get(name)), None)
    for piece_kind, value, name in (
        ("reasoning", reasoning, "reasoning"),
        ("answer", part.get("content"), "content"),
        ("answer", part.get("refusal"), "refusal"),
    ):
        if text := _string(value, name):
            found.append((piece_kind, text))  # type: ignore[arg-type]
    calls = list(part.get("tool_calls") or [])
    functions = [call.get("function") or {} for call in calls] + [part.get("function_call") or {}]
    text = "".join(_string(f.get(name), name) for f in functions for name in ("name", "arguments"))
    if text or calls:
        found.append(("tool", text))
    return found


def _string(value: Json, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"`{name}` is {type(value).__name__}, not a text")
    return value


def _read_whole(exchange: Exchange, kind: str, answer: Answer) -> None:
    """A server that does not stream: one JSON object; the first token is only known with the last."""
    if answer.error is not None:
        return
    loaded = json.loads(b"".join(piece for _, piece in exchange.pieces))
    choice = loaded["choices"][0]
    when = exchange.pieces[-1][0]
    for piece_kind, text in _parts(choice if kind == COMPLETIONS else choice["message"], kind):
        answer.pieces.append(Piece(when, piece_kind, text))
    answer.finish, answer.ended = choice.get("finish_reason"), when
    answer.streamed = False
    _read_usage(loaded.get("usage"), answer)


def _read_usage(usage: Json, answer: Answer) -> None:
    if not isinstance(usage, dict):
        return
    answer.prompt_tokens = _count(usage.get("prompt_tokens"), answer.prompt_tokens)
    answer.output_tokens = _count(usage.get("completion_tokens"), answer.output_tokens)
    prompt, output = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
    if isinstance(prompt, dict):
        answer.cached_tokens = _count(prompt.get("cached_tokens"), answer.cached_tokens)
    if isinstance(output, dict):
        answer.reasoning_tokens = _count(output.get("reasoning_tokens"), answer.reasoning_tokens)


def _count(value: Json, before: int | None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else before


def served_models(body: bytes) -> list[str]:
    """The model names in an answer of `/models`; none where it is not one."""
    try:
        entries = json.loads(body)["data"]
        return [entry["id"] for entry in entries if isinstance(entry.get("id"), str)]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
