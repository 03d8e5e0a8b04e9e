"""Server-sent events by the WHATWG standard, and answers of an OpenAI-compatible API read out of them."""

from __future__ import annotations

import itertools
import json

import httpx_sse._decoders as reference
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.answer import Answer, read_answer
from unshot.engines.http import Exchange
from unshot.engines.sse import EventParser

LINES = st.lists(
    st.one_of(
        st.just(""),
        st.sampled_from(
            ["data", "data:", "data: ", "data:  x", ":comment", "event: a", "id: 7", "retry: 5", "odd"]
        ),
        st.text(st.characters(blacklist_characters="\r\n", blacklist_categories=["Cs"]), max_size=12).map(
            lambda text: f"data: {text}"
        ),
        st.text(st.characters(blacklist_characters="\r\n", blacklist_categories=["Cs"]), max_size=12),
    ),
    max_size=14,
)
ENDS = st.lists(st.sampled_from(["\n", "\r\n", "\r"]), min_size=1, max_size=5)


def by_the_standard(stream: str) -> list[tuple[str, str, str]]:
    """The interpretation of section 9.2.6, word for word, on a whole decoded stream: `(data, type, id)`."""
    text = stream.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    found, data, kind, last = [], "", "", ""
    for line in text.split("\n")[:-1]:
        if line == "":
            if data != "":
                found.append((data.removesuffix("\n"), kind or "message", last))
            data, kind = "", ""
        elif line.startswith(":"):
            continue
        else:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                data += value + "\n"
            elif name == "event":
                kind = value
            elif name == "id" and "\0" not in value:
                last = value
    return found


def pieces_of(raw: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(raw), *(c % (len(raw) + 1) for c in cuts)})
    return [raw[a:b] for a, b in itertools.pairwise(places)]


@settings(deadline=None, max_examples=300)
@given(LINES, ENDS, st.booleans(), st.lists(st.integers(0, 400), max_size=8))
def test_any_stream_cut_anywhere_is_read_as_the_standard_says(
    lines: list[str], ends: list[str], bom: bool, cuts: list[int]
) -> None:
    stream = ("\ufeff" if bom else "") + "".join(line + ends[i % len(ends)] for i, line in enumerate(lines))
    parser = EventParser()
    events = [e for piece in pieces_of(stream.encode(), cuts) for e in parser.feed(piece)]
    assert [(e.data, e.type, e.id) for e in events] == by_the_standard(stream)


@settings(deadline=None, max_examples=150)
@given(LINES, ENDS)
def test_the_data_is_what_httpx_sse_reads(lines: list[str], ends: list[str]) -> None:
    """Without what that library does otherwise than the standard: it dispatches events without data."""
    stream = "".join(line + ends[i % len(ends)] for i, line in enumerate(lines))
    splitter, decoder = reference.SSELineDecoder(), reference.SSEDecoder()
    rows = splitter.decode(stream) + splitter.flush()
    theirs = [event.data for row in rows if (event := decoder.decode(row)) is not None and event.data]
    assert [e.data for e in EventParser().feed(stream.encode()) if e.data] == theirs


def chat(**delta: object) -> bytes:
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}).encode()


LAST = json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}).encode()


def read(*events: bytes, end: bytes = b"\n\n", done: bool = True, kind: str = "chat") -> Answer:
    exchange = Exchange(
        b"", 0.0, 9.0, lambda e: None, status=200, headers={"content-type": "text/event-stream"}
    )
    tail = [b"[DONE]"] if done else []
    exchange.pieces = [(float(i), b"data: " + e + end) for i, e in enumerate([*events, *tail], start=1)]
    return read_answer(exchange, kind)


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n"])
def test_line_ends_of_every_kind(end: bytes) -> None:
    answer = read(chat(content="a"), chat(content="b"), LAST, end=end)
    assert (answer.text, answer.error, answer.times) == ("ab", None, [1.0, 2.0])


def test_an_event_of_several_data_lines_is_one_json_value() -> None:
    text = json.dumps(json.loads(chat(content="a")), indent=1).replace("\n", "\ndata: ").encode()
    assert read(text, LAST).text == "a"


def test_done_inside_an_answer_is_text() -> None:
    assert read(chat(content="say [DONE]"), chat(content=" and\n\ndata: [DONE]"), LAST).text == (
        "say [DONE] and\n\ndata: [DONE]"
    )


@pytest.mark.parametrize(
    "event",
    [
        b'{"choices": [null]}', b'{"choices": null, "x": 1}', b'{"choices": {"a": 1}}', b'{"choices": [1]}',
        b'{"choices": [{"delta": "word"}]}', b'{"choices": [{"delta": [1]}]}', b'{"choices": 7}',
        b'{"choices": [{"delta": {"content": ["list"]}}]}', b'{"choices": [{"delta": {"content": {"a": 1}}}]}',
        b'{"choices": [{"delta": {"tool_calls": [null]}}]}', b'{"choices": [{"delta": {"tool_calls": 5}}]}',
        b'{"choices": [{"delta": {"reasoning": 5}}]}', b"[]", b"null", b"7", b'"text"', b"{", b"[" * 5000,
        b'{"error": {"message": "broken"}}', b'{"error": "broken"}', b"\xff\xfe",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_an_answer_that_is_none_is_one_counted_error(event: bytes, kind: str) -> None:
    answer = read(event, kind=kind)
    assert answer.error in ("bad stream", "server error", "empty"), answer
    assert isinstance(answer.detail, str)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["choices", "delta", "content", "finish_reason", "usage", "error", "message", "text", "tool_calls",
             "function", "arguments", "prompt_tokens", "completion_tokens", "prompt_tokens_details", "reasoning"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(st.lists(json_values, max_size=4), st.sampled_from(["chat", "completions"]), st.booleans())
def test_no_json_a_server_may_send_escapes_as_an_exception(
    values: list[object], kind: str, whole: bool
) -> None:
    exchange = Exchange(b"", 0.0, 9.0, lambda e: None, status=200)
    if whole:
        exchange.headers = {"content-type": "application/json"}
        exchange.pieces = [(1.0, json.dumps(values[0] if values else None).encode())]
    else:
        exchange.pieces = [(1.0, b"data: " + json.dumps(v).encode() + b"\n\n") for v in values]
    answer = read_answer(exchange, kind)
    assert answer.error is not None or answer.pieces


def test_reasoning_and_tool_calls_are_tokens_and_told_apart() -> None:
    call = [{"index": 0, "function": {"name": "look", "arguments": "{}"}}]
    answer = read(
        chat(role="assistant", content=""), chat(reasoning_content="hm"), chat(reasoning="so"),
        chat(content="yes"), chat(tool_calls=call), LAST,
    )  # fmt: skip
    assert [p.kind for p in answer.pieces] == ["reasoning", "reasoning", "answer", "tool"]
    assert (answer.times[0], answer.first_answer, answer.text) == (2.0, 4.0, "yes")
    only = read(chat(reasoning_content="hm"), LAST)
    assert (only.error, only.text, only.first_answer) == (None, "", None)
    tools = read(chat(tool_calls=call), LAST)
    assert (tools.error, tools.text) == (None, "look{}")
