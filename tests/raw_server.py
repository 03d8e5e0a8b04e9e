"""A server on real sockets that writes exactly the bytes it is told, at the times it is told."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

# What to write: bytes, or seconds to wait from the answer's begin. `None` closes the connection.
Script = Sequence["bytes | float | None"]
Client = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
EVENTS = "text/event-stream"


def head(kind: str = EVENTS, status: int = 200, *, length: int | None = None, more: str = "") -> bytes:
    """A response's head; without a length the body ends with the connection."""
    size = "Connection: close\r\n" if length is None else f"Content-Length: {length}\r\n"
    return f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\n{size}{more}\r\n".encode()


def whole(value: Any, status: int = 200, *, kind: str = "application/json", more: str = "") -> list[bytes]:
    """A response in one piece."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return [head(kind, status, length=len(body), more=more) + body]


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def delta(finish: str | None = None, usage: Any = None, **fields: Any) -> bytes:
    """A chunk of a chat answer, as an event."""
    chunk = {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}
    return event(chunk if usage is None else {**chunk, "usage": usage})


def usage(prompt: int, output: int, **details: Any) -> dict[str, Any]:
    """The usual token counts."""
    return {"prompt_tokens": prompt, "completion_tokens": output, **details}


def last(counts: Any) -> bytes:
    """The chunk with the token counts, and the end."""
    return event({"choices": [], "usage": counts}) + event(b"[DONE]")


async def read_request(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """A request's first line and body. Raises `IncompleteReadError` where the client has closed."""
    line, length = (await reader.readuntil(b"\r\n")).decode(), 0
    while (field := (await reader.readuntil(b"\r\n")).decode().strip()) != "":
        name, _, value = field.partition(":")
        length = int(value) if name.lower() == "content-length" else length
    return line, await reader.readexactly(length)


@contextmanager
def raw_server(
    answer: Callable[[int, Any], Script], *, pages: Callable[[str], Script | None] = lambda path: None
) -> Iterator[str]:
    """Serve `answer(number, request)` to each POST and `pages(path)` (None: 404) to each GET; yields the base URL."""
    count = [0]

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                line, body = await read_request(reader)
                if line.startswith("POST"):
                    count[0] += 1
                    script = answer(count[0] - 1, json.loads(body))
                else:
                    script = pages(line.split(" ")[1]) or whole({}, 404)
                loop = asyncio.get_running_loop()
                begin = loop.time()
                closing = b"Connection: close" in b"".join(s for s in script if isinstance(s, bytes))[:500]
                for step in script:
                    if step is None:
                        closing = True
                        break
                    if isinstance(step, bytes):
                        writer.write(step)
                        await writer.drain()
                    else:
                        await asyncio.sleep(begin + step - loop.time())
                if closing:
                    break
        writer.close()

    with listening(client) as port:
        yield f"http://127.0.0.1:{port}/v1"


@contextmanager
def listening(client: Client) -> Iterator[int]:
    """Serve connections on a free port in a thread of its own; yields the port."""
    loop, ready, port = asyncio.new_event_loop(), threading.Event(), [0]

    async def serve() -> None:
        server = await asyncio.start_server(client, "127.0.0.1", 0)
        port[0] = server.sockets[0].getsockname()[1]
        ready.set()
        async with server:
            await server.serve_forever()

    def run() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(serve())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10), "the server did not start"
    try:
        yield port[0]
    finally:
        loop.call_soon_threadsafe(lambda: [t.cancel() for t in asyncio.all_tasks(loop)])
        thread.join(10)
