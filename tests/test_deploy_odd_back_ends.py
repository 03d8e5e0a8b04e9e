"""Back ends that never come to the point, report errors as success, or break off: no client waits or is lied to."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("aiohttp")

from tests.gateways import until
from tests.inprocess import http, serving, with_limits
from tests.test_deploy_attacks import FREE, LABELS, USER, ask, completion, events, saying
from unshot.contracts.request_log import read_feedback, read_requests
from unshot.engines.sse import EventParser

STREAM = {"messages": USER, "stream": True}
OPEN = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
SPOKEN = events({"choices": [{"index": 0, "delta": {"content": "high"}, "finish_reason": "stop"}]})


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def dripping(piece: bytes) -> Any:
    """A back end that sends the same piece for as long as anybody listens."""

    async def play(head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(OPEN)
        while not writer.is_closing():
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.05)

    return play


@pytest.mark.parametrize(
    "piece",
    [
        b": ping\n\n",
        b"\n",
        event({"choices": [{"index": 0, "delta": {}}]}),
        event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}),
        event({"choices": []}),
        b"data:",
    ],
)
def test_a_stream_that_never_begins_to_answer_is_a_timeout(tmp_path: Path, piece: bytes) -> None:
    with serving(tmp_path, saying(SPOKEN), dripping(piece), task=FREE, timeout=0.5, log=False) as served:
        _, _, raw = ask(served, STREAM)
        assert b"x-unshot-arm: baseline" in raw and b"high" in raw
        assert until(lambda: not served.api.active)
        assert served.gateway.metrics.fallbacks.labels("timeout")._value.get() == 1


def test_thinking_is_an_answer_that_has_begun(tmp_path: Path) -> None:
    async def play(head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(OPEN)
        for _ in range(8):
            writer.write(event({"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]}))
            await asyncio.sleep(0.1)
        writer.write(event({"choices": [{"index": 0, "delta": {"content": "low"}, "finish_reason": "stop"}]}))
        writer.close()

    with serving(tmp_path, saying(SPOKEN), play, task=FREE, timeout=0.5, log=False) as served:
        _, _, raw = ask(served, STREAM)
        assert b"x-unshot-arm: candidate" in raw and b'"low"' in raw and raw.count(b"hm") == 8


ERROR = {"message": "out of memory", "type": "server_error"}


@pytest.mark.parametrize(
    "reply",
    [
        OPEN + b"data: [DONE]\n\n",
        OPEN + event({"object": "error", "message": "boom"}) + b"data: [DONE]\n\n",
        OPEN + b'event: error\ndata: {"message": "boom"}\n\ndata: [DONE]\n\n',
        OPEN
        + event({"choices": [{"index": 0, "delta": {}, "finish_reason": "error"}]})
        + b"data: [DONE]\n\n",
        http(json.dumps({"error": ERROR, **json.loads(completion("low"))}).encode()),
        http(json.dumps({"object": "error", **json.loads(completion("low"))}).encode()),
        http(completion("", finish_reason="error")),
    ],
)
def test_an_error_in_the_form_of_an_answer_falls_back(tmp_path: Path, reply: bytes) -> None:
    async def play(head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(reply)
        writer.close()

    whole = http(completion("high"))
    stream = b"event-stream" in reply
    with serving(tmp_path, saying(SPOKEN if stream else whole), play, task=FREE, log=False) as served:
        _, _, raw = ask(served, STREAM if stream else None)
        assert b"x-unshot-arm: baseline" in raw and b"high" in raw


def test_a_tool_call_that_breaks_off_is_no_whole_answer(tmp_path: Path) -> None:
    call = {"index": 0, "id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a":'}}

    async def play(head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(OPEN + event({"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}))
        writer.close()

    with serving(tmp_path, play, task=FREE, log=False) as served:
        _, _, raw = ask(served, {**STREAM, "tools": [{"type": "function", "function": {"name": "f"}}]})
        assert b"cut_short" in raw


def test_answers_that_nobody_asked_for_are_not_shown(tmp_path: Path) -> None:
    two = json.loads(completion("low"))
    two["choices"].append({"index": 1, "message": {"role": "assistant", "content": "unchecked"}})
    with serving(tmp_path, saying(http(json.dumps(two).encode())), task=LABELS, log=False) as served:
        _, body, _ = ask(served)
        assert len(body["choices"]) == 1
    play = saying(
        events(
            {
                "choices": [
                    {"index": 1, "delta": {"content": "other"}},
                    {"index": 0, "delta": {"content": "low"}, "finish_reason": "stop"},
                ]
            }
        )
    )
    with serving(tmp_path / "stream", play, task=FREE, log=False) as served:
        _, _, raw = ask(served, STREAM)
        assert b'"low"' in raw and b"other" not in raw


def test_one_bad_request_takes_the_usage_from_nobody(tmp_path: Path) -> None:
    async def play(head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(http(b'{"error": {"message": "no"}}', 400) if b"bad one" in body else SPOKEN)

    with serving(tmp_path, play, task=FREE, log=False) as served:
        assert ask(served, {**STREAM, "messages": [{"role": "user", "content": "bad one"}]})[0] == 400
        assert ask(served, STREAM)[0] == 200
        assert b"stream_options" in served.seen[-1]


def test_a_long_line_in_small_pieces_is_read_in_linear_work() -> None:
    joined: list[int] = []

    class Counting(bytes):
        def __radd__(self, other: bytes) -> bytes:
            joined.append(len(other))
            return other + bytes(self)

    parser = EventParser()
    found = parser.feed(b"data: ")
    for _ in range(2000):
        found += parser.feed(Counting(b"x" * 50))
    assert not found and parser.pending == 100_006 and sum(joined) < 1_000_000
    (event_,) = parser.feed(b"\n\n")
    assert event_.data == "x" * 100_000 and parser.pending == 0


def test_no_path_leads_elsewhere(tmp_path: Path) -> None:
    with serving(tmp_path, saying(http(completion("low"))), task=FREE, log=False) as served:
        for path in ("/v1/chat/completions/", "/healthz/", "/v1/models/case/"):
            status, body, raw = ask(served, None, "Host: evil.example", path=path)
            assert status in (404, 405, 421) and body["error"]["message"] and b"evil.example/" not in raw


def test_blank_lines_keep_no_connection(tmp_path: Path) -> None:
    with (
        serving(
            tmp_path,
            saying(http(completion("low"))),
            task=FREE,
            log=False,
            limits=with_limits(read_timeout=0.5),
        ) as served,
        socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection,
    ):
        raw = json.dumps({"messages": USER}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(raw)}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + raw)
        got = b""
        while not got.endswith(b"}"):
            got += connection.recv(65536)
        connection.sendall(b"\r\n")
        assert connection.recv(10) == b""  # a timeout of 20 s would raise


@pytest.mark.cli
def test_without_texts_a_correction_is_a_label_or_not_kept(tmp_path: Path) -> None:
    texts = ("low", "high, says Jane Doe", "I am Jane Doe")
    with serving(tmp_path, saying(http(completion("low"))), task=LABELS) as served:
        for text in texts:
            _, body, raw = ask(served)
            token = raw.lower().partition(b"x-unshot-feedback-token: ")[2][:32].decode()
            given = {"id": body["id"], "correction": text, "token": token}
            _, told, _ = ask(served, given, path="/v1/feedback")
            assert told["recorded"] and ("correction" in told) == (text != "low")
    found = list(read_feedback(tmp_path / "log").values())
    assert [(f.correct, f.correction) for f in found] == [(None, "low"), (False, None), (False, None)]


@pytest.mark.cli
def test_a_role_is_no_way_into_the_log(tmp_path: Path) -> None:
    with serving(tmp_path, saying(http(completion("low"))), task=FREE, texts=True, record=True) as served:
        messages = [{"role": "ada@example.com " + "x" * 5000, "content": "hi"}, *USER]
        assert ask(served, {"messages": messages})[0] == 200
    (line,) = read_requests(tmp_path / "log")
    assert line.messages is not None and [m.role[:8] for m in line.messages] == ["[EMAIL] ", "user"]
    assert len(line.messages[0].role) <= 64
