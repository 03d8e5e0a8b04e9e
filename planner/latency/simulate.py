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

    One long loop on purpose: it runs once per event, and calls would double its time.
    """
    n = len(times)
    sent = times.tolist() if clients is None else [0.0] * min(clients, n) + [math.inf] * (n - min(clients, n))
    arrive = [*taken_in(sent, request), math.inf]
    last_sent, door = min(clients or n, n), arrive[min(clients or n, n) - 1]
    prompt, output = prompts.tolist(), [int(o) for o in outputs]
    first, done, entered = [0.0] * n, [0.0] * n, [0.0] * n
    fixed, move, sampled = float(cost.fixed), float(cost.move), float(cost.sampled)
    weights, experts, routed = float(cost.weights), float(cost.experts), float(cost.routed)
    token, head, extra = float(cost.token), float(cost.head), float(cost.chunk)
    sequence, wide, gain = float(cost.sequence), float(cost.wide), float(cost.gain)
    pair = float(cost.pair) * pair_share
    per_context = float(cost.context) * context_share
    hypot, heappush, heappop, sqrt = math.hypot, heapq.heappush, heapq.heappop, math.sqrt
    infinity = math.inf
    closed = clients is not None

    def base(prefill: float, sequences: float, ended: float) -> float:
        tokens, samples = prefill + sequences * wide, sequences * wide + ended
        read = weights + experts * (1.0 - (1.0 - routed) ** tokens) if experts else weights
        return (
            fixed
            + hypot(read, tokens * token)
            + hypot(head, samples * sampled)
            + tokens * move
            + (sequences + ended) * sequence
        )

    # What decoding takes brings `gain` tokens: it is counted as so many shorter iterations of one.
    decode_base = [0.0] + [base(0.0, b, 0.0) / gain for b in range(1, min(limit, n) + 1)]
    per_decode = per_context / gain
    room = cache_tokens
    now, step, head_of_queue, context = 0.0, 0, 0, 0.0
    finishing: list[tuple[int, int]] = []  # (iteration at whose end it finishes, request)
    prefilling: list[int] = []
    left: list[float] = []
    running = 0
    busy_time = batch_time = 0.0
    finished = 0
    while finished < n:
        # Let in what has arrived and fits.
        while arrive[head_of_queue] <= now:
            r = head_of_queue
            need = max(1.0, prompt[r] - cached) + output[r]
            if running + len(prefilling) >= limit or (need > room and running + len(prefilling) > 0):
                break
            room -= need
            entered[r] = now
            prefilling.append(r)
            left.append(max(1.0, prompt[r] - cached))
            head_of_queue += 1
        if prefilling:
            budget = max(1.0, chunk - running)
            took = pairs = 0.0
            ended = 0
            for i, r in enumerate(prefilling):
                part = left[i] if left[i] < budget - took else budget - took
                before = prompt[r] - left[i]
                pairs += part * before + part * (part + 1.0) / 2.0
                took += part
                left[i] -= part
                if left[i] <= 0.0:
                    ended += 1
                if took >= budget:
                    break
            spent = base(took, running, ended) + context * per_context + pairs * pair
            if running and gain != 1.0:
                spent -= (gain - 1.0) * (decode_base[running] + context * per_decode)
            if extra:
                spent += extra * max(took / chunk, 1.0)
            now += spent
            busy_time += spent
            batch_time += spent * running
            step += 1
            context += running
            while finishing and finishing[0][0] <= step:
                _, r = heappop(finishing)
                done[r] = now
                context -= prompt[r] + output[r] - 1
                room += max(1.0, prompt[r] - cached) + output[r]
                running -= 1
                finished += 1
                if closed and last_sent < n:
                    sent[last_sent] = now + accept
                    door = arrive[last_sent] = max(now + accept, door) + request
                    last_sent += 1
            for r in prefilling[:ended]:
                first[r] = now
                if output[r] <= 1:
                    done[r] = now
                    room += max(1.0, prompt[r] - cached) + output[r]
                    finished += 1
                    if closed and last_sent < n:
                        sent[last_sent] = now + accept
                        door = arrive[last_sent] = max(now + accept, door) + request
                        last_sent += 1
                else:
                    heappush(finishing, (step + output[r] - 1, r))
                    context += prompt[r]
                    running += 1
            if ended:
                del prefilling[:ended], left[:ended]
            continue
        if not running:
            now = max(now, arrive[head_of_queue])
            continue
        # A span of pure decode: until the next finish, or the end of the iteration in which the next one arrives.
        k = finishing[0][0] - step
        each = decode_base[running] + context * per_decode
        growth = running * per_decode
        upcoming = arrive[head_of_queue]
        blocked = upcoming <= now  # the batch is full: only a finish changes anything
        if not blocked and upcoming < infinity:
            gap = upcoming - now
            a = 0.5 * growth
            b = each - a
            j = gap / b if a * gap < 1e-9 * b * b else (-b + sqrt(b * b + 4.0 * a * gap)) / (2.0 * a)
            whole = int(j)
            if whole < j:
                whole += 1
            if whole < k:
                k = whole if whole > 0 else 1
        spent = k * each + growth * (k * (k - 1) * 0.5)
        now += spent
        busy_time += spent
        batch_time += spent * running
        step += k
        context += running * k
        while finishing and finishing[0][0] <= step:
            _, r = heappop(finishing)
            done[r] = now
            context -= prompt[r] + output[r] - 1
            room += max(1.0, prompt[r] - cached) + output[r]
            running -= 1
            finished += 1
            if closed and last_sent < n:
                sent[last_sent] = now + accept
                door = arrive[last_sent] = max(now + accept, door) + request
                last_sent += 1
    first_a, done_a, sent_a = np.array(first), np.array(done), np.array(sent)
    decode_steps = np.maximum(np.array(output) - 1, 1)
    return Run(
        arrival=sent_a,
        wait=np.array(entered) - sent_a,
        ttft=first_a - sent_a + accept,
        tpot=np.where(np.array(output) > 1, (done_a - first_a) / decode_steps, 0.0),
        e2e=done_a - sent_a + accept,
        busy=busy_time / max(now - sent_a[0], 1e-12),
        batch=batch_time / max(busy_time, 1e-12),
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
