"""Discrete-event simulation of continuous batching: chunked prefill, batch and cache limits, first come first served.

Every iteration decodes one token of each running sequence and spends what is left of the chunk on waiting prompts,
oldest first. A request enters when a slot and cache for its whole prompt and answer are free (no eviction). Its
first token leaves with the iteration that ends its prefill.

Iterations between two events (an arrival, a finish) differ only by the growing cache, so a whole span of them has a
closed form and costs one step here: a run takes time by requests, not by tokens.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from planner.latency.replica import Load, Replica, all_pairs, kept_tokens, windowed_pairs
from planner.latency.step import StepCost
from unshot.errors import InputError


class Quantiles(Struct, frozen=True):
    """Mean, p50, p95 and p99 of a latency, seconds."""

    mean: float
    p50: float
    p95: float
    p99: float


class Run(Struct, frozen=True):
    """What a simulation saw. Arrays have shape (requests,), seconds, in order of arrival.

    `wait` is from arrival to entering the batch. `busy` is the share of time with an iteration running, `batch`
    the time-weighted mean of decoding sequences while busy, `iterations` their number.
    """

    arrival: np.ndarray
    wait: np.ndarray
    ttft: np.ndarray
    tpot: np.ndarray
    e2e: np.ndarray
    busy: float
    batch: float
    iterations: int

    def quantiles(self, name: str, *, warmup: float = 0.1) -> Quantiles:
        """Mean and percentiles of `ttft`, `tpot`, `e2e` or `wait`, the first `warmup` share left out."""
        values = self.values(name, warmup=warmup)
        p50, p95, p99 = (float(v) for v in np.quantile(values, [0.5, 0.95, 0.99]))
        return Quantiles(float(values.mean()), p50, p95, p99)

    def at(self, name: str, percentile: float) -> float:
        """One percentile (0-100) of `ttft`, `tpot`, `e2e` or `wait`, the first tenth left out."""
        return float(np.quantile(self.values(name), percentile / 100.0))

    def values(self, name: str, *, warmup: float = 0.1) -> np.ndarray:
        """The latencies called `name` in order of arrival, the first `warmup` share left out."""
        values: np.ndarray = getattr(self, name)
        values = values[int(len(values) * warmup) :]
        if name == "tpot" and values.any():
            values = values[values > 0.0]  # answers of one token have none
        return values


def arrivals(rate: float, count: int, cv: float, rng: np.random.Generator) -> np.ndarray:
    """Arrival times, shape (count,), seconds: gamma gaps with coefficient of variation `cv` (1 is Poisson)."""
    shape = 1.0 / cv**2
    return np.cumsum(rng.gamma(shape, 1.0 / (rate * shape), count))


def lengths(load: Load, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output tokens, shape (count,) each: drawn samples, or log-normal around the means."""
    if load.samples:
        table = np.asarray(load.samples)
        drawn = table[rng.integers(0, len(table), count)]
        return np.maximum(1, np.rint(drawn[:, 0])), np.maximum(1, np.rint(drawn[:, 1]))

    def spread(mean: float, cv: float) -> np.ndarray:
        if cv == 0.0:
            return np.full(count, max(1.0, round(mean)))
        sigma2 = math.log1p(cv**2)
        return np.maximum(1, np.rint(rng.lognormal(math.log(mean) - sigma2 / 2, math.sqrt(sigma2), count)))

    # The cached prefix is every request's; only what follows it varies.
    new = load.prompt_tokens - load.cached_tokens
    prompts = load.cached_tokens + spread(new, load.prompt_cv * load.prompt_tokens / new)
    return prompts, spread(load.output_tokens, load.output_cv)


def simulate(one: Replica, load: Load, *, requests: int = 20_000, seed: int = 0) -> Run:
    """Simulate `requests` requests of `load` on the replica `one` (see `planner.latency.replica.replica`)."""
    rng = np.random.default_rng(seed)
    times = arrivals(load.rate, requests, load.arrival_cv, rng)
    prompts, outputs = lengths(load, requests, rng)
    return serve(one, load, times, prompts, outputs)


def serve(
    one: Replica,
    load: Load,
    times: np.ndarray,
    prompts: np.ndarray,
    outputs: np.ndarray,
    *,
    clients: int | None = None,
    http: bool = True,
) -> Run:
    """`simulate_cost` with a replica's limits; `http` False leaves out what requests cost at the server's door."""
    if one.limit < 1:
        raise InputError(f"{one.why_not}; nothing to simulate")
    full = load.prompt_tokens + (load.output_tokens - 1) / 2.0
    per_token = one.held(load.prompt_tokens, load.output_tokens, load.cached_tokens, load.output_cv) / (
        load.prompt_tokens - load.cached_tokens + load.output_tokens * (1.0 + load.output_cv**2)
    )
    return simulate_cost(
        one.cost,
        times,
        prompts,
        outputs,
        cached=load.cached_tokens,
        limit=one.slots,
        chunk=one.chunk,
        cache_tokens=one.slots_in_memory(
            load.prompt_tokens, load.output_tokens, load.cached_tokens, load.output_cv
        )
        * one.held(load.prompt_tokens, load.output_tokens, load.cached_tokens, load.output_cv)
        / per_token,
        context_share=kept_tokens(one.arch, full) / full,
        pair_share=windowed_pairs(one.arch, load.prompt_tokens) / all_pairs(load.prompt_tokens),
        request=one.overhead.request if http else 0.0,
        accept=one.overhead.accept if http else 0.0,
        clients=clients,
    )


class _Seconds:
    """Seconds of iterations, as plain floats: what the loop asks for once per event."""

    def __init__(self, cost: StepCost, context_share: float, pair_share: float, most: int) -> None:
        self.cost = StepCost(**{name: float(getattr(cost, name)) for name in cost.__struct_fields__})
        self.pair, self.gain = float(cost.pair) * pair_share, float(cost.gain)
        self.context = float(cost.context) * context_share
        # What decoding takes brings `gain` tokens: it is counted as so many shorter iterations of one.
        self.decode = [0.0] + [self._base(0.0, b, 0.0) / self.gain for b in range(1, most + 1)]
        self.grow = self.context / self.gain

    def _base(self, prefill: float, sequences: float, ended: float) -> float:
        c = self.cost
        samples = sequences * c.wide + ended
        tokens = prefill + sequences * c.wide
        read = c.weights + c.experts * (1.0 - (1.0 - c.routed) ** tokens) if c.experts else c.weights
        products = math.hypot(read, tokens * c.token) + math.hypot(c.head, samples * c.sampled)
        return c.fixed + products + tokens * c.move + (sequences + ended) * c.sequence

    def mixed(self, took: float, pairs: float, running: int, ended: int, context: float) -> float:
        """An iteration that prefills `took` tokens while `running` sequences decode over `context` tokens in all."""
        spent = self._base(took, running, ended) + context * self.context + pairs * self.pair
        if running and self.gain != 1.0:
            spent -= (self.gain - 1.0) * (self.decode[running] + context * self.grow)
        return spent

    def span(self, running: int, context: float, most: int, gap: float) -> tuple[int, float]:
        """How many iterations of pure decode pass until `gap` seconds are over, at most `most`, and their seconds."""
        each = self.decode[running] + context * self.grow
        growth = running * self.grow
        if gap < math.inf:
            a = 0.5 * growth
            b = each - a
            j = gap / b if a * gap < 1e-9 * b * b else (-b + math.sqrt(b * b + 4.0 * a * gap)) / (2.0 * a)
            most = min(most, max(math.ceil(j), 1))
        return most, most * each + growth * (most * (most - 1) * 0.5)


class _Requests:
    """The requests of a run: their sizes, what happened to each, and who is in the batch."""

    def __init__(
        self,
        times: np.ndarray,
        prompts: np.ndarray,
        outputs: np.ndarray,
        cached: float,
        room: float,
        request: float,
        accept: float,
        clients: int | None,
    ) -> None:
        n = len(times)
        self.n, self.closed = n, clients is not None
        first = min(clients or n, n)
        self.sent = [0.0] * first + [math.inf] * (n - first) if self.closed else times.tolist()
        self.request, self.accept = request, accept
        self.arrive = [*taken_in(self.sent, request), math.inf]
        self.next, self.door = first, self.arrive[first - 1]
        self.prompt, self.output = prompts.tolist(), [int(o) for o in outputs]
        self.new = [max(1.0, p - cached) for p in self.prompt]
        self.first, self.done, self.entered = [0.0] * n, [0.0] * n, [0.0] * n
        self.room, self.context, self.running, self.finished, self.head = room, 0.0, 0, 0, 0
        self.finishing: list[tuple[int, int]] = []  # (iteration at whose end it finishes, request)
        self.prefilling: list[int] = []
        self.left: list[float] = []

    def admit(self, now: float, limit: int) -> None:
        """Let in what has arrived and fits, oldest first."""
        while self.arrive[self.head] <= now:
            r = self.head
            held = self.running + len(self.prefilling)
            need = self.new[r] + self.output[r]
            if held >= limit or (need > self.room and held > 0):
                break
            self.room -= need
            self.entered[r] = now
            self.prefilling.append(r)
            self.left.append(self.new[r])
            self.head += 1

    def prefill(self, budget: float) -> tuple[float, float, int]:
        """Spend an iteration's prefill tokens: those taken, their query-key pairs, and how many prompts ended."""
        took = pairs = 0.0
        ended = 0
        left = self.left
        for i, r in enumerate(self.prefilling):
            part = left[i] if left[i] < budget - took else budget - took
            pairs += part * (self.prompt[r] - left[i]) + part * (part + 1.0) / 2.0
            took += part
            left[i] -= part
            if left[i] <= 0.0:
                ended += 1
            if took >= budget:
                break
        return took, pairs, ended

    def begin(self, ended: int, step: int, now: float) -> None:
        """The first `ended` prompts have given their first token."""
        for r in self.prefilling[:ended]:
            self.first[r] = now
            if self.output[r] <= 1:
                self._leave(r, now)
            else:
                heapq.heappush(self.finishing, (step + self.output[r] - 1, r))
                self.context += self.prompt[r]
                self.running += 1
        del self.prefilling[:ended], self.left[:ended]

    def finish(self, step: int, now: float) -> None:
        """Those whose last token came with iteration `step` leave."""
        while self.finishing and self.finishing[0][0] <= step:
            _, r = heapq.heappop(self.finishing)
            self.context -= self.prompt[r] + self.output[r] - 1
            self.running -= 1
            self._leave(r, now)

    def _leave(self, r: int, now: float) -> None:
        self.done[r] = now
        self.room += self.new[r] + self.output[r]
        self.finished += 1
        if self.closed and self.next < self.n:
            # Its client sends the next request when it has the answer.
            self.sent[self.next] = now + self.accept
            self.door = self.arrive[self.next] = max(now + self.accept, self.door) + self.request
            self.next += 1


def simulate_cost(
    cost: StepCost,
    times: np.ndarray,
    prompts: np.ndarray,
    outputs: np.ndarray,
    *,
    cached: float = 0.0,
    limit: int,
    chunk: int,
    cache_tokens: float = math.inf,
    context_share: float = 1.0,
    pair_share: float = 1.0,
    request: float = 0.0,
    accept: float = 0.0,
    clients: int | None = None,
) -> Run:
    """The simulation itself: arrival times (ascending), prompt and output tokens, shape (n,) each.

    `cached` prompt tokens are found in the prefix cache and kept once; `context_share` of the context is what
    decode attention reads, `pair_share` of the query-key pairs what prefill attention computes (below 1 with sliding
    windows). The host takes requests in one after the other, `request` seconds each; `accept` seconds more pass
    beside that. With `clients` the loop is closed: `times` do not count, each client sends its next request when it
    has its answer.
    """
    n = len(times)
    seconds = _Seconds(cost, context_share, pair_share, min(limit, n))
    q = _Requests(times, prompts, outputs, cached, cache_tokens, request, accept, clients)
    now = busy = batch = 0.0
    step, extra = 0, float(cost.chunk)
    while q.finished < n:
        q.admit(now, limit)
        running = q.running
        if q.prefilling:
            took, pairs, ended = q.prefill(max(1.0, chunk - running))
            spent = seconds.mixed(took, pairs, running, ended, q.context)
            if extra:
                spent += extra * max(took / chunk, 1.0)
            count = 1
        elif running:
            # Pure decode: until the next finish, or the end of the iteration in which the next request arrives. If one
            # waits already, the batch is full: only a finish changes anything.
            gap = q.arrive[q.head] - now
            most = q.finishing[0][0] - step
            count, spent = seconds.span(running, q.context, most, gap if gap > 0 else math.inf)
            ended = 0
        else:
            now = max(now, q.arrive[q.head])
            continue
        now += spent
        busy += spent
        batch += spent * running
        step += count
        q.context += running * count
        q.finish(step, now)
        if ended:
            q.begin(ended, step, now)
    return _run(q, now, busy, batch, step)


def _run(q: _Requests, now: float, busy: float, batch: float, step: int) -> Run:
    first, done, sent = np.array(q.first), np.array(q.done), np.array(q.sent)
    outputs = np.array(q.output)
    return Run(
        arrival=sent,
        wait=np.array(q.entered) - sent,
        ttft=first - sent + q.accept,
        tpot=np.where(outputs > 1, (done - first) / np.maximum(outputs - 1, 1), 0.0),
        e2e=done - sent + q.accept,
        busy=busy / max(now - sent[0], 1e-12),
        batch=batch / max(busy, 1e-12),
        iterations=step,
    )


def taken_in(sent: Sequence[float], seconds: float) -> list[float]:
    """When a host that takes requests in one after the other, `seconds` each, has taken each in."""
    if seconds == 0.0:
        return list(sent)
    out, free = [], 0.0
    for time in sent:
        free = max(time, free) + seconds
        out.append(free)
    return out
