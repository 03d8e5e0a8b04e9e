"""From the command line's options to a gateway that listens until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn

from deploy.registry import open_registry
from deploy.serve.app import Door, Limits
from deploy.serve.backend import Settings
from deploy.serve.check import read_schema
from deploy.serve.gateway import Gateway
from deploy.serve.journal import Journal
from deploy.serve.metrics import Metrics
from deploy.serve.supervisor import Supervisor
from deploy.serve.target import Place, Resolver, price_of
from unshot.case import load_case
from unshot.console import Output
from unshot.contracts.request_log import Arm, Writer
from unshot.engines.http import read_key
from unshot.errors import InputError, OutsideError
from unshot.machine import usable_cores

GRACE = 60


def places(options: dict[str, Any], *, has_registry: bool) -> dict[Arm, Place]:
    """What each arm runs. Raises `InputError` where neither is given."""
    found: dict[Arm, Place] = {}
    arms: tuple[Arm, Arm] = ("baseline", "candidate")
    for arm in arms:
        spec = options[arm]
        if spec is None and arm == "candidate" and has_registry:
            spec = "champion"
        if spec is None:
            continue
        place = Place(
            spec=spec,
            prompt=options[f"{arm}_prompt"],
            model=options[f"{arm}_model"],
            key_env=options[f"{arm}_key_env"],
            price=price_of(options[f"{arm}_price"], options[f"{arm}_hour"], options[f"{arm}_model"]),
        )
        if place.follows and not has_registry:
            raise InputError(
                f"--{arm} {spec}: no registry in --store; give gguf:FILE or http://HOST:PORT/v1, or add a version"
            )
        found[arm] = place
    if not found:
        raise InputError("nothing to serve: give --baseline, --candidate, or a --store with a registry")
    return found


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a taken port is told before any model is loaded. Raises `OutsideError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OutsideError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --port"
        ) from None
    return bound


def run(case_path: Path | None, store: Path, tracking: str | None, out: Output, **options: Any) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are finished. Raises `InputError` or `OutsideError`."""
    case = load_case(case_path, out=out)
    registry = open_registry(store, tracking=tracking, must_exist=False)
    known = bool(tracking) or registry.path.is_file()
    where = places(options, has_registry=known)
    if options["log_texts"] and not options["log_dir"]:
        raise InputError("--log-texts needs --log DIR")
    schema = read_schema(case.task.answer_schema) if case.task.answer_schema else None
    resolver = Resolver(case, registry, schema, options["max_tokens"])
    key = read_key(options["key_env"])
    if key is None and options["host"] not in ("127.0.0.1", "localhost", "::1"):
        out.warn(f"listening on {options['host']} without --key-env: whoever reaches the port is answered")
    bound = listen(options["host"], options["port"])
    with bound, _loop(out) as runner:
        runner.run(_serve(case.task.name, resolver, where, bound, key, out, options))


@contextlib.contextmanager
def _loop(out: Output) -> Any:
    """uvloop where it is installed."""
    factory = None
    with contextlib.suppress(ImportError):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        yield runner


async def _serve(
    name: str,
    resolver: Resolver,
    where: dict[Arm, Place],
    bound: socket.socket,
    key: str | None,
    out: Output,
    options: dict[str, Any],
) -> None:
    metrics = Metrics()
    journal = None
    if options["log_dir"]:
        journal = Journal(
            Writer(options["log_dir"]),
            texts=options["log_texts"],
            region=options["phone_region"],
            counted=lambda outcome: metrics.log_lines.labels(outcome).inc(),
            warn=out.warn,
        )
    gateway = Gateway(name, metrics, journal=journal, shadow=options["shadow"], logprobs=options["logprobs"])
    supervisor = Supervisor(
        gateway,
        resolver,
        where,
        Settings(
            timeout=options["timeout"],
            threads=options["threads"] or usable_cores(),
            slots=options["slots"],
            context=options["context"],
            cooldown=options["cooldown"],
        ),
        {
            "baseline": options["timeout"],
            "candidate": options["candidate_timeout"] or options["timeout"],
        },
        options["split"] / 100,
        options["keep_warm"],
        out,
    )
    limits = Limits(options["max_body"], options["concurrency"], key)

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        follower = asyncio.create_task(supervisor.run())
        try:
            yield
        finally:
            follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await follower

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, supervisor.wake.set)
    try:
        starting = asyncio.create_task(supervisor.begin())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
        await starting
        config = uvicorn.Config(
            Door(gateway, limits, supervisor.health).app(lifespan),
            log_level="warning",
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=GRACE,
            backlog=1024,
        )
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        address = bound.getsockname()
        out.log(f"serving {name} on http://{options['host']}:{address[1]}/v1 (process {os.getpid()})")
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            out.log("stopping; requests under way are finished")
            server.should_exit = True
        await serving
        stopping.cancel()
    except asyncio.CancelledError:
        out.log("stopped before it served")
    finally:
        await gateway.settle()
        await supervisor.close()
        if journal is not None:
            await asyncio.to_thread(journal.close)


class _Server(uvicorn.Server):
    """uvicorn's server without its own signal handlers: ours end it, with exit code 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield
