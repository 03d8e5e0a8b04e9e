"""A server with the requests that go to it, driven by one client process, several, or clients on Ray."""

from __future__ import annotations

import asyncio
import math
import multiprocessing.synchronize
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from threading import BrokenBarrierError

import numpy as np

from bench.counters import counted, read_counters
from bench.load import Driver, LoadResult, drive, run_loop
from bench.records import RequestRecord, summarise
from bench.resources import Monitor, energy_per_request
from bench.schedule import Load
from bench.sides import first_adapted, make_record
from bench.traffic import (
    WORDS,
    Fresh,
    ServerOptions,
    cache_warning,
    digest,
    fresh_input,
    meet,
    prompt_of,
    sentence,
    shared_share,
    token_warning,
    uncached,
)
from unshot.case import Slo
from unshot.console import Output
from unshot.contracts.figures import Client, Figures, Resources
from unshot.contracts.manifest import describe_file
from unshot.data.prompts import load_prompt
from unshot.data.rows import Message, read_examples
from unshot.engines.http import Exchange
from unshot.engines.openai import Api
from unshot.errors import InputError, OutsideError

RAMP_PER_STREAM = 0.002
# Seconds until client processes must be ready to send.
START_LIMIT = 60


@dataclass(frozen=True)
class LoadOptions:
    """A server and what is sent to it, as the command line says it."""

    url: str
    server: ServerOptions = field(default_factory=ServerOptions)
    data: Path | None = None
    prompt: Path | None = None
    system: str | None = None
    prompt_words: str = "64"
    max_tokens: str = "64"
    cache: str = "on"
    repeat: int = 0
    slo: Slo = field(default_factory=Slo)
    seed: int = 0


@dataclass
class Outcome:
    """One load measured. From clients on Ray, `records` are a sample of the requests and the figures are of all."""

    figures: Figures
    client: Client
    records: list[RequestRecord]
    interrupted: bool
    resources: Resources | None = None
    warnings: list[str] = field(default_factory=list)


class Target:
    """The server with the requests that go to it.

    Each request is sent once: across warm-up, steps and runs every one begins (or, behind a shared prompt, its input
    begins) with words of its own. With `repeat` the same so many requests are sent over and over, in every run.
    """

    def __init__(self, options: LoadOptions) -> None:
        self.options = options
        self.api, self.counter = meet(options.server.open(options.url), options.server.tokenizer)
        self.inputs = [describe_file(p) for p in (options.data, options.prompt) if p and p.is_file()]
        self._prompt = load_prompt(options.prompt, system=options.system)
        self._words = parse_span(options.prompt_words, "--prompt-words")
        self._lengths = parse_span(options.max_tokens, "--max-tokens")
        self._rows = None
        if options.data:
            self._rows = [self._prompt.request(row) for row in read_examples(options.data, answers=False)]
        self._fresh = Fresh(f"seed {options.seed}" if options.repeat else None)
        self._uncached = Fresh()
        self._sent = 0
        # A request log that is replayed, and the number of its first request.
        self._replayed: tuple[str | list[Message], ...] = ()
        self._first = 0

    @property
    def repeats(self) -> int:
        """After so many requests the same ones come again; 0: never."""
        if not self.options.repeat:
            return 0
        return min(self.options.repeat, len(self._rows)) if self._rows else self.options.repeat

    @property
    def prompt_digest(self) -> str:
        """A short hash of the prompt's own text."""
        return digest(self._prompt)

    @property
    def prompts(self) -> str:
        """What the requests are, for the report."""
        if self._replayed:
            return f"{len(self._replayed)} requests of the log, as they were asked"
        what = "rows of the data" if self._rows else f"random words ({self.options.prompt_words} a prompt)"
        if self.repeats:
            return f"{self.repeats} {what}, sent over and over (--repeat)"
        return f"{what}, each with words of its own, sent once"

    def messages(self, number: int) -> list[Message]:
        """Request `number` of all that this target ever sends."""
        if self._replayed:
            said = self._replayed[(number - self._first) % len(self._replayed)]
            return self._prompt.messages(said) if isinstance(said, str) else said
        which = number % self.repeats if self.repeats else number
        generator = self._fresh.generator(which)
        if self._rows is None:
            text = " ".join(generator.choices(WORDS, k=generator.randint(*self._words)))
            messages = self._prompt.messages(text)
        else:
            messages = self._rows[which % len(self._rows)]
            if not self.repeats:
                messages = fresh_input(messages, sentence(generator))
        if self.options.cache == "off":
            return uncached(messages, sentence(self._uncached.generator(number)))
        return messages

    def body(self, number: int) -> bytes:
        """The JSON of request `number`; its length is drawn by the seed."""
        lengths = random.Random(f"{self.options.seed}:{number}")
        prompt = prompt_of(self.api, self.messages(number), self.counter)
        return self.api.body(prompt, lengths.randint(*self._lengths))

    def bodies(self, count: int) -> list[bytes]:
        """The next `count` requests without their headers."""
        first, self._sent = self._sent, self._sent + count
        return [self.body(first + i) for i in range(count)]

    def asked_share(self) -> float:
        """The part of its tokens that a request may find in a cache, by what was asked for."""
        if self.options.cache == "off":
            return 0.0
        return 1.0 if self.repeats or self._replayed else shared_share([self.messages(n) for n in range(20)])

    def warm_up(self, count: int) -> None:
        """Send `count` requests that are measured nowhere; learn which fields of a request the server refuses."""
        while count:
            run, records = self.run(Load("closed", concurrency=1), count)
            if run.interrupted:
                raise KeyboardInterrupt
            other = first_adapted(self.api, records)
            if other is None:
                return
            self.api = other

    def measure(
        self,
        load: Load,
        count: int | None,
        out: Output,
        *,
        processes: int = 1,
        ray: int = 0,
        ray_address: str | None = None,
        duration: float | None = None,
        steady: bool = False,
    ) -> Outcome:
        """Drive the load and sum it up."""
        self._replayed, self._first = load.requests, self._sent
        if ray:
            return self._on_ray(load, count or 1, ray, ray_address, out)
        before = read_counters(self.api.address)
        with Monitor({"the client": os.getpid()}) as monitor:
            run, records = self.run(load, count, processes=processes, duration=duration)
        after = read_counters(self.api.address) if before else {}
        chosen, seconds = steady_window(records, load, run.seconds) if steady else (records, run.seconds)
        facts = summarise(chosen, seconds, self.options.slo, asked=None if load.open else load.concurrency)
        facts.server = counted(before, after)
        facts.energy = energy_per_request(monitor, records, "candidate", load.text, run.began)
        return Outcome(
            facts, run.client(), records, run.interrupted, monitor.facts(), self._warnings(load, facts)
        )

    def _warnings(self, load: Load, facts: Figures) -> list[str]:
        found = [
            cache_warning(
                load.text, self.asked_share(), facts.tokens.cached_share, repeated=bool(self.repeats)
            )
        ]
        found.append(token_warning(load.text, facts))
        flying = facts.in_flight
        if flying and facts.requests and flying.mean < 0.9 * flying.asked > 1:
            found.append(
                f"{load.text}: {flying.mean:.1f} requests were in flight where {flying.asked} were asked for"
            )
        return [w for w in found if w]

    def run(
        self, load: Load, count: int | None, *, processes: int = 1, duration: float | None = None
    ) -> tuple[LoadResult, list[RequestRecord]]:
        """The exchanges and what they hold."""
        first, timeout, seed = self._sent, self.options.server.timeout, self.options.seed
        if processes > 1:
            payloads = [self.api.wrap(body) for body in self.bodies(count or 1)]
            run = run_processes(self.api, payloads, load, processes, timeout=timeout, seed=seed)
        else:
            streams = load.concurrency or min(64, count or 64)
            ready = None if count is None else [self.api.wrap(body) for body in self.bodies(count)]
            driver = Driver(
                self.api.address,
                ready if ready is not None else lambda n: self.api.wrap(self.body(first + n)),
                load,
                count=count,
                duration=duration,
                timeout=timeout,
                seed=seed,
                warm_connections=min(streams, count or streams),
                ramp=0.0 if streams < 8 else RAMP_PER_STREAM * streams,
            )
            run = drive(driver)
            self._sent = max(self._sent, first + len(run.exchanges))
        return run, [self._record(e, run, load, first + i, i) for i, e in enumerate(run.exchanges)]

    def _record(
        self, exchange: Exchange, run: LoadResult, load: Load, number: int, row: int
    ) -> RequestRecord:
        # Rendering is only worth its time where the server may leave the count to us.
        messages = self.messages(number) if self.counter is not None else None
        record = make_record(
            exchange, self.api, side="candidate", row=row, mode=load.text, block=0, clock=run.began,
            counter=self.counter, messages=messages,
        )  # fmt: skip
        record.request = number
        return record

    def _on_ray(self, load: Load, count: int, workers: int, address: str | None, out: Output) -> Outcome:
        from bench.cluster import deal, run_ray

        shares = deal(
            self.api,
            self.options.server.key_env,
            self.bodies(count),
            load,
            workers,
            timeout=self.options.server.timeout,
            seed=self.options.seed,
            tokenizer=self.options.server.tokenizer,
            slo=self.options.slo,
        )
        tally, client, records, interrupted = run_ray(shares, address, out)
        facts = tally.figures()
        return Outcome(facts, client, records, interrupted, warnings=self._warnings(load, facts))


def steady_window(
    records: Sequence[RequestRecord], load: Load, seconds: float
) -> tuple[list[RequestRecord], float]:
    """The requests of the steady state and its length: from the first answer of every stream to the last request sent.

    Counted are the requests scheduled in that window; its throughput is theirs over its length. In open loop it
    begins when as many requests have ended as were under way at the first one's end.
    """
    if not records:
        return list(records), seconds
    ends = sorted(r.end for r in records)
    under_way = load.concurrency or sum(r.scheduled <= ends[0] for r in records)
    begin = ends[min(under_way, len(ends)) - 1]
    end = max(r.scheduled for r in records)
    chosen = [r for r in records if begin <= r.scheduled <= end]
    return (chosen, end - begin) if chosen and end > begin else (list(records), seconds)


def run_processes(
    api: Api, payloads: Sequence[bytes], load: Load, processes: int, *, timeout: float, seed: int
) -> LoadResult:
    """The same load from several client processes: the schedule is dealt out in turn, the results put together.

    Exchanges are merged whole, so every percentile is exact and means what it means for one process. Ctrl-C stops all
    clients, and what each has measured is kept.
    """
    if load.open:
        arrivals = load.arrivals(len(payloads), seed=seed)
        loads = [Load("trace", times=tuple(arrivals[i::processes].tolist())) for i in range(processes)]
        if load.kind == "trace":
            payloads = payloads[: len(arrivals)]
    else:
        shares = [
            load.concurrency // processes + (i < load.concurrency % processes) for i in range(processes)
        ]
        loads = [Load("closed", concurrency=share) for share in shares if share]
        processes = len(loads)
    # One clock for all: perf_counter is the machine's monotonic clock on Linux. The start is set when all are ready.
    context = get_context("spawn")
    start = _Start(context.Barrier(processes + 1), context.Event(), context.Value("d"))  # type: ignore[arg-type]
    parts = [list(payloads[i::processes]) for i in range(processes)]
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_join, initargs=(start,)) as pool:
        futures = [
            pool.submit(_child, api, part, one, timeout) for part, one in zip(parts, loads, strict=True)
        ]
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


def parse_slo(text: str | None) -> Slo:
    """`ttft=200,tpot=50,e2e=2000` in milliseconds. Raises `InputError`."""
    values: dict[str, float] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, _, number = part.partition("=")
        key = f"{name.strip()}_ms"
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if key not in ("ttft_ms", "tpot_ms", "e2e_ms") or not 0 < value < math.inf:
            raise InputError(f"--slo `{text}`: give e.g. ttft=200,tpot=50,e2e=2000 (milliseconds above 0)")
        values[key] = value
    return Slo(**values)  # type: ignore[arg-type]


def parse_span(text: str, flag: str) -> tuple[int, int]:
    """`N` or `LOW-HIGH`, whole numbers from 1. Raises `InputError`."""
    low, _, high = text.partition("-")
    try:
        span = int(low), int(high or low)
    except ValueError:
        span = (0, 0)
    if not 1 <= span[0] <= span[1]:
        raise InputError(f"{flag} is `{text}`; give N or LOW-HIGH, at least 1")
    return span
