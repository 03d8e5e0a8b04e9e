"""A small HTTP/1.1 client on asyncio that notes when each piece of a response arrived, and does nothing else then.

Parsing a stream while it arrives would make one answer's tokens wait for another's JSON; so a connection only takes
the transfer coding off and keeps `(time, bytes)`. What the bytes mean is read when the answer is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from unshot.engines.address import Address, Proxy, bracketed
from unshot.engines.sse import EventParser
from unshot.errors import InputError

MAX_HEADER = 64 * 1024
# After `[DONE]` the end of the response is due; a server that never sends it does not hold the answer back.
GRACE = 0.5
# A connection that closes within this, or twice what it took to open, was closed while idle; later, over the request.
RACE = 0.1
DONE = b"[DONE]"


@dataclass
class Exchange:
    """One request and what came back. Times are `time.perf_counter()` seconds.

    `scheduled` is when it was due, `handed` when the client had it ready to send, `started` when its bytes were
    written: between the last two lie looking up the host, connecting and the TLS handshake.
    """

    payload: bytes
    scheduled: float
    timeout: float
    done: Callable[[Exchange], None]
    handed: float = 0.0
    started: float = 0.0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    ended: float = 0.0
    error: str | None = None
    detail: str | None = None
    connection: Connection | None = None
    complete: bool = False
    resent: bool = False
    # What it waits for before it can be sent: "dns", "connect" or nothing. A timeout is counted as that.
    waiting: str | None = None
    # Whether a connection was opened for it.
    opened_connection: bool = False
    # Which of the run's starts it belongs to, and which turn of that conversation it is, from 0.
    origin: int = 0
    turn: int = 0
    # Reads along once the stream may have ended with [DONE].
    watcher: EventParser | None = None

    def is_done(self, body: bytes) -> bool:
        """Whether the event `[DONE]` has come: the words inside an answer, or in another event's data, do not count."""
        if self.watcher is None:
            # Parsing every piece as it comes would make answers wait for one another: only from the first hit on.
            before = self.pieces[-2][1][-len(DONE) :] if len(self.pieces) > 1 else b""
            if DONE not in before + body:
                return False
            self.watcher = EventParser()
            body = b"".join(piece for _, piece in self.pieces)
        return any(event.data.strip() == "[DONE]" for event in self.watcher.feed(body))

    def finish(self, error: str | None = None, detail: str | None = None) -> None:
        """Close the exchange once; later calls do nothing."""
        if self.ended:
            return
        self.ended = time.perf_counter()
        self.error, self.detail = error, detail
        self.done(self)


class ProxyError(OSError):
    """The proxy does not lead to the server."""


class Connection(asyncio.Protocol):
    """One keep-alive connection, one exchange at a time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._requests = 0
        # Seconds that it took to open.
        self.opening = 0.0
        self._reset()

    def _reset(self) -> None:
        self._buffer = b""
        self._in_body = False
        self._chunked = False
        self._left = -1
        self._keep = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        raw = transport.get_extra_info("socket")
        if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def usable(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, exchange: Exchange) -> None:
        """Send a request now."""
        assert self._transport is not None
        self._reset()
        self._exchange = exchange
        self._requests += 1
        exchange.connection = self
        exchange.waiting = None
        if not exchange.resent:
            exchange.started = time.perf_counter()
        self._transport.write(exchange.payload)

    def close(self) -> None:
        """Drop the connection."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        exchange = self._exchange
        if exchange is None:
            self.close()
            return
        if not self._in_body:
            data = self._read_head(exchange, self._buffer + data)
            if not self._in_body:
                return
        try:
            body, complete = self._decode(data)
        except ValueError:
            self._fail("bad stream", "the response's chunked coding is broken")
            return
        if body:
            exchange.pieces.append((now, body))
        if complete:
            self._complete(exchange)
        elif body and exchange.is_done(body):
            exchange.complete = True
            self._pool.loop.call_later(GRACE, self._late_end, exchange)

    def _read_head(self, exchange: Exchange, data: bytes) -> bytes:
        """Read status and headers once they are whole; return what follows them."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._buffer = data
            if len(data) > MAX_HEADER:
                self._fail("bad stream", "no end of the response's headers")
            return b""
        lines = data[:end].decode("latin-1").split("\r\n")
        first = lines[0].split(" ", 2)
        if not first[0].startswith("HTTP/1.") or len(first) < 2 or not first[1].isdecimal():
            self._fail("bad stream", "the response does not start with an HTTP/1 status line")
            return b""
        exchange.status = int(first[1])
        pairs = (line.partition(":") for line in lines[1:])
        exchange.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        if exchange.status < 200:  # an interim response; the real one follows
            return self._read_head(exchange, data[end + 4 :])
        self._buffer = b""
        self._in_body = True
        self._chunked = "chunked" in exchange.headers.get("transfer-encoding", "").lower()
        length = exchange.headers.get("content-length", "")
        self._left = int(length) if length.isdecimal() and not self._chunked else -1
        closing = exchange.headers.get("connection", "").lower() == "close"
        self._keep = not closing and first[0] != "HTTP/1.0" and (self._chunked or self._left >= 0)
        if exchange.status in (204, 304):
            self._left = 0
        return data[end + 4 :]

    def _decode(self, data: bytes) -> tuple[bytes, bool]:
        """Body bytes in `data` and whether the response ended; `ValueError` for broken chunks."""
        if not self._chunked:
            if self._left < 0:
                return data, False
            self._left -= len(data)
            return data, self._left <= 0
        data = self._buffer + data if self._buffer else data
        parts: list[bytes] = []
        position = 0
        while True:
            line = data.find(b"\r\n", position)
            if line < 0:
                break
            size = int(data[position:line].split(b";", 1)[0], 16)
            if size < 0:
                raise ValueError("negative chunk")
            begin, end = line + 2, line + 2 + size
            if size == 0:
                # Trailers may follow, up to an empty line.
                if not data.startswith(b"\r\n", begin) and data.find(b"\r\n\r\n", begin) < 0:
                    break
                self._buffer = b""
                return b"".join(parts), True
            if len(data) < end + 2:
                break
            parts.append(data[begin:end])
            position = end + 2
        self._buffer = data[position:]
        return b"".join(parts), False

    def _late_end(self, exchange: Exchange) -> None:
        if self._exchange is exchange and not exchange.ended:
            self._keep = False
            self._complete(exchange)

    def _complete(self, exchange: Exchange) -> None:
        exchange.complete = True
        self._exchange = None
        if self._keep:
            self._pool.put(self)
        else:
            self.close()
        exchange.finish()

    def _fail(self, error: str, detail: str) -> None:
        exchange, self._exchange = self._exchange, None
        self.close()
        if exchange is not None:
            exchange.finish(error, detail)

    def abandon(self, error: str, detail: str) -> None:
        """Give up on the exchange under way, e.g. at its timeout."""
        self._fail(error, detail)

    def connection_lost(self, error: Exception | None) -> None:
        self._pool.forget(self)
        exchange, self._exchange = self._exchange, None
        if exchange is None or exchange.ended:
            return
        early = time.perf_counter() - exchange.started < max(RACE, 2 * self.opening)
        if self._requests > 1 and early and not exchange.status and not self._buffer and not exchange.resent:
            # The server closed an idle connection just as it was used again (RFC 9112, 9.3.1): not its failure.
            exchange.resent = True
            self._pool.send(exchange)
            return
        until_close = self._in_body and not self._chunked and self._left < 0
        if error is None and (until_close or exchange.complete):
            exchange.complete = True
            exchange.finish()
        elif error is not None:
            exchange.finish("reset", f"the server reset the connection ({error})")
        else:
            where = "in mid-answer" if exchange.pieces else "before an answer"
            exchange.finish("cut short", f"the server closed the connection {where}")


class Pool:
    """Keep-alive connections to one server, opened when there is no idle one."""

    def __init__(self, address: Address, loop: asyncio.AbstractEventLoop) -> None:
        self.address = address
        self.loop = loop
        self.opened = 0
        self.connecting = 0
        self._idle: deque[Connection] = deque()
        self._all: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._context = address.context()
        self._addresses: asyncio.Future[list[tuple[str, int]]] | None = None
        self.dns_seconds: float | None = None

    def send(self, exchange: Exchange) -> None:
        """Send on the connection that was used last, or on a new one; never blocks."""
        exchange.handed = exchange.handed or time.perf_counter()
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                connection.send(exchange)
                return
        exchange.opened_connection = True
        task = self.loop.create_task(self._open(exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _open(self, exchange: Exchange) -> None:
        try:
            connection = await self.connect(exchange)
        except socket.gaierror as error:
            exchange.finish("dns", f"{self.address.hop[0]}: {error.strerror or error}")
        except ssl.SSLError as error:
            exchange.finish("tls", str(error.reason or error))
        except ProxyError as error:
            exchange.finish("proxy", str(error))
        except OSError as error:
            place = f"the proxy {self.address.proxy.base}" if self.address.proxy else self.address.authority
            exchange.finish("connect", f"{place}: {error.strerror or error}")
        else:
            if exchange.ended:
                self.put(connection)
            else:
                connection.send(exchange)

    async def connect(self, exchange: Exchange | None = None) -> Connection:
        """Open one connection, to the first address of the host that answers."""
        self.opened += 1
        self.connecting += 1
        try:
            return await self._connect(exchange)
        finally:
            self.connecting -= 1

    async def _connect(self, exchange: Exchange | None) -> Connection:
        stage = exchange or Exchange(b"", 0.0, 0.0, lambda e: None)
        stage.waiting = "dns"
        addresses = await self._resolve()
        stage.waiting = "connect"
        name = self.address.host if self.address.tls else None
        failure: OSError | None = None
        for address in addresses:
            began = time.perf_counter()
            try:
                if self.address.proxy and self._context:
                    connection = await self._tunnel(self.address.proxy, *address)
                else:
                    _, connection = await self.loop.create_connection(
                        lambda: Connection(self), *address, ssl=self._context, server_hostname=name
                    )
            except OSError as error:
                failure = failure or error
            else:
                connection.opening = time.perf_counter() - began
                self._all.add(connection)
                return connection
        raise failure or OSError(f"{self.address.hop[0]} has no address")

    async def _tunnel(self, proxy: Proxy, host: str, port: int) -> Connection:
        """TLS to the server inside a proxy's tunnel (CONNECT, RFC 9110, 9.3.6). Raises `ProxyError`."""
        assert self._context is not None
        # Not a StreamWriter, which would close the transport when it is collected.
        reader = asyncio.StreamReader()
        plain, _ = await self.loop.create_connection(lambda: asyncio.StreamReaderProtocol(reader), host, port)
        try:
            place = f"{bracketed(self.address.host)}:{self.address.port}"
            lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
            lines += [f"{name}: {value}" for name, value in proxy.headers.items()]
            plain.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (EOFError, asyncio.LimitOverrunError):
                raise ProxyError(f"{proxy.base} gave no answer to CONNECT {place}") from None
            status = head.split(b"\r\n", 1)[0].decode("latin-1")
            if not (status.startswith("HTTP/1.") and status.split(" ")[1:2] == ["200"]):
                raise ProxyError(f"{proxy.base} answered CONNECT {place} with `{status[:80]}`")
            connection = Connection(self)
            transport = await self.loop.start_tls(
                plain, connection, self._context, server_hostname=self.address.host
            )
            assert transport is not None
            connection.connection_made(transport)
        except BaseException:
            plain.abort()
            raise
        return connection

    async def _resolve(self) -> list[tuple[str, int]]:
        """Addresses of what is connected to, looked up once a run; a failed look-up is tried again.

        In a thread of its own: a resolver that hangs must hold up neither the loop nor the end of the run.
        """
        if self._addresses is None or (self._addresses.done() and self._addresses.exception()):
            future = self._addresses = self.loop.create_future()
            began = time.perf_counter()

            def settle(found: list[tuple[str, int]] | OSError) -> None:
                self.dns_seconds = time.perf_counter() - began
                if isinstance(found, OSError):
                    future.set_exception(found)
                else:
                    future.set_result(found)

            def look_up() -> None:
                found: list[tuple[str, int]] | OSError
                try:
                    host, port = self.address.hop
                    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                    found = list(dict.fromkeys((str(i[4][0]), port) for i in infos))
                except OSError as error:
                    found = error
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    self.loop.call_soon_threadsafe(settle, found)

            threading.Thread(target=look_up, name="dns", daemon=True).start()
        return await asyncio.shield(self._addresses)

    async def warm(self, count: int, limit: float) -> None:
        """Open `count` idle connections within `limit` seconds; what fails is told of by the requests."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                for begin in range(0, count, 64):
                    opening = (self.connect() for _ in range(min(64, count - begin)))
                    for result in await asyncio.gather(*opening, return_exceptions=True):
                        if isinstance(result, Connection):
                            self.put(result)

    def put(self, connection: Connection) -> None:
        """Take back a connection whose exchange is over."""
        if connection.usable:
            self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        """A connection is gone."""
        self._all.discard(connection)

    async def close(self) -> None:
        """Close every connection."""
        for task in list(self._tasks):
            task.cancel()
        for connection in list(self._all):
            connection.close()
        self._idle.clear()
        await asyncio.sleep(0)


def request_bytes(address: Address, path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """A POST request. Raises `InputError` for a header that would break out of its line."""
    # A proxy is told the whole URL; inside its tunnel, under TLS, the server speaks for itself.
    asked = address.proxy if not address.tls else None
    target = f"{address.base if asked else address.path}{path}"
    lines = [f"POST {target} HTTP/1.1", f"Host: {address.authority}"]
    for name, value in {**headers, **(asked.headers if asked else {})}.items():
        if any(c in value for c in "\r\n"):
            raise InputError(f"the header {name} holds a line break; check the API key")
        lines.append(f"{name}: {value}")
    lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
