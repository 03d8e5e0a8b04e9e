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

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from planner.capacity import Forecast, Quantiles, forecast
from planner.replica import Load, Setup, all_pairs, windowed_pairs
from planner.roofline import StepCost
from unshot.errors import InputError


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
        values = getattr(self, name)
        values = values[int(len(values) * warmup) :]
        if name == "tpot" and values.any():
            values = values[values > 0.0]  # answers of one token have none
        p50, p95, p99 = (float(v) for v in np.quantile(values, [0.5, 0.95, 0.99]))
        return Quantiles(float(values.mean()), p50, p95, p99)


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


def simulate(one: Setup, load: Load, *, requests: int = 20_000, seed: int = 0) -> Run:
    """Simulate `requests` requests of `load` on the replica `one` (see `planner.capacity.setup`)."""
    if one.max_batch < 1:
        raise InputError(f"{one.arch.name} does not fit on {one.gpu.name}; nothing to simulate")
    rng = np.random.default_rng(seed)
    times = arrivals(load.rate, requests, load.arrival_cv, rng)
    prompts, outputs = lengths(load, requests, rng)
    full = load.prompt_tokens + (load.output_tokens - 1) / 2.0
    return simulate_cost(
        one.cost,
        times,
        prompts,
        outputs,
        cached=load.cached_tokens,
        limit=one.slots,
        chunk=one.chunk,
        cache_tokens=one.cache_tokens,
        context_share=one.arch.cached_tokens(full) / full,
        pair_share=windowed_pairs(one.arch, load.prompt_tokens) / all_pairs(load.prompt_tokens),
    )


def simulated_forecast(one: Setup, load: Load, *, requests: int = 20_000, seed: int = 0) -> Forecast:
    """`forecast` with the latencies of a simulation in place of the closed form's.

    Use it for figures that are shown: it is exact for the scheduler described above, where the closed form may be
    off at the tail close to the memory limit. Returned as it is where the load does not fit or is not stable. The
    bounds of p95 are moved by the same factor.
    """
    plain = forecast(one, load)
    if not (plain.fits and plain.stable):
        return plain
    run = simulate(one, load, requests=requests, seed=seed)
    ttft, tpot, e2e = (run.quantiles(name) for name in ("ttft", "tpot", "e2e"))
    moved = {
        "ttft_p95": ttft.p95 / plain.ttft.p95,
        "tpot_p95": tpot.p95 / plain.tpot.p95,
        "e2e_p95": e2e.p95 / plain.e2e.p95,
    }
    low, high = ({k: v * moved.get(k, 1.0) for k, v in side.items()} for side in (plain.low, plain.high))
    return replace(plain, ttft=ttft, tpot=tpot, e2e=e2e, batch=run.batch * run.busy, low=low, high=high)


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
) -> Run:
    """The simulation itself: arrival times (ascending), prompt and output tokens, shape (n,) each.

    `cached` prompt tokens are found in the prefix cache and kept once; `context_share` of the context is what
    decode attention reads, `pair_share` of the query-key pairs what prefill attention computes (below 1 with sliding
    windows).
    """
    n = len(times)
    arrive = [*times.tolist(), math.inf]
    prompt, output = prompts.tolist(), [int(o) for o in outputs]
    first, done, entered = [0.0] * n, [0.0] * n, [0.0] * n
    fixed, move, sampled = float(cost.fixed), float(cost.move), float(cost.sampled)
    weights, experts, routed = float(cost.weights), float(cost.experts), float(cost.routed)
    token, head, extra = float(cost.token), float(cost.head), float(cost.chunk)
    pair = float(cost.pair) * pair_share
    per_context = float(cost.context) * context_share
    hypot, heappush, heappop, sqrt = math.hypot, heapq.heappush, heapq.heappop, math.sqrt
    infinity = math.inf

    def base(tokens: float, samples: float) -> float:
        read = weights + experts * (1.0 - (1.0 - routed) ** tokens) if experts else weights
        return fixed + hypot(read, tokens * token) + hypot(head, samples * sampled) + tokens * move

    decode_base = [0.0] + [base(b, b) for b in range(1, min(limit, n) + 1)]
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
            spent = base(took + running, running + ended) + context * per_context + pairs * pair
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
            for r in prefilling[:ended]:
                first[r] = now
                if output[r] <= 1:
                    done[r] = now
                    room += max(1.0, prompt[r] - cached) + output[r]
                    finished += 1
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
        each = decode_base[running] + context * per_context
        growth = running * per_context
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
    first_a, done_a = np.array(first), np.array(done)
    decode_steps = np.maximum(np.array(output) - 1, 1)
    return Run(
        arrival=times,
        wait=np.array(entered) - times,
        ttft=first_a - times,
        tpot=np.where(np.array(output) > 1, (done_a - first_a) / decode_steps, 0.0),
        e2e=done_a - times,
        busy=busy_time / max(now - times[0], 1e-12),
        batch=batch_time / max(busy_time, 1e-12),
        iterations=step,
    )
