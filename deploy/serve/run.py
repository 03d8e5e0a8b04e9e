"""From the command line's options to a gateway that listens until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from deploy.registry.locate import open_registry
from deploy.serve.app import LOOPBACK, Api, Limits
from deploy.serve.backend import Settings
from deploy.serve.check import read_schema
from deploy.serve.gateway import Gateway
from deploy.serve.metrics import Metrics
from deploy.serve.request_log import LogSettings, RequestLog
from deploy.serve.supervisor import Supervisor
from deploy.serve.target import ArmSpec, Resolver, price_of
from unshot.case import Case
from unshot.console import Output
from unshot.contracts.request_log import Arm
from unshot.data.personal import check_region
from unshot.engines.address import read_key
from unshot.errors import InputError, OutsideError
from unshot.machine import usable_cores
from unshot.prices import Prices

# Seconds that requests under way have at the end.
GRACE = 60


@dataclass(frozen=True)
class ArmOptions:
    """What the command line says of one arm."""

    spec: str | None = None
    prompt: str = "long"
    model: str | None = None
    key_env: str | None = None
    price: Prices | None = None
    hour: float | None = None


@dataclass(frozen=True)
class ServeOptions:
    """The command line of `unshot deploy serve`; `split` in percent, times in seconds."""

    baseline: ArmOptions
    candidate: ArmOptions
    record: bool = False
    split: float = 100.0
    shadow: bool = False
    timeout: float = 60.0
    candidate_timeout: float | None = None
    cooldown: float = 5.0
    host: str = "127.0.0.1"
    port: int = 8080
    allow_host: tuple[str, ...] = ()
    allow_origin: tuple[str, ...] = ()
    key_env: str | None = None
    reviewer_key_env: str | None = None
    log_dir: Path | None = None
    log_texts: bool = False
    phone_region: str = "US"
    logprobs: bool = False
    unknown_parameters: str = "refuse"
    max_tokens: int | None = None
    max_body: int = 1 << 20
    read_timeout: float = 10.0
    concurrency: int = 64
    threads: int | None = None
    slots: int = 1
    context: int = 8192
    keep_warm: float = 300.0


def arm_specs(options: ServeOptions, *, has_registry: bool) -> dict[Arm, ArmSpec]:
    """What each arm runs. Raises `InputError` where neither is given."""
    found: dict[Arm, ArmSpec] = {}
    given: tuple[tuple[Arm, ArmOptions], ...] = (
        ("baseline", options.baseline),
        ("candidate", options.candidate),
    )
    for arm, own in given:
        spec = own.spec
        if spec is None and arm == "candidate" and has_registry:
            spec = "champion"
        if spec is None:
            continue
        passes_through = options.record and arm == "baseline"
        place = ArmSpec(
            spec=spec,
            prompt="client" if passes_through else own.prompt,
            model=own.model,
            key_env=own.key_env,
            price=price_of(own.price, own.hour, own.model),
        )
        if place.follows and not has_registry:
            raise InputError(
                f"--{arm} {spec}: no registry in --store; give gguf:FILE or http://HOST:PORT/v1, or add a version"
            )
        found[arm] = place
    if not found:
        raise InputError("nothing to serve: give --baseline, --candidate, or a --store with a registry")
    if options.record and "baseline" not in found:
        raise InputError("--record needs --baseline, the API that answers today")
    return found


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a taken port is reported before any model is loaded. Raises `OutsideError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, UnicodeError, ValueError) as error:
        bound.close()
        why = error.strerror if isinstance(error, OSError) else "not an address"
        raise OutsideError(
            f"cannot listen on {host}:{port} ({why}); choose another --port or --host"
        ) from None
    return bound


def run(case: Case, store: Path, tracking: str | None, out: Output, options: ServeOptions) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are finished. Raises `InputError` or `OutsideError`."""
    registry = open_registry(store, tracking=tracking, must_exist=False)
    specs = arm_specs(options, has_registry=registry.exists())
    if options.log_texts and not options.log_dir:
        raise InputError("--log-texts needs --log DIR")
    schema = read_schema(case.task.answer_schema) if case.task.answer_schema else None
    resolver = Resolver(case, registry, schema, options.max_tokens)
    limits = Limits(
        body=options.max_body,
        concurrency=options.concurrency,
        key=read_key(options.key_env),
        reviewer_key=read_key(options.reviewer_key_env, "--reviewer-key-env"),
        read_timeout=options.read_timeout,
        host=options.host,
        hosts=tuple(name.lower() for name in options.allow_host),
        origins=options.allow_origin,
        unknown=options.unknown_parameters,
    )
    if limits.key is None and options.host not in LOOPBACK:
        out.warn(f"listening on {options.host} without --key-env: whoever reaches the port is answered")
    bound = listen(options.host, options.port)
    with bound, _runner() as runner:
        runner.run(_serve(case.task.name, resolver, specs, bound, limits, out, options))


@contextlib.contextmanager
def _runner() -> Iterator[asyncio.Runner]:
    """uvloop where it is installed."""
    factory = None
    with contextlib.suppress(ImportError):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        yield runner


def open_log(options: ServeOptions, metrics: Metrics, out: Output) -> RequestLog | None:
    """The request log where one is asked for. Raises `InputError` or `OutsideError`."""
    if options.log_dir is None:
        return None
    return RequestLog(
        LogSettings(options.log_dir, options.log_texts, check_region(options.phone_region)),
        counted=lambda outcome: metrics.log_lines.labels(outcome).inc(),
        warn=out.warn,
    )


async def _serve(
    name: str,
    resolver: Resolver,
    specs: dict[Arm, ArmSpec],
    bound: socket.socket,
    limits: Limits,
    out: Output,
    options: ServeOptions,
) -> None:
    metrics = Metrics()
    log = open_log(options, metrics, out)
    gateway = Gateway(
        name, metrics, log=log, shadow=options.shadow, logprobs=options.logprobs, record=options.record
    )
    supervisor = Supervisor(
        gateway,
        resolver,
        specs,
        Settings(
            timeout=options.timeout,
            threads=options.threads or usable_cores(),
            slots=options.slots,
            context=options.context,
            cooldown=options.cooldown,
        ),
        {"baseline": options.timeout, "candidate": options.candidate_timeout or options.timeout},
        options.split / 100,
        options.keep_warm,
        out,
    )
    api = Api(gateway, limits, supervisor.health, known_prompt=resolver.long, warn=out.warn)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, supervisor.wake.set)
    stopping = asyncio.create_task(_wait(stop))
    try:
        if await _started(supervisor, stopping):
            server = _server(api, supervisor, options)
            serving = asyncio.create_task(server.serve(sockets=[bound]))
            address = bound.getsockname()
            out.log(f"serving {name} on http://{options.host}:{address[1]}/v1 (process {os.getpid()})")
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                out.log("stopping; requests under way are finished")
                api.stop()
                server.should_exit = True
            await serving
        else:
            out.log("stopped before it served")
    finally:
        stopping.cancel()
        await gateway.settle()
        await supervisor.close()
        if log is not None:
            await asyncio.to_thread(log.close)


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


async def _started(supervisor: Supervisor, stopping: asyncio.Task[None]) -> bool:
    """Start every back end; whether that was done before the gateway was told to stop."""
    starting = asyncio.create_task(supervisor.begin())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        return False
    await starting
    return not stopping.done()


def _server(api: Api, supervisor: Supervisor, options: ServeOptions) -> _Server:
    """The HTTP server; it follows the registry as long as it runs."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        follower = asyncio.create_task(supervisor.run())
        try:
            yield
        finally:
            follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await follower

    config = uvicorn.Config(
        api.app(lifespan),
        http=with_deadline(options.read_timeout),
        log_level="error",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=GRACE,
        backlog=1024,
        server_header=False,
    )
    return _Server(config)


class _Server(uvicorn.Server):
    """uvicorn's server without its own signal handlers: ours end it, with exit code 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


# The application answers a body that is late; a connection that is still waiting after that is cut.
BODY_GRACE = 2.0


class DeadlineProtocol(HttpToolsProtocol):
    """`read_timeout` seconds for a request's head, and from there for its body."""

    read_timeout: float = 10.0
    _deadline: asyncio.TimerHandle | None = None

    def _set(self, seconds: float) -> None:
        self._unset()
        self._deadline = self.loop.call_later(seconds, self._late)

    def _unset(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set(self.read_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._set(self.read_timeout)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._set(self.read_timeout + BODY_GRACE)

    def on_message_complete(self) -> None:
        self._unset()
        super().on_message_complete()


def with_deadline(seconds: float) -> type[asyncio.Protocol]:
    """The connection's class for `uvicorn.Config(http=...)`."""
    kind = type("Connection", (DeadlineProtocol,), {"read_timeout": seconds})
    return cast("type[asyncio.Protocol]", kind)
