"""The golden server: an OpenAI-compatible server on real sockets whose delays, tokens and faults are scripted.

It proves the client: each stream's last event holds when the request was received and when each piece was written
(`time.perf_counter()`, which two processes on one Linux machine share), so that the truth is what really happened
and not what was asked for. A request's `golden` object overrides the server's script.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from bench.timer import Alarm
from unshot.errors import InputError, OutsideError, nearest

# A JSON value.
Json = Any
FAULTS = (
    "429",
    "500",
    "reset",
    "cut",
    "endless",
    "bad-json",
    "bad-chunk",
    "stall",
    "no-usage",
    "wrong-usage",
    "no-done",
    "content-list",
    "null-choice",
    "text-delta",
    "done-inside",
    "cr-lines",
    "data-lines",
    "new-limit-only",
    "no-options",
)
STOP_TOKENS = ("uncounted", "counted", "timed")
# The cache reuses whole blocks of so many words, as servers do with tokens.
CACHE_BLOCK = 16
# What fits no answer of the API, by the fault's name.
MISSHAPEN: dict[str, Json] = {
    "content-list": [{"index": 0, "delta": {"content": ["word"]}}],
    "null-choice": [None],
    "text-delta": [{"index": 0, "delta": "word"}],
}  # fmt: skip
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


@dataclass(frozen=True)
class Script:
    """How to answer. `every` applies `fault` to each so-many-th request; `stall_ms` is one long gap midway.

    `stop_token` is in `usage` and on the wire nowhere ("counted"), is waited for before the last event too ("timed"),
    or does not exist ("uncounted"). The first `reasoning` tokens are reasoning, `tools` makes the others a tool call.
    At most `slots` requests are answered at once (0: all). With `cache` a prompt's beginning that was seen before
    takes none of the time to first token.
    """

    ttft_ms: float = 20.0
    itl_ms: float = 5.0
    tokens: int = 20
    per_chunk: int = 1
    fault: str | None = None
    every: int = 1
    stall_ms: float = 1000.0
    retry_after: int = 1
    stop_token: str = "uncounted"
    reasoning: int = 0
    tools: bool = False
    slots: int = 0
    cache: bool = False
    # Answer with the last words of the prompt instead of one word over and over.
    echo: bool = False
    # The model that it says it serves.
    model: str = "golden"

    def changed(self, given: Json) -> Script:
        """With a request's own values; unknown ones are left out."""
        if not isinstance(given, dict):
            return self
        known = {f.name for f in fields(Script)}
        return replace(self, **{k: v for k, v in given.items() if k in known})


class Clock:
    """Calls at exact times: a heap in front of one kernel timer."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._alarm = Alarm(loop, self._fire)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Call at `when`, `time.perf_counter()` seconds."""
        self._number += 1
        heapq.heappush(self._heap, (when, self._number, call))
        if self._heap[0][1] == self._number:
            self._alarm.set(when)

    def _fire(self) -> None:
        while self._heap and self._heap[0][0] <= time.perf_counter():
            heapq.heappop(self._heap)[2]()
        if self._heap:
            self._alarm.set(self._heap[0][0])


class Handler(asyncio.Protocol):
    """One client connection."""

    def __init__(self, server: Golden) -> None:
        self._server = server
        self._buffer = b""
        self._transport: Json = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        raw = transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._buffer[:end].decode("latin-1")
        length = 0
        for line in head.split("\r\n")[1:]:
            name, _, value = line.partition(":")
            if name.lower() == "content-length":
                length = int(value)
        if len(self._buffer) < end + 4 + length:
            return
        body, self._buffer = self._buffer[end + 4 : end + 4 + length], self._buffer[end + 4 + length :]
        method, path = head.split(" ", 2)[:2]
        if method == "GET":
            entry = {"id": self._server.script.model, "object": "model"}
            text = json.dumps({"object": "list", "data": [entry]}).encode()
            if path.endswith("/log"):  # when each request arrived since the log was last asked for
                text = json.dumps(self._server.arrivals).encode()
                self._server.arrivals.clear()
            self._whole(200, text if path.endswith(("/models", "/log")) else b"{}")
            return
        try:
            request = json.loads(body)
        except ValueError:
            self._whole(400, b'{"error":{"message":"not JSON"}}')
            return
        self._answer(request, path.endswith("/chat/completions"), now)

    def _whole(self, status: int, body: bytes, headers: str = "") -> None:
        words = {200: "OK", 400: "Bad Request", 429: "Too Many Requests", 500: "Internal Server Error"}
        head = f"HTTP/1.1 {status} {words[status]}\r\nContent-Type: application/json\r\n{headers}"
        self._write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _answer(self, request: dict[str, Json], chat: bool, received: float) -> None:
        server = self._server
        server.requests += 1
        server.arrivals.append(received)
        script = server.script.changed(request.get("golden"))
        limit: Json = request.get("max_completion_tokens", request.get("max_tokens"))
        cut = isinstance(limit, int) and 0 < limit < script.tokens
        if cut:
            script = replace(script, tokens=limit)
        fault = script.fault if script.fault and server.requests % script.every == 0 else None
        if fault == "429":
            self._whole(429, b'{"error":{"message":"slow down"}}', f"Retry-After: {script.retry_after}\r\n")
            return
        if fault == "500":
            self._whole(500, b'{"error":{"message":"broken"}}')
            return
        if fault == "new-limit-only" and "max_tokens" in request:
            self._whole(
                400, b'{"error":{"message":"Unsupported parameter: use \'max_completion_tokens\' instead."}}'
            )
            return
        if fault == "no-options" and "stream_options" in request:
            self._whole(400, b'{"error":{"message":"unknown field: stream_options"}}')
            return
        said = request.get("messages") or request.get("prompt") or ""
        words = (
            " ".join(str(m.get("content")) for m in said) if isinstance(said, list) else str(said)
        ).split()
        cached = server.remember(words) if script.cache else None
        if cached and words:
            script = replace(script, ttft_ms=script.ttft_ms * (1 - cached / len(words)))
        begin = server.slot(script, received)
        Stream(self, script, fault, chat, received, begin, words, cached, "length" if cut else "stop").start()


class Stream:
    """One answer being written piece by piece."""

    def __init__(
        self,
        handler: Handler,
        script: Script,
        fault: str | None,
        chat: bool,
        received: float,
        begin: float,
        words: list[str],
        cached: int | None,
        finish: str,
    ) -> None:
        self.handler = handler
        self.script = script
        self.fault = fault
        self.chat = chat
        self.received = received
        self.begin = begin
        self.prompt = len(words)
        self.cached = cached
        self.finish = finish
        self.echoed = words[-script.tokens :]
        self.sent: list[float] = []
        self.pieces = -(-script.tokens // script.per_chunk)

    def start(self) -> None:
        """Plan the first piece."""
        self._plan(self.begin + self.script.ttft_ms / 1000)

    def _plan(self, when: float) -> None:
        self.handler._server.clock.at(when, self._next)

    def _next(self) -> None:
        if self.handler._transport is None:
            return
        number = len(self.sent)
        halfway = number == max(1, self.pieces // 2)
        if halfway and self.fault == "reset":
            raw = self.handler._transport.get_extra_info("socket")
            # Linger of 0 seconds: the close is a reset.
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            self.handler._transport.abort()
            return
        if halfway and self.fault == "cut":
            self.handler._transport.close()
            return
        left = self.script.tokens - number * self.script.per_chunk
        count = self.script.per_chunk if self.fault == "endless" else min(self.script.per_chunk, left)
        text = " word" * count
        if self.script.echo:
            done = len(self.sent) * self.script.per_chunk
            text = "".join(f" {word}" for word in self.echoed[done : done + count])
        choice: dict[str, Json] = {"index": 0, "finish_reason": None}
        choice["delta" if self.chat else "text"] = self._delta(number, text) if self.chat else text
        choices: Json = [choice]
        if halfway and self.fault in MISSHAPEN:
            choices = MISSHAPEN[self.fault]
        event = self._event({"object": "chat.completion.chunk", "model": "golden", "choices": choices})
        if halfway and self.fault == "bad-json":
            event = b"data: {not json\n\n"
        chunk = b"zz\r\n\r\n" if halfway and self.fault == "bad-chunk" else _chunk(event)
        now = time.perf_counter()
        self.handler._write(HEAD + chunk if not number else chunk)
        self.sent.append(now)
        # From the plan and not from now: a late piece does not push the others back.
        start = self.begin + self.script.ttft_ms / 1000
        if len(self.sent) >= self.pieces and self.fault != "endless":
            if self.script.stop_token == "timed" and self.finish == "stop":
                when = start + self.script.itl_ms / 1000 * len(self.sent)
                self.handler._server.clock.at(when, self._end)
            else:
                self._end()
            return
        gap = self.script.itl_ms / 1000 * len(self.sent)
        stalled = self.fault == "stall" and len(self.sent) >= max(1, self.pieces // 2)
        self._plan(start + gap + (self.script.stall_ms / 1000 if stalled else 0))

    def _delta(self, number: int, text: str) -> dict[str, Json]:
        if number * self.script.per_chunk < self.script.reasoning:
            return {"reasoning_content": text}
        if self.script.tools:
            return {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}
        return {"content": f"{text} [DONE]" if self.fault == "done-inside" else text}

    def _event(self, value: dict[str, Json]) -> bytes:
        text = json.dumps(value, separators=(",", ":"))
        if self.fault == "data-lines":
            text = json.dumps(value, indent=0)
        raw = "".join(f"data: {line}\n" for line in text.split("\n")) + "\n"
        return raw.replace("\n", "\r" if self.fault == "cr-lines" else "\n").encode()

    def _end(self) -> None:
        choice: dict[str, Json] = {"index": 0, "finish_reason": self.finish}
        choice["delta" if self.chat else "text"] = {} if self.chat else ""
        last: dict[str, Json] = {"object": "chat.completion.chunk", "choices": [choice]}
        last["golden"] = {"received": self.received, "sent": self.sent}
        if self.fault not in ("no-usage", "no-options"):
            count = self.script.tokens * (2 if self.fault == "wrong-usage" else 1)
            count += self.script.stop_token != "uncounted" and self.finish == "stop"
            last["usage"] = {"prompt_tokens": self.prompt, "completion_tokens": count}
            if self.cached is not None:
                last["usage"]["prompt_tokens_details"] = {"cached_tokens": self.cached}
            if self.script.reasoning:
                reasoning = min(self.script.reasoning, self.script.tokens)
                last["usage"]["completion_tokens_details"] = {"reasoning_tokens": reasoning}
        end = b"data: [DONE]\r\r" if self.fault == "cr-lines" else b"data: [DONE]\n\n"
        tail = _chunk(self._event(last)) + (b"" if self.fault == "no-done" else _chunk(end))
        self.handler._write(tail + b"0\r\n\r\n")


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


class Golden:
    """The server; `port` is known once `serve` has started."""

    def __init__(self, script: Script) -> None:
        if script.fault is not None and script.fault not in FAULTS:
            raise InputError(f"unknown fault `{script.fault}`; {nearest(script.fault, FAULTS)}")
        if script.stop_token not in STOP_TOKENS:
            raise InputError(
                f"unknown stop token `{script.stop_token}`; {nearest(script.stop_token, STOP_TOKENS)}"
            )
        self.script = script
        self.requests = 0
        self.arrivals: list[float] = []
        self.port = 0
        self._seen: set[int] = set()
        self._busy: list[float] = []

    def remember(self, words: list[str]) -> int:
        """How many of the words stand in the cache, from the beginning; then all of them do."""
        ends = range(CACHE_BLOCK, len(words) + 1, CACHE_BLOCK)
        keys = [hash(tuple(words[:end])) for end in ends]
        cached = 0
        for end, key in zip(ends, keys, strict=True):
            if key not in self._seen:
                break
            cached = end
        self._seen.update(keys)
        return cached

    def slot(self, script: Script, received: float) -> float:
        """When a request that comes now is begun; its slot is taken until its last token."""
        if not script.slots:
            return received
        self._busy = sorted(t for t in self._busy if t > received)
        free = len(self._busy) < script.slots
        begin = received if free else self._busy[-script.slots]
        pieces = -(-script.tokens // script.per_chunk)
        self._busy.append(begin + (script.ttft_ms + script.itl_ms * (pieces - 1)) / 1000)
        return begin

    async def serve(
        self, host: str, port: int, ready: Callable[[int], None], tls: ssl.SSLContext | None = None
    ) -> None:
        """Listen until cancelled; `ready` is called with the port."""
        loop = asyncio.get_running_loop()
        self.clock = Clock(loop)
        try:
            server = await loop.create_server(lambda: Handler(self), host, port, backlog=4096, ssl=tls)
        except OSError as error:
            raise OutsideError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another --port"
            ) from None
        self.port = server.sockets[0].getsockname()[1]
        ready(self.port)
        async with server:
            await server.serve_forever()
