"""Drive one server: send by the schedule, keep every exchange, and measure how late the client itself was."""

from __future__ import annotations

import asyncio
import email.utils
import gc
import math
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np

from bench.schedule import Load
from bench.timer import Alarm
from unshot.contracts.figures import Client, Lateness
from unshot.engines.address import Address
from unshot.engines.http import Exchange, Pool

# A run is invalid where the client sent 1 request in 100 later than this (seconds), ...
LATE = 0.002
# ... or where its own event loop was late in 1% of the time by more than both of these: seconds, and a share of the
# median answer.
LAG, LAG_SHARE = 0.010, 0.05
TICK = 0.01
# Processor time that one TLS handshake may take of the loop, seconds.
HANDSHAKE = 0.005
SWEEP = 0.05
MAX_BACK_OFF = 30.0

Done = Callable[[int, Exchange], None]
# What comes after an answer: seconds of thought and the next turn's bytes; None where the conversation is over.
Follow = Callable[[Exchange], tuple[float, bytes] | None]
# The requests' bytes: all of them, or made when they are sent.
Payloads = Sequence[bytes] | Callable[[int], bytes]


@dataclass
class LoadResult:
    """What one load brought. `lateness` (open loop) and `stalls` of the client's own event loop are seconds.

    `watched` is the time over which stalls were looked for; a stall is how late the loop ran what was due.
    """

    exchanges: list[Exchange]
    began: float
    seconds: float
    lateness: np.ndarray
    stalls: np.ndarray
    watched: float
    cpu_seconds: float
    connections: int
    interrupted: bool = False
    unsent: int = 0
    dns_seconds: float | None = None

    def client(self) -> Client:
        """What the report says of the client, and whether it was the bottleneck."""
        late = _lateness(self.lateness)
        lag = time_weighted(self.stalls, self.watched)
        reasons = []
        if late and late.p99_ms > LATE * 1000:
            reasons.append(
                f"1 in 100 requests was sent {late.p99_ms:.1f} ms late or more (limit {LATE * 1000:g} ms)"
            )
        spans = [e.ended - e.scheduled for e in self.exchanges if e.error is None]
        bound = max(LAG, LAG_SHARE * float(np.median(spans))) * 1000 if spans else LAG * 1000
        if lag and lag.p99_ms > bound:
            reasons.append(
                f"in 1% of the time the client's own loop was {lag.p99_ms:.1f} ms late or more (limit {bound:.1f} ms)"
            )
        sent = len(self.exchanges)
        return Client(
            valid=not reasons,
            reasons=reasons,
            send_lateness=late,
            loop_lag=lag,
            cpu_seconds=self.cpu_seconds,
            cpu_seconds_per_1000=self.cpu_seconds / sent * 1000 if sent else None,
            connections=self.connections,
            dns_seconds=self.dns_seconds,
            unsent=self.unsent,
        )


def _lateness(values: np.ndarray) -> Lateness | None:
    if not len(values):
        return None
    cut = np.percentile(values, [50, 99]) * 1000
    return Lateness(float(cut[0]), float(cut[1]), float(values.max() * 1000))


def time_weighted(stalls: np.ndarray, watched: float) -> Lateness | None:
    """How late something that became due at a random time was run: quantiles over time, not over stalls.

    In a stall of length L what is due at a time u into it waits L - u. So the share of the time in which the delay
    exceeds x is the sum of max(0, L - x) over the stalls, by the time watched.
    """
    if not len(stalls) or watched <= 0:
        return None
    ordered = np.sort(stalls)[::-1]
    sums = np.cumsum(ordered)

    def quantile(share: float) -> float:
        # The k longest stalls exceed x: their sum - k x = share * watched.
        ranks = np.arange(1, len(ordered) + 1)
        x = (sums - share * watched) / ranks
        shorter = np.append(ordered[1:], 0.0)
        fits = np.flatnonzero((x >= shorter) & (x <= ordered))
        return float(max(0.0, x[fits[0]])) if len(fits) else 0.0

    return Lateness(quantile(0.5) * 1000, quantile(0.01) * 1000, float(ordered[0]) * 1000)


class Driver:
    """One run against one server; `done` is called with each request's number and finished exchange.

    `warm_connections` are opened before the clock starts. `ramp` spreads a closed loop's first requests over so
    many seconds, so that its streams do not all begin at once. It ends after `count` requests or `duration` seconds,
    whichever comes first; requests under way then are still waited for. With `follow` each of the `count` is the begin
    of a conversation, whose next turn is sent when the answer has come and the time to think is over.
    """

    def __init__(
        self,
        address: Address,
        payloads: Payloads,
        load: Load,
        *,
        count: int | None = None,
        duration: float | None = None,
        timeout: float = 120.0,
        seed: int = 0,
        warm_connections: int = 0,
        ramp: float = 0.0,
        began: float | None = None,
        start_time: Callable[[], Awaitable[float]] | None = None,
        follow: Follow | None = None,
    ) -> None:
        self.address = address
        self._follow = follow
        self._thinking = 0
        self._payload = payloads if callable(payloads) else payloads.__getitem__
        given = count if callable(payloads) else len(payloads)
        self.load = load
        self.timeout = timeout
        self.duration = duration
        if load.open:
            self.arrivals = load.arrivals(
                given if given is not None else load.most(duration or 0.0), seed=seed
            )
            if duration is not None:
                self.arrivals = self.arrivals[self.arrivals < duration]
        else:
            self.arrivals = np.zeros(0)
        # Without a number a closed loop goes on until its duration is over.
        self.total = len(self.arrivals) if load.open else given if given is not None else sys.maxsize
        self.exchanges: list[Exchange] = []
        self.warm_connections = warm_connections
        self.ramp = ramp
        self._planned = began
        self._start_time = start_time
        self._next = 0
        self._active: set[int] = set()
        self._interrupted = False
        self._stalls: list[float] = []

    async def run(self, done: Done | None = None, *, pool: Pool | None = None) -> LoadResult:
        """Send everything and wait for the answers, or for `stop`."""
        self._loop = asyncio.get_running_loop()
        self._done = done
        self._finished = asyncio.Event()
        self._pool = pool or Pool(self.address, self._loop)
        await self._pool.warm(self.warm_connections, self.timeout)
        if self._start_time is not None:
            self._planned = await self._start_time()
        opened = self._pool.opened
        timers = [self._loop.create_task(self._watch()), self._loop.create_task(self._expire())]
        watching = time.perf_counter()
        cpu = time.process_time()
        with _steady():
            self._alarm = Alarm(self._loop, self._due)
            self.began = self._planned or time.perf_counter() + (0.005 if self.load.open else 0.0)
            if self._planned and not self.load.open:
                await asyncio.sleep(max(0.0, self._planned - time.perf_counter()))
            try:
                if self._interrupted:
                    self._finished.set()
                else:
                    self._start()
                await self._finished.wait()
            finally:
                self._alarm.close()
                for timer in timers:
                    timer.cancel()
        ended = max((e.ended for e in self.exchanges), default=self.began)
        result = LoadResult(
            exchanges=self.exchanges,
            began=self.began,
            seconds=ended - self.began,
            # Until the client had it ready: connecting and the TLS handshake are not its lateness.
            lateness=np.array(
                [max(0.0, e.handed - e.scheduled) for e in self.exchanges if e.handed and not e.turn]
            )
            if self.load.open
            else np.zeros(0),
            stalls=np.asarray(self._stalls),
            watched=time.perf_counter() - watching,
            cpu_seconds=time.process_time() - cpu,
            connections=self._pool.opened - opened,
            interrupted=self._interrupted,
            unsent=self.total - self._next if self.total < sys.maxsize else 0,
            dns_seconds=self._pool.dns_seconds,
        )
        if pool is None:
            await self._pool.close()
        return result

    def stop(self) -> None:
        """Send nothing more and give up on what is under way; the run ends as a partial one."""
        self._interrupted = True
        if not hasattr(self, "_finished"):
            return  # not even begun: `run` ends at once
        for number in list(self._active):
            self._give_up(number, "interrupted", "the run was stopped")
        self._finished.set()

    def _start(self) -> None:
        if not self.total:
            self._finished.set()
            return
        if self.duration is not None and (self._follow or not self.load.open):
            self._loop.call_later(self.duration, self._time_is_up)
        if self.load.open:
            self._due()
        else:
            streams = min(self.load.concurrency, self.total)
            for number in range(streams):
                if self.ramp and number:
                    self._loop.call_later(self.ramp * number / streams, self._resume)
                else:
                    self._send(time.perf_counter())

    def _time_is_up(self) -> None:
        self.total = min(self.total, self._next)
        # What its user still thinks about is not asked any more.
        self._follow = None
        self._thinking = 0
        self._end_if_over()

    def _due(self) -> None:
        """Send all that is due, then sleep until the next."""
        while self._next < self.total and not self._interrupted:
            when = self.began + float(self.arrivals[self._next])
            if when > time.perf_counter():
                self._alarm.set(when)
                return
            self._send(when)

    def _send(self, scheduled: float) -> None:
        self._next += 1
        self._hand(scheduled, self._payload(self._next - 1), self._next - 1, 0)

    def _hand(self, scheduled: float, payload: bytes, origin: int, turn: int) -> None:
        number = len(self.exchanges)
        exchange = Exchange(
            payload,
            scheduled,
            self.timeout,
            lambda e, number=number: self._end(number, e),  # type: ignore[misc]
            origin=origin,
            turn=turn,
        )
        self.exchanges.append(exchange)
        self._active.add(number)
        self._pool.send(exchange)

    def _end(self, number: int, exchange: Exchange) -> None:
        self._active.discard(number)
        exchange.connection = None
        if self._done and not self._interrupted:
            self._done(number, exchange)
        if self._interrupted:
            return
        following = self._follow(exchange) if self._follow else None
        if following is not None:
            self._thinking += 1
            self._loop.call_later(following[0], self._next_turn, exchange, following[1])
        elif not self.load.open and self._next < self.total:
            wait = retry_after(exchange)
            if wait:
                self._loop.call_later(wait, self._resume)
            else:
                self._send(time.perf_counter())
        else:
            self._end_if_over()

    def _next_turn(self, before: Exchange, payload: bytes) -> None:
        if self._follow is not None and not self._interrupted:
            self._thinking -= 1
            self._hand(time.perf_counter(), payload, before.origin, before.turn + 1)

    def _resume(self) -> None:
        if self._next < self.total and not self._interrupted:
            self._send(time.perf_counter())
        else:
            self._end_if_over()

    def _end_if_over(self) -> None:
        if not self._active and not self._thinking and self._next >= self.total:
            self._finished.set()

    def _give_up(self, number: int, error: str, detail: str) -> None:
        exchange = self.exchanges[number]
        if exchange.connection is not None:
            exchange.connection.abandon(error, detail)
        else:
            exchange.finish(error, detail)

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(SWEEP)
            limit = time.perf_counter() - self.timeout
            for number in [n for n in self._active if self.exchanges[n].scheduled < limit]:
                waiting = self.exchanges[number].waiting
                words = {"dns": "no address of the host", "connect": "no connection"}.get(
                    waiting or "", "no end"
                )
                self._give_up(number, waiting or "timeout", f"{words} after {self.timeout:g} s")

    async def _watch(self) -> None:
        """How late the event loop runs what is due: what every arrival time may be off by."""
        while True:
            handshakes = self._pool.connecting if self.address.tls else 0
            due = self._loop.time() + TICK
            await asyncio.sleep(TICK)
            # asyncio itself rounds a timer up to a millisecond; a handshake's arithmetic is no stall of the client.
            allowed = 0.001 + HANDSHAKE * max(handshakes, self._pool.connecting if self.address.tls else 0)
            self._stalls.append(max(0.0, self._loop.time() - due - allowed))


def retry_after(exchange: Exchange) -> float:
    """Seconds a 429 or 503 asks to wait, at most half a minute; else 0 (RFC 9110, 10.2.3; OpenAI's in milliseconds)."""
    if exchange.status not in (429, 503):
        return 0.0
    try:
        if "retry-after-ms" in exchange.headers:
            asked = float(exchange.headers["retry-after-ms"]) / 1000
        else:
            asked = float(exchange.headers.get("retry-after", "0"))
    except ValueError:
        asked = _until(exchange)
    return min(max(asked, 0.0), MAX_BACK_OFF) if math.isfinite(asked) else 0.0


def _until(exchange: Exchange) -> float:
    """Seconds to the date of Retry-After, by the server's own clock where it tells it; 0 where it is no date."""
    try:
        at = email.utils.parsedate_to_datetime(exchange.headers.get("retry-after", "")).timestamp()
        date = exchange.headers.get("date")
        now = email.utils.parsedate_to_datetime(date).timestamp() if date else time.time()
    except (ValueError, OverflowError):
        return 0.0
    return at - now


@contextmanager
def _steady() -> Iterator[None]:
    """No garbage collection in the middle of a measurement."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def drive(driver: Driver, done: Done | None = None) -> LoadResult:
    """Run to the end in a loop of its own; the first Ctrl-C stops it and what is there is kept."""

    async def main() -> LoadResult:
        loop = asyncio.get_running_loop()
        handled = False
        if sys.platform != "win32":
            with suppress(ValueError, RuntimeError):  # not in the main thread
                loop.add_signal_handler(signal.SIGINT, driver.stop)
                handled = True
        try:
            return await driver.run(done)
        finally:
            if handled:
                loop.remove_signal_handler(signal.SIGINT)

    return run_loop(main())


def run_loop(main: Coroutine[None, None, LoadResult]) -> LoadResult:
    """`asyncio.run` on asyncio's own loop, whatever policy is set (Ray sets uvloop's where that is installed)."""
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        return runner.run(main)
