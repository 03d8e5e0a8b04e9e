"""What a back end sent, checked: odd figures are left out, what is no answer is a failure and never an exception.

What comes out of here can be encoded again: decoding is strict (no lone surrogates, no NaN), and depth is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import msgspec

from deploy.serve.failure import Failure
from deploy.serve.parameters import DEEPEST, Json, too_deep
from unshot.engines.sse import DONE, Event

# Bytes of one answer, or of one event of a stream.
LARGEST = 16 << 20


class NotAnAnswer(ValueError):
    """A back end's JSON is not a chat completion."""


@dataclass(frozen=True)
class Usage:
    """A back end's own counts of tokens; None where it gives none, or something that is no count."""

    prompt: int | None = None
    cached: int | None = None
    answer: int | None = None


@dataclass
class Completion:
    """A whole answer: `raw` is what goes on to the client."""

    raw: Json
    text: str
    finish: str | None
    calls_tools: bool
    usage: Usage
    logprob: float | None


@dataclass
class Chunk:
    """A piece of a stream: `raw` is what goes on to the client. `begun`: it holds some of the answer, of any kind."""

    raw: Json
    text: str = ""
    begun: bool = False
    finished: bool = False
    has_choices: bool = False
    usage: Usage | None = None
    logprobs: list[float] = field(default_factory=list)


def decode(raw: bytes) -> Json:
    """A JSON object of a bounded depth. Raises `NotAnAnswer`."""
    try:
        value = msgspec.json.decode(raw)
    except (ValueError, RecursionError):
        raise NotAnAnswer("not JSON") from None
    if not isinstance(value, dict):
        raise NotAnAnswer("not an object")
    if raw.count(b"[") + raw.count(b"{") > DEEPEST and too_deep(value):
        raise NotAnAnswer("nested too deep")
    return value


def read_completion(raw: bytes) -> Completion:
    """A whole answer. Raises `NotAnAnswer`, and `Failure` for an error that the server reports."""
    value = decode(raw)
    _error(value)
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(c, dict) for c in choices):
        raise NotAnAnswer("no choices")
    for number, choice in enumerate(choices):
        message = choice.get("message")
        if not isinstance(message, dict):
            raise NotAnAnswer("a choice without a message")
        choice["index"] = number
        message["role"] = "assistant"
        _content(message)
        _tool_calls(message)
        _finish(choice)
        if not isinstance(choice.get("logprobs"), dict):
            choice.pop("logprobs", None)
    first = cast(Json, choices[0])
    message = cast(Json, first["message"])
    message.setdefault("content", None)
    value["object"] = "chat.completion"
    if not count(value.get("created")):
        value.pop("created", None)
    return Completion(
        raw=value,
        text=cast(str, message["content"] or ""),
        finish=cast("str | None", first.get("finish_reason")),
        calls_tools=bool(message.get("tool_calls")),
        usage=take_usage(value) or Usage(),
        logprob=mean(logprobs_of(first)),
    )


def read_chunk(data: bytes) -> Chunk:
    """A chunk of a stream. Raises `NotAnAnswer`, and `Failure` for an error that the server reports."""
    value = decode(data)
    _error(value)
    choices = value.get("choices")
    if choices is None:
        choices = value["choices"] = []
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise NotAnAnswer("odd choices")
    chunk = Chunk(value, has_choices=bool(choices))
    for choice in choices:
        delta = choice.get("delta")
        if delta is None:
            delta = choice["delta"] = {}
        if not isinstance(delta, dict):
            raise NotAnAnswer("an odd delta")
        if count(choice.get("index")) is None:
            choice["index"] = 0
        _content(delta)
        _tool_calls(delta, whole=False)
        _finish(choice)
        if not isinstance(choice.get("logprobs"), dict):
            choice.pop("logprobs", None)
        if choice["index"] == 0:
            chunk.text += delta.get("content") or ""
            chunk.logprobs += logprobs_of(choice)
        chunk.finished = chunk.finished or choice.get("finish_reason") is not None
        chunk.begun = chunk.begun or any(part for name, part in delta.items() if name != "role")
    chunk.usage = take_usage(value)
    return chunk


def as_chunks(completion: Completion, head: Json) -> list[Json]:
    """A whole answer as the chunks of a stream, tool calls and log-probabilities included, without usage."""
    found: list[Json] = []
    for choice in cast(Sequence[Json], completion.raw["choices"]):
        message = cast(Json, choice["message"])
        delta: Json = {"role": "assistant", "content": message.get("content")}
        if refusal := message.get("refusal"):
            delta["refusal"] = refusal
        if calls := cast("list[Json] | None", message.get("tool_calls")):
            delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
        begin: Json = {"index": choice["index"], "delta": delta, "finish_reason": None}
        if choice.get("logprobs"):
            begin["logprobs"] = choice["logprobs"]
        end: Json = {
            "index": choice["index"],
            "delta": {},
            "finish_reason": choice["finish_reason"] or "stop",
        }
        found += [{**head, "choices": [begin]}, {**head, "choices": [end]}]
    return found


def read_events(events: Sequence[Event]) -> tuple[list[Chunk], bool]:
    """The chunks in server-sent events, and whether the last of all was among them.

    Raises `NotAnAnswer` for what is no chunk, and `Failure` for an error that the server reports.
    """
    chunks: list[Chunk] = []
    for event in events:
        data = event.data.strip()
        if event.type == "error":
            raise Failure("server error", data[:200] or "the back end's stream reports an error")
        if data == DONE:
            return chunks, True
        if data:
            chunks.append(read_chunk(data.encode("utf-8", "replace")))
    return chunks, False


def take_usage(value: Json) -> Usage | None:
    """The counts in a completion's or chunk's `usage`; what is no usage is taken out of it."""
    usage = value.get("usage")
    if usage is None:
        return None
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    if not isinstance(usage, dict) or any(count(usage.get(n, 0)) is None for n in names):
        del value["usage"]
        return None
    details = usage.get("prompt_tokens_details")
    cached = count(details.get("cached_tokens")) if isinstance(details, dict) else None
    return Usage(count(usage.get("prompt_tokens")), cached, count(usage.get("completion_tokens")))


def count(value: object) -> int | None:
    """A server's count of tokens (or its clock), None where it is none."""
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
    return cast(int, value) if whole else None


def logprobs_of(choice: Json) -> list[float]:
    """The log-probabilities of a choice's tokens, where the back end gave them."""
    given = choice.get("logprobs")
    items = given.get("content") if isinstance(given, dict) else None
    found = []
    for item in items if isinstance(items, list) else ():
        value = item.get("logprob") if isinstance(item, dict) else None
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            return []
        found.append(float(value))
    return found


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _content(message: Json) -> None:
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise NotAnAnswer("an odd content")


def _error(value: Json) -> None:
    """Raise `Failure` for what says that it is an error, whatever else it holds."""
    if value.get("error") or value.get("object") == "error":
        raise Failure("server error", str(value.get("error") or value.get("message"))[:200])


def _finish(choice: Json) -> None:
    finish = choice.get("finish_reason")
    if finish == "error":
        raise Failure("server error", str(choice.get("error") or "the answer ended in an error")[:200])
    choice["finish_reason"] = finish if isinstance(finish, str) else None


def _tool_calls(message: Json, *, whole: bool = True) -> None:
    """Check tool calls; of a whole answer each has its name and arguments."""
    calls = message.get("tool_calls")
    if calls is None:
        message.pop("tool_calls", None)
        return
    if not isinstance(calls, list):
        raise NotAnAnswer("odd tool calls")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise NotAnAnswer("an odd tool call")
        texts = [function.get(k, None if whole else "") for k in ("name", "arguments")]
        if not all(isinstance(t, str) or (t is None and not whole) for t in texts):
            raise NotAnAnswer("an odd tool call")
