"""A gateway on real sockets in a thread of this process, in front of a back end that a function plays."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import uvicorn

from deploy.registry.store import Registry
from deploy.serve.app import Api, Limits
from deploy.serve.backend import Settings
from deploy.serve.gateway import Gateway
from deploy.serve.metrics import Metrics
from deploy.serve.request_log import LogSettings, RequestLog
from deploy.serve.run import with_deadline
from deploy.serve.supervisor import Supervisor
from deploy.serve.target import ArmSpec, Resolver
from unshot.case import Case
from unshot.case import TaskSettings as Task
from unshot.console import Output

# What the back end answers with: it gets the request's head and body, and writes what it likes.
Play = Callable[[bytes, bytes, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Served:
    """A gateway that listens, and what its back ends were asked."""

    port: int = 0
    gateway: Any = None
    supervisor: Any = None
    api: Any = None
    log: Any = None
    warnings: list[str] = field(default_factory=list)
    seen: list[bytes] = field(default_factory=list)
    loop: Any = None

    def on_loop(self, work: Callable[[], Any]) -> Any:
        """The result of a function called on the gateway's thread."""

        async def call() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(20)


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of one HTTP/1.1 request with a Content-Length."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    return head, await reader.readexactly(length) if length else b""


def http(body: bytes, status: int = 200, kind: str = "application/json", more: str = "") -> bytes:
    """A whole response."""
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


def played(play: Play, seen: list[bytes]) -> Callable[..., Awaitable[None]]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while not writer.is_closing():
                head, body = await read_request(reader)
                if head.startswith(b"GET"):
                    writer.write(http(b'{"data": []}'))
                else:
                    seen.append(body)
                    await play(head, body, writer)
                await writer.drain()
        writer.close()

    return handle


@contextlib.contextmanager
def serving(
    folder: Path,
    play: Play,
    candidate: Play | None = None,
    *,
    task: Task | None = None,
    limits: Limits | None = None,
    log: bool = True,
    texts: bool = False,
    record: bool = False,
    share: float = 1.0,
    timeout: float = 2.0,
    model: str | None = None,
    settings: Settings | None = None,
    **more: Any,
) -> Iterator[Served]:
    """A gateway with one arm, or two where `candidate` is given; it ends with the block."""
    served = Served()
    ready = threading.Event()
    failed: list[BaseException] = []

    async def main() -> None:
        served.loop = asyncio.get_running_loop()
        servers = []
        specs: dict[Any, ArmSpec] = {}
        for arm, script in (("baseline", play), ("candidate", candidate)):
            if script is None:
                continue
            server = await asyncio.start_server(played(script, served.seen), "127.0.0.1", 0)
            servers.append(server)
            port = server.sockets[0].getsockname()[1]
            prompt = "client" if record and arm == "baseline" else "long" if arm == "baseline" else "short"
            specs[arm] = ArmSpec(f"http://127.0.0.1:{port}/v1", prompt=prompt, model=model)
        out = Output(verbosity=-1)
        out.warn = served.warnings.append  # type: ignore[method-assign]
        metrics = Metrics()
        served.log = None
        if log:
            served.log = RequestLog(
                LogSettings(folder / "log", texts),
                counted=lambda outcome: metrics.log_lines.labels(outcome).inc(),
                warn=served.warnings.append,
            )
        case = Case(task=task or Task())
        served.gateway = Gateway(
            case.task.name, metrics, log=served.log, shadow=False, logprobs=False, record=record, **more
        )
        resolver = Resolver(case, Registry(folder / "store"), None, None)
        served.supervisor = Supervisor(
            served.gateway, resolver, specs, settings or Settings(timeout=timeout, cooldown=0.3),
            {"baseline": timeout, "candidate": timeout}, share, 0.0, out,
        )  # fmt: skip
        await served.supervisor.begin()
        own = limits or Limits()
        served.api = Api(
            served.gateway, own, served.supervisor.health, known_prompt=resolver.long,
            warn=served.warnings.append,
        )  # fmt: skip
        bound = socket.socket()
        bound.bind(("127.0.0.1", 0))
        served.port = bound.getsockname()[1]
        config = uvicorn.Config(
            served.api.app(), http=with_deadline(own.read_timeout), log_level="critical", access_log=False,
            lifespan="off", timeout_graceful_shutdown=5,
        )  # fmt: skip
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
        task_ = asyncio.create_task(server.serve(sockets=[bound]))
        follower = asyncio.create_task(served.supervisor.run())
        while not server.started:
            await asyncio.sleep(0.01)
        ready.set()
        while not stop.is_set():
            await asyncio.sleep(0.02)
        served.api.stop()
        server.should_exit = True
        await task_
        follower.cancel()
        await served.gateway.settle()
        await served.supervisor.close()
        for one in servers:
            one.close()

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            failed.append(error)
            ready.set()

    stop = threading.Event()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(30)
    try:
        if failed:
            raise failed[0]
        yield served
    finally:
        stop.set()
        thread.join(30)
        if served.log is not None:
            served.log.close()


def with_limits(**fields: Any) -> Limits:
    return replace(Limits(), **fields)
