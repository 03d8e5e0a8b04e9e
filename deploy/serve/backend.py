"""A back end: a server that answers chat completions, ours (a child process) or another's (a URL)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from deploy.serve.breaker import Breaker
from deploy.serve.failure import Failure
from deploy.serve.parameters import ChatRequest, Json
from deploy.serve.reply import (
    LARGEST,
    Chunk,
    Completion,
    NotAnAnswer,
    as_chunks,
    decode,
    read_chunk,
    read_completion,
    read_events,
)
from deploy.serve.shared import ACTIVE, HELD, Cell, Places, Shared
from deploy.serve.target import Target, encode
from unshot.engines.server import CONTEXT, START_LIMIT, LocalServer, free_port, server_command
from unshot.engines.sse import EventParser
from unshot.errors import OutsideError

# A child that cannot be started again is tried less and less often, seconds.
LONGEST_WAIT = 30.0
RESTART_AFTER_PROBES = 3
# Seconds in which a server must list its models to be called up; tries on kept connections that turn out closed.
HEALTH_LIMIT = 2.0
RESENDS = 4
# Where a back end's cell counts how often its server was started again; seconds between looks for a server to come.
RESTARTS = 4
POLL = 0.05


@dataclass(frozen=True)
class Settings:
    """How back ends are run. Seconds."""

    timeout: float = 60.0
    threads: int = 1
    slots: int = 1
    context: int = CONTEXT
    start_limit: float = START_LIMIT
    cooldown: float = 5.0
    failures: int = 5


@dataclass(frozen=True)
class Outgoing:
    """What a back end is asked: the request, the user's own messages of it, and a client's key that is passed on."""

    request: ChatRequest
    own_messages: list[Json]
    logprobs: bool = False
    authorization: str | None = field(default=None, repr=False)


@dataclass
class Connection:
    """Whether a request went out on a connection that had been used before."""

    reused: bool = False


def open_session() -> aiohttp.ClientSession:
    """The connections to all back ends."""
    trace = aiohttp.TraceConfig()

    async def reused(session: object, context: object, params: object) -> None:
        connection = getattr(context, "trace_request_ctx", None)
        if isinstance(connection, Connection):
            connection.reused = True

    trace.on_connection_reuseconn.append(reused)
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0),
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0),
        trace_configs=[trace],
    )


@dataclass(eq=False)
class Backend:
    """One server. `active` counts the requests that it has of this process; `idle` is set while there are none.

    With `shared` its breaker and counts are those of all workers. A worker starts no server: it asks the one that the
    leading process has started.
    """

    target: Target
    settings: Settings
    session: aiohttp.ClientSession
    timeout: float
    shared: Shared | None = None
    active: int = 0
    server: LocalServer | None = None
    # Whether it answered when it was last asked for its models; None before that.
    reachable: bool | None = None
    breaker: Breaker = field(init=False)
    cell: Cell = field(init=False)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    _url: str = ""
    _held: bool = False
    _wait: float = 0.5
    _retry: float = 0.0
    _starting: bool = False
    _checked: float = 0.0
    # Some servers refuse `stream_options`; some take a schema in another place.
    _stream_options: bool = True
    _native_schema: bool = True

    def __post_init__(self) -> None:
        self.cell = self.shared.cell(self.target.identity) if self.shared is not None else Cell()
        self.breaker = Breaker(self.cell, failures=self.settings.failures, cooldown=self.settings.cooldown)
        self.idle.set()
        self._slots: asyncio.Semaphore | Places = asyncio.Semaphore(
            self.settings.slots if self.target.path else 1 << 30
        )
        if self.target.path is None:
            self._url = str(self.target.url)
        elif self.shared is not None:
            self._slots = Places(self.cell, self.settings.slots)

    @property
    def follows(self) -> bool:
        """Whether its server is another process's to start and to end."""
        return self.target.path is not None and self.shared is not None and self.shared.index is not None

    def _published(self) -> dict[str, str]:
        return self.shared.server(self.target.identity) if self.shared is not None else {}

    @property
    def restarts(self) -> int:
        """How often its server was started again."""
        return int(self.cell.facts[RESTARTS])

    @property
    def in_use(self) -> bool:
        """Whether any worker may still send it a request."""
        return self.cell.total(HELD) > 0 or self.cell.total(ACTIVE) > 0

    @property
    def label(self) -> str:
        return self.target.label

    @property
    def running(self) -> bool:
        """Whether there is a process (of a URL: always)."""
        if self.follows:
            found = self._published()
            self._url = found.get("url", "")
            return bool(self._url) and alive(found.get("pid", ""))
        return self.target.path is None or (self.server is not None and self.server.running)

    @property
    def up(self) -> bool:
        """Whether the server runs and answered when it was last asked."""
        return self.running and self.reachable is not False

    async def start(self) -> None:
        """Start the child and wait until it answers. A URL is taken as it is. Raises `OutsideError`."""
        if not self._held:
            self._held = True
            self.cell.count(HELD, 1)
        if self.target.path is None:
            await self.check_health()
            return
        if self.follows:
            await self._wait_for_server()
            self._native_schema = self._published().get("schema") != "other"
            return
        self._starting = True
        try:
            port = free_port()
            command = server_command(
                self.target.path,
                port,
                self.settings.threads,
                self.settings.slots,
                context=self.settings.context,
            )
            self._native_schema = native_schema(command)
            # On this thread: the child ends with the thread that started it.
            self.server = LocalServer.start(self.label, command, port)
            await self.server.wait_async(limit=self.settings.start_limit)
            self._url = self.server.address.base
            self._wait = 0.5
            self.reachable = True
        except BaseException:
            await self._kill()
            raise
        finally:
            self._starting = False

    async def _wait_for_server(self) -> None:
        """Wait until the leading process says where the server is, or that it did not start."""
        deadline = time.monotonic() + self.settings.start_limit + 30
        while not self.running:
            found = self._published()
            if "error" in found or time.monotonic() > deadline:
                raise OutsideError(found.get("error", f"{self.label}: its server was not started in time"))
            await asyncio.sleep(POLL)

    def health_due(self, every: float) -> bool:
        """Whether it is time to ask; a server that is at work is known to be there."""
        return not self.active and not self._starting and time.monotonic() - self._checked >= every

    async def check_health(self) -> None:
        """Ask for the models; any answer that is not a server's error will do."""
        self._checked = time.monotonic()
        try:
            async with self.session.get(
                f"{self._url}/models",
                timeout=aiohttp.ClientTimeout(total=HEALTH_LIMIT),
                headers=self._headers(None),
                allow_redirects=False,
            ) as response:
                self.reachable = response.status < 500
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError):
            if not self.active:
                self.reachable = False
        self._checked = time.monotonic()

    async def watch(self) -> bool:
        """Start the child again where it died or hangs; whether that was tried. Called a few times a second."""
        hangs = self.breaker.failed_probes >= RESTART_AFTER_PROBES
        if self.target.path is None or self.follows or self._starting or (self.running and not hangs):
            return False
        now = time.monotonic()
        if now < self._retry:
            return False
        self._wait = min(self._wait * 2, LONGEST_WAIT)
        self._retry = now + self._wait
        await self._kill()
        self.cell.facts[RESTARTS] += 1
        await self.start()
        self.breaker.success()
        return True

    async def _kill(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            await asyncio.to_thread(server.kill)  # also ends one that is stopped

    async def close(self) -> None:
        """End the child; of a server that another process started: say that it is used no more."""
        if self._held:
            self._held = False
            self.cell.count(HELD, -1)
        server, self.server = self.server, None
        if server is not None:
            await asyncio.to_thread(server.end, grace=3.0)

    def body(self, asked: Outgoing, *, stream: bool, options: bool = True) -> bytes:
        """The request as the back end gets it: the arm's prompt in front, greedy where the user asks for nothing.

        `options`: a stream is asked for with its usage.
        """
        target, request = self.target, asked.request
        sent: Json = dict(request.parameters)
        if target.passes_through:
            model = target.model or request.model
            head: Json = {"model": model} if model else {}
        else:
            sent.setdefault("temperature", 0)
            if target.max_tokens and request.limit is None:
                sent["max_tokens"] = target.max_tokens
            head = {"model": target.model or "default", **target.extra}
        if target.path is not None:
            self._for_llama_cpp(sent)
        if asked.logprobs:
            sent["logprobs"] = True
        if stream:
            sent["stream"] = True
            if options:
                sent["stream_options"] = {"include_usage": True}
        messages = target.encoded(request.messages if target.passes_through else asked.own_messages)
        rest = encode({**head, **sent})
        separator = "," if len(rest) > 2 else ""
        return f'{{"messages":{messages}{separator}{rest[1:]}'.encode("utf-8", "replace")

    def _for_llama_cpp(self, sent: Json) -> None:
        """What llama.cpp's servers name otherwise."""
        if "max_completion_tokens" in sent:
            sent["max_tokens"] = sent.pop("max_completion_tokens")
        wanted = sent.get("response_format")
        if isinstance(wanted, dict) and wanted.get("type") == "json_schema" and not self._native_schema:
            sent["response_format"] = {"type": "json_object", "schema": wanted["json_schema"]["schema"]}

    def _headers(self, authorization: str | None) -> dict[str, str]:
        found = {"Content-Type": "application/json"}
        if self.target.key:
            found["Authorization"] = f"Bearer {self.target.key}"
        elif authorization and self.target.passes_through:
            found["Authorization"] = authorization
        return found

    async def _post(self, body: bytes, asked: Outgoing) -> aiohttp.ClientResponse:
        """Send a request; again where a kept connection was closed just as it was used (RFC 9112, 9.3.1)."""
        connection = Connection()
        for left in range(RESENDS, -1, -1):
            connection.reused = False
            try:
                return await self.session.post(
                    f"{self._url}/chat/completions",
                    data=body,
                    headers=self._headers(asked.authorization),
                    allow_redirects=False,
                    trace_request_ctx=connection,
                )
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionResetError) as error:
                refused = isinstance(error, aiohttp.ClientConnectorError)
                if not left or refused or not connection.reused:
                    raise
        raise AssertionError("the last try returns or raises")

    async def whole(self, asked: Outgoing, deadline: float, sent: list[float]) -> Completion:
        """The whole answer. Raises `Failure`. `sent` gets the time at which the server was asked."""
        body = self.body(asked, stream=False)
        try:
            async with asyncio.timeout_at(deadline), self._slots:
                sent.append(time.perf_counter())
                response = await self._post(body, asked)
                async with response:
                    raw = await read_bounded(response)
                    if response.status != 200:
                        raise failed(response, raw)
        except TimeoutError:
            raise Failure("timeout", f"no answer within {self.timeout:g} s", status=504) from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._broken(error) from None
        self.reachable = True
        try:
            return read_completion(raw)
        except NotAnAnswer as error:
            raise Failure("bad answer", f"the back end's answer is not a chat completion ({error})") from None

    async def pieces(
        self, asked: Outgoing, deadline: float, sent: list[float]
    ) -> AsyncGenerator[list[Chunk], None]:
        """The chunks of a streamed answer, as many together as came together. Raises `Failure`, also in mid-answer.

        `deadline` holds up to the answer's first token, then each gap may last `timeout`. No timeout spans a `yield`:
        another task may ask for the rest.
        """
        response: aiohttp.ClientResponse | None = None
        entered = False
        try:
            async with asyncio.timeout_at(deadline):
                await self._slots.acquire()
                entered = True
                sent.append(time.perf_counter())
                response = await self._open_stream(asked)
            self.reachable = True
            if response.content_type == "application/json":
                async with asyncio.timeout_at(deadline):
                    raw = await read_bounded(response)
                yield in_one_piece(raw)
                return
            async for chunks in self._events(response, deadline):
                yield chunks
        except TimeoutError:
            raise Failure(
                "timeout", f"nothing of the answer came for {self.timeout:g} s", status=504
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._broken(error) from None
        except NotAnAnswer as error:
            detail = f"the back end's stream is not made of chat completion chunks ({error})"
            raise Failure("bad answer", detail) from None
        finally:
            if response is not None:
                response.close()
            if entered:
                self._slots.release()

    async def _open_stream(self, asked: Outgoing) -> aiohttp.ClientResponse:
        """A response with status 200; without `stream_options` where the server does not take them."""
        for with_options in (True, False) if self._stream_options else (False,):
            response = await self._post(self.body(asked, stream=True, options=with_options), asked)
            if response.status == 200:
                # Where it refused the request without them too, they were not to blame.
                self._stream_options = with_options
                return response
            async with response:
                failure = failed(response, await read_bounded(response))
            if response.status not in (400, 422):
                break
        raise failure

    async def _events(
        self, response: aiohttp.ClientResponse, deadline: float
    ) -> AsyncGenerator[list[Chunk], None]:
        parser, size, loop = EventParser(), 0, asyncio.get_running_loop()
        begun = finished = answered = False
        while True:
            async with asyncio.timeout_at(deadline):
                data = await response.content.readany()
            # The end of the stream ends its last event too, as far as a back end's last `[DONE]` goes.
            chunks, done = read_events(parser.feed(data or b"\n\n"))
            begun = begun or any(c.begun or c.finished for c in chunks)
            finished = finished or any(c.finished for c in chunks)
            answered = answered or any(c.has_choices for c in chunks)
            if begun and chunks:  # comments and empty chunks are no answer
                deadline = loop.time() + self.timeout
            if done and not answered:
                raise NotAnAnswer("no choices")
            if chunks:
                yield chunks
            if done:
                return
            size += len(data)
            if max(parser.pending, size) > LARGEST:
                raise NotAnAnswer("it does not end")
            if not data:
                if finished:
                    return
                raise Failure("cut short", "the back end's stream ended without [DONE]")

    def _broken(self, error: Exception) -> Failure:
        """A connection's failure."""
        kind = kind_of(error)
        if kind == "connect":
            self.reachable = False
        return Failure(kind, str(error)[:200] or kind)

    async def probe(self) -> None:
        """Ask for one token, with the arm's own prompt; tells the breaker how it went. One process does at a time."""
        if not self.breaker.probe():
            return
        messages: list[Json] = [{"role": "user", "content": "ping"}]
        asked = Outgoing(ChatRequest(messages, {"max_tokens": 1}), messages)
        loop = asyncio.get_running_loop()
        try:
            await self.whole(asked, loop.time() + min(self.timeout, 10.0), [])
        except Failure as failure:
            if not failure.request_fault:
                self.breaker.probe_failed()
                return
        except BaseException:
            self.breaker.probe_failed()
            raise
        self.breaker.success()

    def enter(self) -> None:
        """A request begins."""
        self.active += 1
        self.cell.count(ACTIVE, 1)
        self.idle.clear()

    def leave(self) -> None:
        """A request has ended."""
        self.active -= 1
        self.cell.count(ACTIVE, -1)
        if not self.active:
            self.idle.set()


def alive(pid: str) -> bool:
    """Whether a process that this one did not start has not ended; where that cannot be seen it has not."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except FileNotFoundError:
        return not Path("/proc/self").exists()
    except OSError:
        return True


def native_schema(command: list[str]) -> bool:
    """Whether a server takes a schema as the OpenAI API has it; llama-cpp-python's has its own place for it."""
    return "llama_cpp.server" not in command


async def read_bounded(response: aiohttp.ClientResponse) -> bytes:
    """A response's body. Raises `NotAnAnswer` where it does not end."""
    parts, size = [], 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > LARGEST:
            response.close()
            raise Failure("bad answer", f"the back end's answer has more than {LARGEST} bytes")
    return b"".join(parts)


def in_one_piece(raw: bytes) -> list[Chunk]:
    """The chunks of an answer that a server gave whole where a stream was asked for. Raises `NotAnAnswer`."""
    completion = read_completion(raw)
    head = {k: v for k, v in completion.raw.items() if k not in ("choices", "usage", "object")}
    chunks = [read_chunk(encode(c).encode()) for c in as_chunks(completion, head)]
    if "usage" in completion.raw:
        usage = {**head, "choices": [], "usage": completion.raw["usage"]}
        chunks.append(read_chunk(encode(usage).encode()))
    return chunks


def failed(response: aiohttp.ClientResponse, raw: bytes) -> Failure:
    """A status other than 200 as a failure, with the server's own words.

    A client gets a 4xx only for what its own request is to blame for: a redirect, a wrong key or a missing model are
    the gateway's affair.
    """
    status = response.status
    try:
        error = decode(raw).get("error")
        detail = str(error.get("message") if isinstance(error, dict) else error) if error else ""
    except NotAnAnswer:
        detail = ""
    detail = detail or raw[:200].decode(errors="replace")
    own = status in (400, 413, 422)
    shown = {400: 400, 413: 413, 422: 400, 408: 504, 429: 429, 503: 503, 504: 504}.get(status, 502)
    after = response.headers.get("Retry-After", "")
    return Failure(
        "redirect" if 300 <= status < 400 else f"http {status}",
        detail[:300] or f"the back end answered with status {status}",
        status=shown,
        retry_after=after if after.isascii() and after.isdigit() and len(after) < 6 else None,
        request_fault=own,
    )


def kind_of(error: Exception) -> str:
    """A connection's failure in one word or two."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return "connect"
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError):
        return "reset"
    return "cut short" if isinstance(error, aiohttp.ClientPayloadError) else "connection"
