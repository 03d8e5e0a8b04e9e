"""The load from several machines: one client a Ray worker, one schedule dealt out, results merged as sketches.

Every worker sends its share by its own clock; how far that clock is from ours is measured first, so that all begin
together. A worker sends home a tally and a sample of its requests, never the key: each reads that from its own
environment.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.load import Driver, LoadResult, run_loop
from bench.records import RequestRecord
from bench.schedule import Load, deal_out
from bench.sides import make_record
from bench.sketch import Tally
from bench.traffic import open_tokenizer
from unshot.case import Slo
from unshot.console import Output
from unshot.contracts.figures import Client, Lateness
from unshot.engines.address import read_key
from unshot.engines.openai import Api
from unshot.errors import InputError, OutsideError

SAMPLE = 2000
ROUND_TRIPS = 15
START_DELAY = 1.0


@dataclass
class Share:
    """What one worker sends: its part of the bodies and of the load."""

    api: Api
    key_env: str | None
    bodies: list[bytes]
    load: Load
    timeout: float
    tokenizer: str | None
    slo: Slo
    sample: int = SAMPLE


@dataclass
class Part:
    """What one worker brings home; times in `records` count from the common start."""

    tally: Tally
    client: Client
    records: list[RequestRecord]
    interrupted: bool
    where: str


class LoadClient:
    """One client; Ray makes an actor of it. `stop` comes from another thread than `run`."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._driver: Driver | None = None
        self.stopped = False

    def clock(self) -> float:
        """This machine's wall clock."""
        return time.time()

    def take(self, share: Share) -> None:
        """Make everything ready, so that nothing but sending is left to do at the start."""
        api = replace(share.api, key=read_key(share.key_env))
        self._counter = open_tokenizer(share.tokenizer) if share.tokenizer else None
        self._share, self._api = share, api
        self._payloads = [api.wrap(body) for body in share.bodies]

    def run(self, begin: float) -> Part:
        """Send the share taken and read the answers; `begin` is this machine's wall clock's start time."""
        share, api, counter = self._share, self._api, self._counter
        began = time.perf_counter() + begin - time.time()
        self._driver = Driver(
            api.address,
            self._payloads,
            share.load,
            timeout=share.timeout,
            warm_connections=min(share.load.concurrency or 64, len(self._payloads)),
            began=began,
        )
        run = run_loop(_drive(self, self._driver))
        records = [
            make_record(
                e, api, side="candidate", row=i, mode=share.load.text, block=0, clock=began, counter=counter
            )
            for i, e in enumerate(run.exchanges)
        ]
        step = max(1, -(-len(records) // share.sample))
        return Part(
            Tally.of(records, share.slo, 0.0, max((e.ended for e in run.exchanges), default=began) - began),
            run.client(),
            records[::step],
            run.interrupted,
            os.uname().nodename,
        )

    def stop(self) -> None:
        """End the run; what was measured is kept."""
        self.stopped = True
        if self.loop is not None and self._driver is not None:
            self.loop.call_soon_threadsafe(self._driver.stop)


async def _drive(client: LoadClient, driver: Driver) -> LoadResult:
    # Not a method: Ray runs a class with coroutines as an asyncio actor, in one loop of its own.
    client.loop = asyncio.get_running_loop()
    if client.stopped:
        client.loop.call_soon(driver.stop)
    return await driver.run()


def deal(
    api: Api,
    key_env: str | None,
    bodies: Sequence[bytes],
    load: Load,
    workers: int,
    *,
    timeout: float,
    seed: int,
    tokenizer: str | None,
    slo: Slo,
) -> list[Share]:
    """The load in as many shares, in turn; together they are the one schedule.

    Raises `InputError` for a proxy with credentials, which do not travel.
    """
    if api.address.proxy and api.address.proxy.authorization:
        raise InputError("--ray sends no proxy's password to other machines; give a proxy without one")
    shares = deal_out(load, bodies, workers, seed=seed)
    return [
        Share(
            replace(api, key=None), key_env, part, one, timeout, tokenizer, slo, sample=-(-SAMPLE // len(shares))
        )
        for one, part in shares
    ]  # fmt: skip


def merge(parts: Sequence[Part]) -> tuple[Tally, Client, list[RequestRecord], bool]:
    """`(tally, client, sample of records, interrupted)` of all parts; one late client makes the run invalid."""
    total = Tally()
    for part in parts:
        total.merge(part.tally)
    bad = [(i, p) for i, p in enumerate(parts) if not p.client.valid]
    cpu = sum(p.client.cpu_seconds for p in parts)
    late = [p.client.send_lateness for p in parts if p.client.send_lateness]
    client = Client(
        valid=not bad,
        reasons=[f"client {i + 1} on {p.where}: {'; '.join(p.client.reasons)}" for i, p in bad],
        # Of the worst client: percentiles do not add up.
        send_lateness=Lateness(
            max(x.p50_ms for x in late), max(x.p99_ms for x in late), max(x.max_ms for x in late)
        )
        if late
        else None,
        cpu_seconds=cpu,
        cpu_seconds_per_1000=cpu / total.requests * 1000 if total.requests else None,
        connections=sum(p.client.connections for p in parts),
        unsent=sum(p.client.unsent for p in parts),
        dns_seconds=max((x for p in parts if (x := p.client.dns_seconds) is not None), default=None),
        clients=len(parts),
        machines=sorted({p.where for p in parts}),
    )
    records = sorted((r for p in parts for r in p.records), key=lambda r: r.scheduled)
    return total, client, records, any(p.interrupted for p in parts)


def clock_offset(clock: Callable[[], float], trips: int = ROUND_TRIPS) -> tuple[float, float]:
    """`(offset, uncertainty)`, seconds, of another machine's clock by the shortest round trip (Cristian 1989)."""
    best = (0.0, float("inf"))
    for _ in range(trips):
        before = time.time()
        there = clock()
        after = time.time()
        half = (after - before) / 2
        if half < best[1]:
            best = (there - (before + after) / 2, half)
    return best


def run_ray(
    shares: Sequence[Share], address: str | None, out: Output
) -> tuple[Tally, Client, list[RequestRecord], bool]:
    """Run the shares on Ray workers: of the cluster at `address`, else of one started on this machine."""
    try:
        import ray
    except ImportError:
        raise OutsideError("--ray needs Ray; pip install 'unshot[ray]'") from None
    quiet = {"logging_level": "error", "log_to_driver": False, "configure_logging": True}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            # Each client is a process that takes a core while it sends; more of them than cores still run.
            ray.init(num_cpus=len(shares), include_dashboard=False, **quiet)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise OutsideError(f"Ray at {address or 'this machine'}: {str(error).splitlines()[0]}") from None
    try:
        return merge(_run(ray, shares, out))
    finally:
        ray.shutdown()


def _run(ray: Any, shares: Sequence[Share], out: Output) -> list[Part]:
    # Two threads: `stop` must be heard while `run` runs. SPREAD: on as many machines as there are.
    actor = ray.remote(LoadClient).options(num_cpus=1, max_concurrency=2, scheduling_strategy="SPREAD")
    clients = [actor.remote() for _ in shares]
    try:
        offsets = [clock_offset(lambda c=c: ray.get(c.clock.remote(), timeout=120)) for c in clients]  # type: ignore[misc]
    except ray.exceptions.GetTimeoutError:
        raise OutsideError(
            f"the Ray cluster has no room for {len(shares)} clients of one core each"
        ) from None
    doubt = max(half for _, half in offsets)
    out.log(f"{len(shares)} clients on Ray; clocks known within {doubt * 1000:.2f} ms")
    try:
        ray.get([client.take.remote(share) for client, share in zip(clients, shares, strict=True)])
        begin = time.time() + START_DELAY
        jobs = [
            client.run.remote(begin + offset) for client, (offset, _) in zip(clients, offsets, strict=True)
        ]
        try:
            parts = ray.get(jobs)
        except KeyboardInterrupt:
            ray.get([client.stop.remote() for client in clients])
            parts = ray.get(jobs)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, InputError | OutsideError) else None
        raise OutsideError(
            f"a client on Ray failed: {cause or str(error).strip().splitlines()[-1]}"
        ) from None
    return list(parts)
