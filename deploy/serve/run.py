"""From the command line's options to a gateway that listens until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, cast

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from deploy.registry.locate import open_registry
from deploy.serve.app import LOOPBACK, Api, Limits
from deploy.serve.backend import Settings
from deploy.serve.gateway import Gateway
from deploy.serve.metrics import Metrics
from deploy.serve.options import ArmOptions, ServeOptions
from deploy.serve.request_log import LogSettings, RequestLog
from deploy.serve.shared import Shared, state_folder
from deploy.serve.supervisor import Supervisor
from deploy.serve.target import ArmSpec, Resolver, price_of
from deploy.serve.tracing import open_tracing
from deploy.serve.workers import Order, Workers
from unshot.case import Case
from unshot.console import Output
from unshot.contracts.request_log import Arm
from unshot.contracts.task import read_schema
from unshot.data.personal import check_region
from unshot.engines.address import read_key
from unshot.errors import InputError, OutsideError
from unshot.machine import usable_cores

# Seconds that requests under way have at the end.
GRACE = 60


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
        if passes_through and not spec.startswith(("http://", "https://")):
            raise InputError(
                f"--record --baseline {spec}: requests are passed on unchecked, and only an API at a URL can take that"
            )
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


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A bound socket, so that a taken port is reported before any model is loaded. Raises `OutsideError`.

    Of `shared` ones several can be bound to a port; the kernel deals out the connections among them.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
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
    with contextlib.ExitStack() as stack:
        _run(case, store, tracking, out, options, stack)


def _run(
    case: Case,
    store: Path,
    tracking: str | None,
    out: Output,
    options: ServeOptions,
    stack: contextlib.ExitStack,
) -> None:
    folder = stack.enter_context(state_folder()) if options.workers > 1 else None
    serving = prepare(case, store, tracking, options)
    if serving.limits.key is None and options.host not in LOOPBACK:
        out.warn(f"listening on {options.host} without --key-env: whoever reaches the port is answered")
    bound = listen(options.host, options.port)
    if folder is None:
        with bound, _runner() as runner:
            runner.run(_serve(serving, bound, out))
        return
    bound.close()  # it was free; each worker has a socket of its own
    sockets = [
        stack.enter_context(listen(options.host, options.port, shared=True)) for _ in range(options.workers)
    ]
    order = Order(case, store, tracking, options, folder)
    runner = stack.enter_context(_runner())
    runner.run(_lead(serving, order, sockets, Shared(folder), out))


def work(order: Order, descriptor: int, index: int, out: Output) -> None:
    """Serve as one of several workers, on the socket and by the order of the process that leads them."""
    serving = prepare(order.case, order.store, order.tracking, order.options, verifies=False)
    shared = Shared(order.folder, index)
    with socket.socket(fileno=descriptor) as bound, _runner() as runner:
        runner.run(_serve(serving, bound, out, shared))


@dataclass(frozen=True)
class Serving:
    """What the command line, the case and the registry's place come to."""

    name: str
    resolver: Resolver
    specs: dict[Arm, ArmSpec]
    limits: Limits
    options: ServeOptions

    def supervisor(self, gateway: Gateway, out: Output, shared: Shared | None) -> Supervisor:
        """What keeps the gateway's back ends."""
        options = self.options
        settings = Settings(
            timeout=options.timeout,
            threads=options.threads or usable_cores(),
            slots=options.slots,
            context=options.context,
            cooldown=options.cooldown,
        )
        timeouts: dict[Arm, float] = {
            "baseline": options.timeout,
            "candidate": options.candidate_timeout or options.timeout,
        }
        follows = shared is not None and shared.index is not None
        warm = 0.0 if follows else options.keep_warm
        return Supervisor(
            gateway, self.resolver, self.specs, settings, timeouts, options.split / 100, warm, out, shared
        )


def prepare(
    case: Case,
    store: Path,
    tracking: str | None,
    options: ServeOptions,
    *,
    verifies: bool = True,
) -> Serving:
    """Read and check everything that serving needs. Raises `InputError`."""
    registry = open_registry(store, tracking=tracking, must_exist=False)
    specs = arm_specs(options, has_registry=registry.exists())
    if options.log_texts and not options.log_dir:
        raise InputError("--log-texts needs --log DIR")
    check_tls(options)
    schema = read_schema(case.task.answer_schema) if case.task.answer_schema else None
    resolver = Resolver(case, registry, schema, options.max_tokens, verifies=verifies)
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
        rate=options.rate_limit,
    )
    return Serving(case.task.name, resolver, specs, limits, options)


def check_tls(options: ServeOptions) -> None:
    """Raise `InputError` unless certificate and key are there, readable, and belong together."""
    cert, key = options.tls_cert, options.tls_key
    if cert is None and key is None:
        return
    if cert is None or key is None:
        raise InputError("--tls-cert and --tls-key go together; give both")

    def no_password() -> NoReturn:
        raise InputError(f"--tls-key {key}: it is encrypted; give one without a password")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, no_password)
    except OSError as error:  # ssl.SSLError is one
        why = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        raise InputError(f"--tls-cert {cert}, --tls-key {key}: cannot be used ({why})") from None


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


async def _serve(serving: Serving, bound: socket.socket, out: Output, shared: Shared | None = None) -> None:
    """Answer on `bound` until told to stop; as a worker where `shared` is given."""
    metrics, options = Metrics(), serving.options
    tracing = open_tracing()
    log = open_log(options, metrics, out)
    gateway = Gateway(
        serving.name,
        metrics,
        log=log,
        shadow=options.shadow,
        logprobs=options.logprobs,
        record=options.record,
        tracing=tracing,
    )
    quiet = Output(verbosity=-1) if shared is not None else out
    for line in serving.resolver.unfilled():
        quiet.warn(line)
    supervisor = serving.supervisor(gateway, quiet, shared)
    api = Api(
        gateway,
        serving.limits,
        supervisor.health,
        known_prompt=serving.resolver.long,
        shared=shared,
        warn=out.warn,
    )
    stopping = _stopping(supervisor)
    try:
        if await _started(supervisor, stopping):
            server = _server(api, supervisor, options)
            running = asyncio.create_task(server.serve(sockets=[bound]))
            while not (server.started or running.done()):  # what is said to be served accepts connections
                await asyncio.sleep(0.01)
            if shared is None:
                out.log(served(serving, bound))
            else:
                (shared.folder / f"ready-{shared.index}").touch()
            await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                quiet.log("stopping; requests under way are finished")
                api.stop()
                server.should_exit = True
            await running
        else:
            quiet.log("stopped before it served")
    finally:
        stopping.cancel()
        await gateway.settle()
        await supervisor.close()
        if log is not None:
            await asyncio.to_thread(log.close)
        if tracing is not None:
            await asyncio.to_thread(tracing.close)


async def _lead(
    serving: Serving, order: Order, sockets: list[socket.socket], shared: Shared, out: Output
) -> None:
    """Start the back ends and the workers that answer, and keep both until told to stop."""
    options = replace(serving.options, log_dir=None)
    gateway = Gateway(serving.name, Metrics(), log=None, shadow=options.shadow, logprobs=options.logprobs)
    supervisor = serving.supervisor(gateway, out, shared)
    stopping = _stopping(supervisor)
    workers = Workers(order, sockets, shared, out)
    follower: asyncio.Task[None] | None = None
    try:
        if not await _started(supervisor, stopping):
            out.log("stopped before it served")
            return
        follower = asyncio.create_task(supervisor.run())
        if await workers.start(stopping):
            out.log(served(serving, sockets[0], options.workers))
        await workers.keep(stopping)
        out.log("stopping; requests under way are finished")
    finally:
        stopping.cancel()
        await workers.stop(GRACE + 10)
        if follower is not None:
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)
        await supervisor.close()


def served(serving: Serving, bound: socket.socket, workers: int = 1) -> str:
    """Where the gateway is."""
    options = serving.options
    scheme = "https" if options.tls_cert is not None else "http"
    several = f", {workers} workers" if workers > 1 else ""
    address = f"{scheme}://{options.host}:{bound.getsockname()[1]}/v1"
    return f"serving {serving.name} on {address} (process {os.getpid()}{several})"


def _stopping(supervisor: Supervisor) -> asyncio.Task[None]:
    """A task that ends when the process is told to stop; SIGHUP makes it look at the registry."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, supervisor.wake.set)
    return asyncio.create_task(_wait(stop))


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
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
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


# Seconds for a client to take what was written before more is; one that reads nothing holds a place till then.
WRITE_LIMIT = 60.0


class DeadlineProtocol(HttpToolsProtocol):
    """`read_timeout` seconds for a request's head, and from there for its body; `write_timeout` to read an answer.

    While an answer is on its way, a request that was sent behind it may wait.
    """

    read_timeout: float = 10.0
    write_timeout: float = WRITE_LIMIT
    _deadline: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def _set(self, seconds: float) -> None:
        self._unset()
        self._deadline = self.loop.call_later(seconds, self._late)

    def _unset(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        cycle = self.cycle
        answering = cycle is not None and not cycle.response_complete and not cycle.more_body
        if self.pipeline or answering:
            self._set(self.read_timeout)
        else:
            self._cut()

    def _cut(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.write_timeout, self._cut)

    def resume_writing(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
        super().resume_writing()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set(self.read_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # What begins no request keeps no connection.
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._set(self.read_timeout)

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
