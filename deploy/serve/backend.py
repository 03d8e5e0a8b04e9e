"""A back end: a server that answers chat completions, ours (a child process) or another's (a URL)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from deploy.serve.breaker import Breaker
from deploy.serve.target import Target, encode
from unshot.engines.server import CONTEXT, START_LIMIT, LocalServer, free_port, server_command
from unshot.engines.sse import DONE, Event, EventParser

# A child that cannot be started again is tried less and less often, seconds.
LONGEST_WAIT = 30.0
RESTART_AFTER_PROBES = 3


class Failure(Exception):
    """An answer that did not come: `kind` is what the log and the metrics count."""

    def __init__(
        self, kind: str, detail: str = "", *, status: int = 502, retry_after: str | None = None
    ) -> None:
        super().__init__(detail or kind)
        self.kind = kind
        self.detail = detail or kind
        self.status = status
        self.retry_after = retry_after

    @property
    def theirs(self) -> bool:
        """Whether the back end is to blame, and not the request."""
        return not 400 <= self.status < 500 or self.status in (401, 403, 404, 408, 429)


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


@dataclass(eq=False)
class Backend:
    """One server. `active` counts the requests that it has; `idle` is set while there are none."""

    target: Target
    settings: Settings
    session: aiohttp.ClientSession
    timeout: float
    active: int = 0
    restarts: int = 0
    server: LocalServer | None = None
    breaker: Breaker = field(init=False)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    _url: str = ""
    _wait: float = 0.5
    _retry: float = 0.0
    _starting: bool = False

    def __post_init__(self) -> None:
        self.breaker = Breaker(failures=self.settings.failures, cooldown=self.settings.cooldown)
        self.idle.set()
        self._slots = asyncio.Semaphore(self.settings.slots if self.target.path else 1 << 30)
        self._headers = {"Content-Type": "application/json"}
        if self.target.key:
            self._headers["Authorization"] = f"Bearer {self.target.key}"

    @property
    def label(self) -> str:
        return self.target.label

    @property
    def up(self) -> bool:
        """Whether the server runs, as far as can be told without asking it."""
        return self.target.path is None or (self.server is not None and self.server.running)

    async def start(self) -> None:
        """Start the child and wait until it answers. A URL is taken as it is. Raises `OutsideError`."""
        if self.target.path is None:
            self._url = f"{self.target.url}/chat/completions"
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
            # On this thread: the child ends with the thread that started it.
            self.server = LocalServer.start(self.label, command, port)
            await self.server.wait_async(limit=self.settings.start_limit)
            self._url = f"{self.server.address.base}/chat/completions"
            self._wait = 0.5
        except BaseException:
            await self._kill()
            raise
        finally:
            self._starting = False

    async def watch(self) -> bool:
        """Start the child again where it died or hangs; whether that was tried. Called a few times a second."""
        hangs = self.breaker.failed_probes >= RESTART_AFTER_PROBES
        if self.target.path is None or self._starting or (self.up and not hangs):
            return False
        now = time.monotonic()
        if now < self._retry:
            return False
        self._wait = min(self._wait * 2, LONGEST_WAIT)
        self._retry = now + self._wait
        await self._kill()
        self.restarts += 1
        await self.start()
        self.breaker.success()
        return True

    async def _kill(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            await asyncio.to_thread(server.kill)  # also ends one that is stopped

    async def close(self) -> None:
        """End the child."""
        server, self.server = self.server, None
        if server is not None:
            await asyncio.to_thread(server.end, grace=3.0)

    def body(self, request: dict[str, Any], *, stream: bool) -> bytes:
        """The request as the back end gets it: the arm's prompt in front, greedy where the user asks for nothing."""
        target = self.target
        asked = {k: v for k, v in request.items() if k not in ("model", "messages", "stream", "user")}
        asked.setdefault("temperature", 0)
        if target.max_tokens and not {"max_tokens", "max_completion_tokens"} & asked.keys():
            asked["max_tokens"] = target.max_tokens
        if target.path is not None and "max_completion_tokens" in asked:
            asked["max_tokens"] = asked.pop("max_completion_tokens")
        asked.pop("stream_options", None)
        if stream:
            asked |= {"stream": True, "stream_options": {"include_usage": True}}
        rest = encode({"model": target.model, **target.extra, **asked})
        return f'{{"messages":{target.encoded(request["messages"])},{rest[1:]}'.encode()

    async def whole(self, body: bytes, deadline: float, sent: list[float]) -> dict[str, Any]:
        """The answer as one JSON object. Raises `Failure`. `sent` gets the time at which the server was asked."""
        try:
            async with asyncio.timeout_at(deadline), self._slots:
                sent.append(time.perf_counter())
                async with self.session.post(self._url, data=body, headers=self._headers) as response:
                    raw = await response.read()
                    if response.status != 200:
                        raise failed(response, raw)
        except TimeoutError:
            raise Failure("timeout", f"no answer within {self.timeout:g} s", status=504) from None
        except (aiohttp.ClientError, OSError) as error:
            raise Failure(kind_of(error), str(error)) from None
        try:
            answer = json.loads(raw)
            choice = answer["choices"][0]
            if not isinstance(choice["message"].get("content") or "", str):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise Failure("bad answer", "the back end's answer is not a chat completion") from None
        return dict(answer)

    async def pieces(
        self, body: bytes, deadline: float, sent: list[float]
    ) -> AsyncGenerator[list[dict[str, Any]], None]:
        """The chunks of a streamed answer, as many together as came together. Raises `Failure`, also in mid-answer.

        `deadline` holds up to the first byte, then each gap may last `timeout`. No timeout spans a `yield`: another
        task may ask for the rest.
        """
        response: aiohttp.ClientResponse | None = None
        entered = False
        try:
            async with asyncio.timeout_at(deadline):
                await self._slots.acquire()
                entered = True
                sent.append(time.perf_counter())
                response = await self.session.post(self._url, data=body, headers=self._headers)
                if response.status != 200:
                    raise failed(response, await response.read())
            parser = EventParser()
            while True:
                async with asyncio.timeout(self.timeout):
                    data = await response.content.readany()
                if not data:
                    raise Failure("cut short", "the back end's stream ended without [DONE]")
                chunks, done = read_events(parser.feed(data))
                if chunks:
                    yield chunks
                if done:
                    return
        except TimeoutError:
            raise Failure("timeout", f"nothing came for {self.timeout:g} s", status=504) from None
        except (aiohttp.ClientError, OSError) as error:
            raise Failure(kind_of(error), str(error)) from None
        except (ValueError, AttributeError):
            raise Failure(
                "bad answer", "the back end's stream is not made of chat completion chunks"
            ) from None
        finally:
            if response is not None:
                response.release()
            if entered:
                self._slots.release()

    async def probe(self) -> None:
        """Ask for one token, with the arm's own prompt; tells the breaker how it went."""
        self.breaker.probe()
        request = {"messages": [{"role": "user", "content": "ping"}], "max_tokens": 1}
        loop = asyncio.get_running_loop()
        try:
            await self.whole(self.body(request, stream=False), loop.time() + min(self.timeout, 10.0), [])
        except Failure as failure:
            if failure.theirs:
                self.breaker.probe_failed()
                return
        except BaseException:
            self.breaker.probe_failed()
            raise
        self.breaker.success()

    def enter(self) -> None:
        """A request begins."""
        self.active += 1
        self.idle.clear()

    def leave(self) -> None:
        """A request has ended."""
        self.active -= 1
        if not self.active:
            self.idle.set()


def read_events(events: Sequence[Event]) -> tuple[list[dict[str, Any]], bool]:
    """The chunks in server-sent events, and whether the last of all was among them.

    Raises `ValueError` for what is no chunk, and `Failure` for an error that the server reports.
    """
    chunks: list[dict[str, Any]] = []
    for event in events:
        if event.data.strip() == DONE:
            return chunks, True
        if not event.data.strip():
            continue
        chunk = json.loads(event.data)
        if chunk.get("error"):
            raise Failure("server error", str(chunk["error"])[:200])
        chunks.append(chunk)
    return chunks, False


def failed(response: aiohttp.ClientResponse, raw: bytes) -> Failure:
    """A status other than 200 as a failure, with the server's own words."""
    try:
        error = json.loads(raw)["error"]
        detail = str(error.get("message") if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        detail = raw[:200].decode(errors="replace")
    return Failure(
        f"http {response.status}",
        detail[:300],
        status=response.status,
        retry_after=response.headers.get("Retry-After"),
    )


def kind_of(error: Exception) -> str:
    """A connection's failure in one word or two."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return "connect"
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError):
        return "reset"
    return "cut short" if isinstance(error, aiohttp.ClientPayloadError) else "connection"
