"""The same load from several client processes of this machine, merged whole."""

from __future__ import annotations

import asyncio
import multiprocessing.synchronize
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from threading import BrokenBarrierError

import numpy as np

from bench.load import Driver, LoadResult, run_loop
from bench.schedule import Load, deal_out
from unshot.engines.http import Exchange
from unshot.engines.openai import Api
from unshot.errors import OutsideError

# Seconds until client processes must be ready to send.
START_LIMIT = 60


def run_processes(
    api: Api, payloads: Sequence[bytes], load: Load, processes: int, *, timeout: float, seed: int
) -> LoadResult:
    """The same load from several client processes: the schedule is dealt out in turn, the results put together.

    Exchanges are merged whole, so every percentile is exact and means what it means for one process. Ctrl-C stops all
    clients, and what each has measured is kept.
    """
    shares = deal_out(load, payloads, processes, seed=seed)
    processes = len(shares)
    # One clock for all: perf_counter is the machine's monotonic clock on Linux. The start is set when all are ready.
    context = get_context("spawn")
    start = _Start(context.Barrier(processes + 1), context.Event(), context.Value("d"))  # type: ignore[arg-type]
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_join, initargs=(start,)) as pool:
        futures = [pool.submit(_child, api, part, one, timeout) for one, part in shares]
        try:
            start.ready.wait(timeout=START_LIMIT)
        except BrokenBarrierError:
            raise OutsideError(
                f"the {processes} client processes were not ready in {START_LIMIT} s"
            ) from None
        began = start.time.value = time.perf_counter() + 0.1
        start.go.set()
        # Their ids are not public; without them one Ctrl-C of ours would leave the clients sending.
        runs = _results(futures, lambda: list(pool._processes))
    exchanges = sorted((e for r in runs for e in r.exchanges), key=lambda e: e.scheduled)
    return LoadResult(
        exchanges=exchanges,
        began=began,
        seconds=max((e.ended for e in exchanges), default=began) - began,
        lateness=np.concatenate([r.lateness for r in runs]),
        stalls=np.concatenate([r.stalls for r in runs]),
        watched=sum(r.watched for r in runs),
        cpu_seconds=sum(r.cpu_seconds for r in runs),
        connections=sum(r.connections for r in runs),
        interrupted=any(r.interrupted for r in runs),
        unsent=sum(r.unsent for r in runs),
        dns_seconds=max((r.dns_seconds for r in runs if r.dns_seconds is not None), default=None),
    )


def _results(futures: Sequence[Future[LoadResult]], clients: Callable[[], list[int]]) -> list[LoadResult]:
    """What the clients bring. On Ctrl-C they are told to stop, as often as it takes, and still bring what they have."""
    stopping = False
    while True:
        try:
            return [f.result(timeout=0.2 if stopping else None) for f in futures]
        except KeyboardInterrupt:
            stopping = True
        except NotYet:
            pass
        for pid in clients():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)


@dataclass
class _Start:
    """What the processes share to begin together."""

    ready: multiprocessing.synchronize.Barrier
    go: multiprocessing.synchronize.Event
    time: multiprocessing.sharedctypes.Synchronized[float]


_start: _Start | None = None


def _join(start: _Start) -> None:
    global _start
    _start = start
    # A Ctrl-C goes to every process of the terminal: a client heeds it once it has something to keep.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _child(api: Api, payloads: list[bytes], load: Load, timeout: float) -> LoadResult:
    start = _start
    assert start is not None

    async def start_time() -> float:
        await asyncio.to_thread(start.ready.wait, START_LIMIT)
        await asyncio.to_thread(start.go.wait, START_LIMIT)
        return float(start.time.value)

    driver = Driver(
        api.address,
        payloads,
        load,
        timeout=timeout,
        warm_connections=min(load.concurrency or 64, len(payloads)),
        start_time=start_time,
    )

    async def main() -> LoadResult:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, driver.stop)
        return await driver.run()

    run = run_loop(main())
    for exchange in run.exchanges:
        exchange.done = _nothing
    return run


def _nothing(exchange: Exchange) -> None:
    """Stands in for the callback, which cannot travel between processes."""
