"""What a finished answer of an OpenAI-compatible API says: its pieces with their times, how it ended, its counts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bench.usage import count, counts_of
from unshot.engines.http import Exchange
from unshot.engines.openai import CHAT, COMPLETIONS
from unshot.engines.sse import BOM, DONE, Event, EventParser
from unshot.text.repair import answer_begin

# A decoded JSON value; what a server sends is taken apart with care below.
Json = Any
PieceKind = Literal["answer", "reasoning", "tool"]
# Where servers put the model's reasoning: vLLM and SGLang, newer vLLM and OpenRouter, Ollama, OpenRouter's parts.
REASONING = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
# Others call it otherwise (`reasoning_text`, `thought`, `thinking_blocks`); what stands beside it is no text of it.
THOUGHTS = re.compile(r"reasoning|think|thought")
BESIDE = re.compile(r"(^|_)(id|index|type|tokens|signature|effort|status|time|duration|encrypted)$")
# Finish reasons, in small letters, of an answer that the model itself ended (TGI, Anthropic's and Cohere's proxies have
# words of their own), of one that reached its limit, and of one that is none: given up by the server, or held back.
STOPPED = ("stop", "tool_calls", "function_call", "eos", "eos_token", "end_turn", "stop_sequence", "complete")
LIMITED = ("max_tokens", "max_length", "model_length", "length_limit")
FAILED = {
    **dict.fromkeys(
        ("abort", "error", "failed", "cancelled", "canceled", "timeout", "network_error", "server_error",
         "insufficient_system_resource", "overloaded"), "server error"),
    **dict.fromkeys(
        ("content_filter", "content_filtered", "safety", "sensitive", "recitation", "blocklist",
         "prohibited_content", "guardrail_intervened"), "content filter"),
}  # fmt: skip
# Pieces and tokens that differ in number by more than this share are not one to one.
APART = 0.05


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer that holds tokens: when it arrived, what it is, its text.

    `joined` is of the same event as the piece before it, no arrival of its own.
    """

    time: float
    kind: PieceKind
    text: str
    joined: bool = False


@dataclass
class Answer:
    """A read answer: its pieces, how and when it ended, and the server's own counts (None: not given).

    `error` is the kind of failure, else None; `golden` what a golden server says it did and when.
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
    # The model that the server says it is of.
    model: str | None = None
    streamed: bool = True
    golden: Json = None
    # How many pieces there were when the output was last counted: a count from before the end is not the answer's.
    counted: int = 0
    # Whether a later count was no greater than one before, though more had come: each chunk may count itself.
    apart: bool = False

    def text_of(self, kind: PieceKind) -> str:
        """The text of all pieces of one kind."""
        return _characters("".join(piece.text for piece in self.pieces if piece.kind == kind))

    @property
    def text(self) -> str:
        """The answer without its reasoning; of an answer that only calls tools, the calls' text."""
        return self.text_of("answer") or self.text_of("tool")

    @property
    def times(self) -> list[float]:
        """When each event that holds tokens arrived, reasoning and tool calls included."""
        return [piece.time for piece in self.pieces if not piece.joined]

    @property
    def first_answer(self) -> float | None:
        """When the first token of the answer itself came (a tool call is one); None where only reasoning did."""
        return next((piece.time for piece in self.pieces if piece.kind != "reasoning"), None)

    @property
    def arrived_tokens(self) -> int | None:
        """The server's count without what has no arrival: reasoning that it keeps to itself, and the stop token.

        A stop token is told where the pieces are single tokens: then the count is one more than they are.
        """
        if self.output_tokens is None:
            return None
        hidden = 0 if any(p.kind == "reasoning" for p in self.pieces) else self.reasoning_tokens or 0
        count = max(self.output_tokens - hidden, 1)
        return count - (self.finish in STOPPED and count == len(self.times) + 1)

    def fail(self, error: str, detail: str) -> None:
        """Note the first failure; later ones are its consequences."""
        if self.error is None:
            self.error, self.detail = error, _characters(detail[:300])


def read_answer(exchange: Exchange, kind: str) -> Answer:
    """Read a finished exchange. Whatever came, this returns: a failure of any kind is in `error`."""
    answer = Answer(error=exchange.error, detail=exchange.detail)
    if answer.error is None and exchange.status != 200:
        body = b"".join(piece for _, piece in exchange.pieces)
        answer.fail(f"http {exchange.status}", body[:200].decode(errors="replace"))
        return answer
    coding = exchange.headers.get("content-encoding", "identity")
    if answer.error is None and coding not in ("", "identity"):
        answer.fail("bad stream", f"the answer is compressed ({coding}), which was not asked for")
        return answer
    # By its beginning and not its label: an event never begins with a brace, and servers mislabel both.
    begin = b"".join(piece for _, piece in exchange.pieces[:4])[:64].removeprefix(BOM).lstrip()
    try:
        (_read_whole if begin.startswith(b"{") else _read_events)(exchange, kind, answer)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        answer.fail("bad stream", f"not an answer of the API: {error}")
    _hold_together(answer)
    return answer


def _hold_together(answer: Answer) -> None:
    """What only the whole answer shows: a failure told as an end, counts that cannot be, thoughts in the text."""
    if answer.finish in FAILED:
        answer.fail(FAILED[answer.finish], f"the answer ended with the finish reason `{answer.finish}`")
    if answer.counted < len(answer.pieces) or not answer.output_tokens:
        answer.output_tokens = None
    if answer.apart and (answer.output_tokens or 0) < len(answer.pieces):
        answer.output_tokens = None
    answer.prompt_tokens = answer.prompt_tokens or None
    if answer.cached_tokens is not None and answer.cached_tokens > (answer.prompt_tokens or 0):
        answer.cached_tokens = None
    if answer.error is None and not answer.pieces:
        seen = (answer.output_tokens or 0) - (answer.reasoning_tokens or 0)
        if seen > 1:
            answer.fail("empty", f"the server counted {seen} tokens and sent none")
        elif answer.finish in STOPPED and answer.ended:
            # The model's first token was its last: an answer, and its time is known.
            answer.pieces.append(Piece(answer.ended, "answer", ""))
        else:
            answer.fail("empty", "the stream held no token")
    answer.pieces = _apart(answer.pieces)


def _apart(pieces: list[Piece]) -> list[Piece]:
    """The pieces with the thoughts that stand in the answer's own text (no parser took them out) as reasoning."""
    begin = answer_begin("".join(p.text for p in pieces if p.kind == "answer"))
    if not begin or any(p.kind == "reasoning" for p in pieces):
        return pieces
    found: list[Piece] = []
    for piece in pieces:
        if piece.kind != "answer":
            found.append(piece)
            continue
        thought, rest = piece.text[:begin], piece.text[begin:]
        begin -= len(thought)
        if thought or not rest:
            found.append(replace(piece, kind="reasoning", text=thought))
        if rest:
            found.append(replace(piece, text=rest, joined=piece.joined or bool(thought)))
    return found


def _read_events(exchange: Exchange, kind: str, answer: Answer) -> None:
    """A stream: each event's time is the arrival of the piece that completed it."""
    parser = EventParser()
    done = seen = False
    for when, piece in exchange.pieces:
        for event in parser.feed(piece):
            seen = True
            if done:  # the answer is over, whatever else is sent
                break
            if event.data.strip() == DONE:
                done = True
            elif event.data.strip():
                read_chunk(event, when, kind, answer)
    if not seen and exchange.pieces:
        start = b"".join(piece for _, piece in exchange.pieces)[:80]
        answer.fail("bad stream", f"not server-sent events: {start.decode(errors='replace')!r}")
    if not done and answer.finish is None:
        answer.fail("cut short", "the stream ended without a finish reason or [DONE]")


def read_chunk(event: Event, when: float, kind: str, answer: Answer) -> None:
    """Add what one event says to `answer`; what is not a chunk of the API makes the answer a failed one."""
    if event.type == "error":
        answer.fail("server error", event.data)
        return
    try:
        chunk = json.loads(event.data)
    except (ValueError, RecursionError):
        if event.type == "message":  # else a heartbeat of its own type
            answer.fail("bad stream", f"not JSON: {event.data[:80]!r}")
        return
    if not isinstance(chunk, dict):
        answer.fail("bad stream", f"an event is not an object: {event.data[:80]!r}")
    elif error := _error_of(chunk):
        answer.fail("server error", error)
    else:
        if isinstance(chunk.get("model"), str):
            answer.model = _characters(chunk["model"])
        if "golden" in chunk:
            answer.golden = chunk["golden"]
        choices = chunk.get("choices") or []
        if not isinstance(choices, list):
            raise TypeError(f"`choices` is no list: {event.data[:80]!r}")
        _only_one(choices, answer)
        for choice in choices:
            part = choice.get("delta") if kind == CHAT else choice
            if not answer.pieces:
                _elsewhere(choice, kind)
            _read_choice(choice, part, when, kind, answer)
        _read_counts(chunk, answer)


def _error_of(chunk: Mapping[str, Json]) -> str | None:
    """What an object that reports a failure says; None where it is no such object."""
    if chunk.get("error"):
        return str(chunk["error"])
    if "choices" in chunk:
        return None
    told = next((chunk[name] for name in ("message", "detail", "msg", "error_msg") if chunk.get(name)), None)
    code = next((n for name in ("code", "status", "status_code") if (n := count(chunk, name)) is not None), 0)
    failed = (
        code >= 400 or chunk.get("success") is False or "error" in (chunk.get("type"), chunk.get("object"))
    )
    return str(told) if told is not None else json.dumps(chunk) if failed else None


def _only_one(choices: Sequence[Json], answer: Answer) -> None:
    if len(choices) > 1:
        answer.fail("bad stream", "the answer holds several choices; ask for one")


def _elsewhere(choice: Mapping[str, Json], kind: str) -> None:
    """Raises `TypeError` where a chunk has its text in another API's field: it would read as an empty answer."""
    due = "delta" if kind == CHAT else "text"
    for name in ("message", "text", "delta"):
        if name != due and choice.get(name) and choice.get(due) is None:
            raise TypeError(f"a chunk has its text in `{name}`, where `{due}` is due")


def _read_choice(choice: Json, part: Json, when: float, kind: str, answer: Answer) -> None:
    if choice.get("index") not in (None, 0):
        answer.fail("bad stream", "the answer holds several choices; ask for one")
    before = len(answer.pieces)
    for piece_kind, text in _parts(part or {}, kind):
        answer.pieces.append(Piece(when, piece_kind, text, joined=len(answer.pieces) > before))
    finish = choice.get("finish_reason")
    if isinstance(finish, dict):  # SGLang's own form
        finish = finish.get("type")
    if choice.get("error"):
        answer.fail("server error", str(choice["error"]))
    if finish and (word := _characters(str(finish)).lower()) not in ("null", "none"):
        answer.finish, answer.ended = "length" if word in LIMITED else word, when


def _parts(part: Mapping[str, Json], kind: str) -> list[tuple[PieceKind, str]]:
    """The texts that a delta (or a whole message) holds, by kind. Raises `TypeError` for what is no text."""
    if kind == COMPLETIONS:
        text = _text(part.get("text"), "text")
        return [("answer", text)] if text else []
    found: list[tuple[PieceKind, str]] = []
    if text := _reasoning(part):
        found.append(("reasoning", text))
    content = part.get("content")
    # A list of typed parts, as Mistral and Anthropic have it.
    for value in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        thought = THOUGHTS.search(str(value.get("type")))
        if text := _text(value, "content"):
            found.append(("reasoning" if thought else "answer", text))
    if text := _text(part.get("refusal"), "refusal"):
        found.append(("answer", text))
    calls = list(part.get("tool_calls") or [])
    functions = [call.get("function") or {} for call in calls] + [part.get("function_call") or {}]
    text = "".join(_text(f.get("name"), "name") + _arguments(f.get("arguments")) for f in functions)
    if text or calls:
        found.append(("tool", text))
    return found


def _reasoning(part: Mapping[str, Json]) -> str:
    """The text of the first field that holds reasoning; servers may send it under two names at once."""
    others = (name for name in part if THOUGHTS.search(name) and not BESIDE.search(name))
    for name in (*REASONING, *others):
        value = part.get(name)
        if value and (name in REASONING or isinstance(value, str | list | dict)):
            return _text(value, name)
    return ""


def _characters(text: str) -> str:
    """Two halves of a UTF-16 pair made one character, and a half alone the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _text(value: Json, name: str) -> str:
    """A text, or the texts of typed parts. Raises `TypeError`."""
    if isinstance(value, list):
        return "".join(_text(part, name) for part in value)
    if isinstance(value, dict):
        # A part of another type (encrypted reasoning) has no text.
        keys = ("text", "thinking", "reasoning", "summary", "refusal")
        return _text(next((value[key] for key in keys if key in value), None), name)
    if value is not None and not isinstance(value, str):
        raise TypeError(f"`{name}` is {type(value).__name__}, not a text")
    return value or ""


def _arguments(value: Json) -> str:
    return json.dumps(value) if isinstance(value, dict) else _text(value, "arguments")


def _read_whole(exchange: Exchange, kind: str, answer: Answer) -> None:
    """A server that does not stream: one JSON object; the first token is only known with the last."""
    if answer.error is not None:
        return
    loaded = json.loads(b"".join(piece for _, piece in exchange.pieces))
    if error := _error_of(loaded):
        answer.fail("server error", error)
        return
    _only_one(loaded["choices"], answer)
    for choice in loaded["choices"]:
        part = choice if kind == COMPLETIONS else choice["message"]
        _read_choice(choice, part, exchange.pieces[-1][0], kind, answer)
    answer.model = _characters(loaded["model"]) if isinstance(loaded.get("model"), str) else None
    answer.ended, answer.streamed = exchange.pieces[-1][0], False
    _read_counts(loaded, answer)


def _read_counts(chunk: Mapping[str, Json], answer: Answer) -> None:
    """The counts of a chunk; what it does not have stays as it was."""
    counts = counts_of(chunk)
    if counts.output is not None:
        more = len(answer.pieces) > answer.counted
        answer.apart = answer.apart or (more and 0 < counts.output <= (answer.output_tokens or 0))
        answer.output_tokens, answer.counted = counts.output, len(answer.pieces)
    answer.prompt_tokens = counts.prompt or answer.prompt_tokens
    answer.cached_tokens = answer.cached_tokens if counts.cached is None else counts.cached
    answer.reasoning_tokens = answer.reasoning_tokens if counts.reasoning is None else counts.reasoning


def tokens_after_first(answer: Answer, arrived: int | None, first: int | None = None) -> int | None:
    """`arrived` tokens as the time per token takes them: those after the first arrival, and one.

    Where the pieces are as many as the tokens, the pieces of the first arrival tell how many came with it. Where they
    are not, `first` does, by a tokenizer; without one nobody knows, and this is None: two tokens and one, or one and
    two, look the same.
    """
    times = answer.times
    if arrived is None or not times:
        return None
    if abs(arrived - len(times)) <= APART * (len(times) - 1):
        return arrived - sum(t == times[0] for t in times) + 1
    return None if first is None else max(arrived - first, 0) + 1


def first_arrival(pieces: Sequence[Piece]) -> str:
    """The text of the first arrival that held tokens."""
    return "".join(p.text for p in pieces if p.time == pieces[0].time)
