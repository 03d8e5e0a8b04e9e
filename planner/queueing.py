"""Waiting in a continuous-batching server, in closed form; every argument may be a float or an array.

The server is seen as three things at once.

1. Decoding sequences share the device like a processor-sharing queue: with n of them an iteration takes
   d(n) = d0 + d1 n. The number present is then negative binomial (a birth-death chain with death rate
   n / (O d(n))), which does not depend on the law of the answer's length beyond its mean (insensitivity of
   processor sharing; Kelly, "Reversibility and Stochastic Networks", 1979).
2. Prompts that arrive during one iteration are prefilled together in the next: iteration lengths follow
   T' = d + S Poisson(rate T), whose cumulants are closed. Where a prompt fills a whole chunk or more, prefill is an
   M/G/1 queue instead (Pollaczek-Khinchine).
3. Where the batch is full (memory), requests wait for a slot: exponential tail with the Allen-Cunneen factor.

Quantiles come from three moments through Wilson and Hilferty's cube root (Pearson type III), mixed over
"found idle", "found busy" and "found full". What is left is corrected by factors fitted to simulated random loads
(`planner.waiting`). `planner.simulate` is the check.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from msgspec import Struct

from planner.moments import fixed_wait, lgamma, mix, mixture_quantiles, normal, pearson, survival
from planner.roofline import StepCost
from planner.signs import cost_signs, load_signs, share_signs, stack, state_signs
from planner.waiting import Correction

Number = Any

TOP = 0.95  # utilisation at which a passing overload is held: it ends before its queue is stationary


class Shape(Struct, frozen=True):
    """What one request asks of the server: means, and squared coefficients of variation of its lengths.

    `new` prompt tokens to prefill, `pairs` query-key pairs of that prefill, `context` mean cached tokens while
    decoding, `output` answer tokens, `chunk` prefill tokens one iteration takes, `limit` sequences at most.
    `size_cv2` is that of the cache a running sequence holds, where memory bounds their number (0 where
    the engine's own limit does); `room` is how many mean requests the memory holds, parts of one included.
    """

    new: Number
    pairs: Number
    context: Number
    output: Number
    chunk: Number
    limit: Number
    work_cv2: Number = 0.0
    output_cv2: Number = 0.0
    arrival_cv2: Number = 1.0
    size_cv2: Number = 0.0
    room: Number = 0.0


class Response(Struct, frozen=True):
    """Latency of a load: `ttft`, `tpot`, `e2e` map a percentile to seconds; means beside them; see `Forecast`."""

    capacity: Number
    utilisation: Number
    batch: Number
    tpot_mean: Number
    ttft_mean: Number
    e2e_mean: Number
    ttft: dict[float, Number]
    tpot: dict[float, Number]
    e2e: dict[float, Number]
    prefill: Number
    decode: Number
    signs: Number = 0.0


def iteration(cost: StepCost, shape: Shape, sequences: Number, prompts: Number) -> Number:
    """Seconds of an iteration with `sequences` decoding and `prompts` whole prompts prefilled in it."""
    chunks = np.maximum(prompts * shape.new / shape.chunk, np.minimum(prompts, 1.0))
    return cost.step(
        prompts * shape.new,
        prompts * shape.pairs,
        sequences,
        sequences * shape.context,
        prompts=prompts,
        chunks=chunks,
    )


def capacity(cost: StepCost, shape: Shape) -> Number:
    """Requests/s with a queue that never empties: full batch, prefills as regular as slots come free.

    A slot is held for the prefill's iterations and for one per further answer token. This is the figure that the
    published offline-throughput rows are compared with.
    """
    held = np.maximum(shape.output - 1.0, 0.0) + np.maximum(1.0, shape.new / shape.chunk)
    wide = shape.chunk / shape.new
    inflow = np.maximum(np.minimum(shape.limit / held, wide), 1e-12)
    # Prompts are not spread thinner than one (or one chunk of one) to an iteration; the others only decode.
    joint = np.maximum(inflow, np.minimum(1.0, wide))
    share = inflow / joint
    sequences = inflow * np.maximum(shape.output - 1.0, 0.0)
    seconds = share * iteration(cost, shape, sequences, joint)
    seconds = seconds + (1.0 - share) * iteration(cost, shape, sequences, 0.0)
    return np.where(shape.limit >= 1, inflow / seconds, 0.0)


def respond(
    cost: StepCost, shape: Shape, rate: Number, percentiles: tuple[float, ...] = (50.0, 95.0, 99.0),
    *, correct: bool = True,
) -> Response:  # fmt: skip
    """Latency at `rate` requests/s; infinite where the rate is at or above capacity.

    `correct` applies the factors fitted to the simulation (`planner.waiting`).
    """
    cap = capacity(cost, shape)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        load = np.where(cap > 0, rate / np.maximum(cap, 1e-300), np.inf)
    stable = load < 1.0
    rho = np.minimum(load, 0.9995)
    lam = rho * cap
    lam = np.maximum(lam, 1e-12)
    limit = np.maximum(shape.limit, 1.0)
    steps = np.maximum(shape.output - 1.0, 0.0)

    # Mean field: sequences present, time of a decode iteration, extra time one prefill adds.
    empty = iteration(cost, shape, 0.0, 0.0)
    one = iteration(cost, shape, 1.0, 0.0)
    batch = np.minimum(limit, lam * steps * one)
    decode = one
    for _ in range(6):
        at = np.maximum(np.minimum(limit, batch), 2.0)
        slope = np.maximum((iteration(cost, shape, at, 0.0) - one) / (at - 1.0), 1e-12 * one)
        # A chord through the prompts an iteration holds: weights' reading hides the first ones' arithmetic.
        wide = np.maximum(shape.chunk - batch, 0.1 * shape.chunk) / shape.new
        centre = lam * decode + 0.5
        upper = np.where(wide < 1.5, np.minimum(wide, 1.0), np.minimum(centre + np.sqrt(centre), wide))
        lower = np.where(wide < 1.5, 0.0, np.minimum(np.maximum(centre - np.sqrt(centre), 0.0), 0.5 * upper))
        above, below = iteration(cost, shape, batch, upper), iteration(cost, shape, batch, lower)
        extra = (above - below) / (upper - lower)
        hidden = iteration(cost, shape, batch, 0.0) - (below - lower * extra)
        hidden = np.clip(hidden, 0.0, 0.9 * one)
        level = np.maximum(one - slope - hidden, 1e-3 * slope)
        busy = np.minimum(lam * extra, 0.999)
        spin = np.minimum(lam * steps * slope / (1.0 - busy), 0.9995)
        # Prompts that came while this one waited are prefilled before it decodes on.
        first = plain_wait(cost, shape, batch, extra, lam)
        batch = lam * steps * (level + slope) / (1.0 - busy) / (1.0 - spin)
        behind = np.minimum(busy / (1.0 - busy) * first, steps * extra * wide)
        batch = np.minimum(limit, batch + lam * behind * (steps > 0))
        decode = (iteration(cost, shape, batch, 0.0) - hidden) / (1.0 - busy)
    # Arrivals both join and, by their prefill, hold up who is there: linear noise around the mean gives this factor
    # on the negative binomial's variance, and through the curve of the death rate a higher mean.
    clump = np.maximum(0.5 * (shape.arrival_cv2 / (1.0 - busy) ** 2 + 1.0), 1.0)
    drift = (clump - 1.0) * slope / (1.0 - spin) / iteration(cost, shape, batch, 0.0)
    drift = 1.0 + np.minimum(drift, 0.5)
    batch = np.minimum(limit, batch * drift)
    spread_n = np.minimum(batch / (1.0 - spin) * clump, limit**2 / 4.0)

    # Answer speed: the tagged request sees the others and itself; prefills of others fall into its life.
    tagged = iteration(cost, shape, np.minimum(batch + 1.0, limit), 0.0)
    tpot = np.maximum(tagged, (tagged - hidden) / (1.0 - busy))
    # Every iteration decodes, so at most one chunk of prefill lies between two tokens.
    tpot = np.minimum(tpot + behind / np.maximum(steps, 1.0), tagged + extra * np.maximum(wide, 1e-9))
    tpot_var = (2.0 / 3.0) * spread_n * (slope / (1.0 - busy)) ** 2
    tpot_var = tpot_var + extra**2 * lam * tpot / np.maximum(steps, 1.0) / (1.0 - busy) ** 2

    # Time to first token: found idle, found busy, found full. The number decoding moves slowly beside a wait, so
    # what an arrival meets is averaged over three values of it.
    alone = iteration(cost, shape, 0.0, 1.0) + (np.ceil(shape.new / shape.chunk - 1e-9) - 1.0) * empty
    order = level / slope + 1.0
    none_decoding = np.where(steps > 0, np.exp(order * np.log1p(-spin)), 1.0)
    served = np.where(shape.chunk / shape.new < 1.5, alone, extra + empty / (1.0 + lam * empty))
    idle = none_decoding * np.maximum(0.0, 1.0 - lam * served * _crowded(lam * served, shape.arrival_cv2))
    held = order * spin / (1.0 - spin) * drift + lam * np.minimum(first, 1.0 / lam)
    # Memory fills by tokens: requests of unequal size fill it earlier than their mean says.
    uneven = clump * (1.0 + batch * shape.size_cv2 / np.maximum(spread_n, 1e-9))
    wider = np.maximum(1.0 - (1.0 - spin) / uneven, 1e-9)
    full = _full(
        np.where(limit < 1.5, order, held * (1.0 - wider) / wider),
        np.where(limit < 1.5, spin, wider),
        rho,
        limit,
    )
    slot = (shape.arrival_cv2 + shape.output_cv2) / 2.0 / cap_safe(cap) / (1.0 - rho)
    idle = np.minimum(idle, 1.0 - full)
    seen = np.maximum(0.0, 1.0 - idle - full)
    # Own work varies as the prompt does (log-normal); a long prompt also takes more iterations.
    long = np.where(shape.chunk / shape.new < 1.5, extra + empty * shape.new / shape.chunk, extra)
    work_var = long**2 * shape.work_cv2 + (1e-4 * alone) ** 2
    work_third = long**3 * shape.work_cv2**2 * (3.0 + shape.work_cv2)
    third_n = spread_n * np.maximum(2.0 * spread_n / np.maximum(batch, 1e-9) - 1.0, 0.0)
    parts = [(idle, alone, work_var, work_third)]
    for z, weight in ((-(3.0**0.5), 1 / 6), (0.0, 2 / 3), (3.0**0.5, 1 / 6)):
        present = np.clip(pearson(batch, spread_n, third_n, z), 0.0, limit)
        met = _met(cost, shape, lam, idle, present, extra, hidden)
        parts += [(seen * weight * w, m, v + work_var, t + work_third) for w, m, v, t in met]
        if z == 0.0:
            own, width, skew = mix(met)
            late = own + slot
            parts.append((full, late, width + slot**2 + work_var, skew + work_third + 2.0 * slot**3))
    mean, variance, third = mix(parts)
    room = np.maximum(shape.chunk - batch, 0.1 * shape.chunk) / shape.new
    tight = lam * (iteration(cost, shape, batch, 0.0) / room + extra)
    now = iteration(cost, shape, batch, 0.0)
    # Who waits behind a prompt meets it decoding, where its answer is longer than one token.
    beside = np.maximum(shape.chunk - np.minimum(batch + (steps > 0), limit), 0.1 * shape.chunk)
    fit, blur = beside / shape.new, np.sqrt(spread_n) / beside
    waits = [fixed_wait(tight, p) * (now / room + extra) / alone for p in (95.0, 99.0)]
    signs = stack(
        cost_signs(cost, shape, one, iteration(cost, shape, limit, 0.0))
        + load_signs(shape, limit, steps, np.maximum(shape.room, limit))
        + share_signs(
            fit, [unfilled(fit, k, shape.work_cv2, blur) for k in (1.0, 2.0, 3.0)], shape.work_cv2, waits, lam * served
        )
        + state_signs(
            rho=rho, busy=busy, tight=tight, full=full, spin=spin, idle=idle, batch=batch, limit=limit, extra=extra,
            hidden=hidden, now=now, alone=alone, one=one, slot=slot, clump=clump, spread_n=spread_n,
            size_cv2=shape.size_cv2, mean=mean, variance=variance, third=third,
        )
    )  # fmt: skip
    after = steps * tpot
    e2e_mean = mean + after
    output_cv = np.sqrt(shape.output_cv2)
    out_var = (after * output_cv) ** 2
    e2e_var = variance + steps**2 * tpot_var + out_var
    e2e_third = third + out_var * after * shape.output_cv2 * 3.0

    def shown(value: Number) -> Number:
        return np.where(stable, value, np.inf)

    factor = Correction(signs) if correct else None

    def quantiles(
        measure: str, values: dict[float, Number], lowest: dict[float, Number]
    ) -> dict[float, Number]:
        # A percentile is never below a lower one, nor below what `lowest` knows of it, corrected or not.
        found: dict[float, Number] = {}
        floor = last = lowest[min(values)]
        for p in sorted(values):
            floor, last = np.maximum(values[p], floor), np.maximum(last, lowest[p])
            last = floor if factor is None else np.maximum(last, floor * factor.at(measure, normal(p)))
            found[p] = shown(last)
        return found

    ttft = quantiles("ttft", mixture_quantiles(parts, percentiles), dict.fromkeys(percentiles, 0.0))
    e2e = quantiles("e2e", {p: pearson(e2e_mean, e2e_var, e2e_third, normal(p)) for p in percentiles}, ttft)
    third_t = 2.0 * np.sqrt(tpot_var) / tpot * tpot_var**1.5
    speeds = quantiles(
        "tpot",
        {p: pearson(tpot, tpot_var, third_t, normal(p)) for p in percentiles},
        dict.fromkeys(percentiles, 0.9 * one),
    )
    if factor is not None:
        mean, e2e_mean = mean * factor.mean("ttft"), e2e_mean * factor.mean("e2e")
        e2e_mean, tpot = np.maximum(e2e_mean, mean), tpot * factor.mean("tpot")
    return Response(
        capacity=cap,
        utilisation=load,
        batch=batch,
        tpot_mean=shown(tpot),
        ttft_mean=shown(mean),
        e2e_mean=shown(e2e_mean),
        ttft=ttft,
        tpot=speeds,
        e2e=e2e,
        prefill=alone,
        decode=one,
        signs=signs,
    )


def _met(
    cost: StepCost, shape: Shape, lam: Number, idle: Number, present: Number, extra: Number, hidden: Number
) -> list[tuple[Number, ...]]:
    """Weight, mean, variance and third cumulant of wait and own prefill with `present` decoding, by what is met.

    Prompts that share iterations meet one law, three times. Others meet a decode iteration, or a prefill and nobody who
    comes after them to fill their last iteration, or a prefill and somebody who does.
    """
    plain = iteration(cost, shape, present, 0.0)
    # Decoding sequences take their tokens from the chunk. In a queue prompts share iterations, and end where later
    # prompts may fill what their own work leaves of the iteration.
    room = np.maximum(shape.chunk - present, 0.1 * shape.chunk)
    wide = room / shape.new  # whole prompts that fit one iteration
    single = wide < 1.5
    work = plain / np.where(single, wide, 1.0) + extra
    queued = np.minimum(lam * work, 1.0)
    # The first to be waited for, the second, or one of a long queue, whose ends fall anywhere in an iteration.
    after = (1.0 - queued) * (
        unfilled(wide, 1.0, shape.work_cv2) + queued * unfilled(wide, 2.0, shape.work_cv2)
    )
    after = after + 0.5 * queued**2
    chunks = np.ceil(1.0 / np.minimum(wide, 1.0) - 1e-9)
    shared = 1.0 - np.exp(-(chunks - 0.5) * lam * work)
    alone = chunks * plain + extra
    # A last, part-filled iteration is wasted where no other prompt waits to share it: behind as many prompts as find
    # the server free. So it ends queues and does not lengthen them.
    spare = np.where(single, np.maximum(alone - work, 0.0), 0.0)
    service = work + spare * np.maximum(1.0 - lam * work, 0.0) / (1.0 + lam * spare)
    net = np.maximum(plain - hidden, 0.1 * plain)
    bulk = _bulk_wait(net, extra, lam, wide, shape)
    queue = _single_wait(work, service, lam, shape)
    loaded = np.minimum(lam * service, TOP)
    loaded = loaded * _crowded(loaded, shape.arrival_cv2)
    behind = np.clip(loaded / np.maximum(1.0 - idle, 1e-9), 0.0, 1.0)
    weights = (1.0 - behind, behind * (1.0 - shared), behind * shared)
    last = work + after * plain + queue[0]
    means = (alone + 0.5 * plain, last, last + after * extra * np.minimum(wide, 1.5))
    found = []
    for k, (weight, mean) in enumerate(zip(weights, means, strict=True)):
        width, skew = (plain**2 / 12.0, 0.0) if k == 0 else (queue[1], queue[2])
        found.append(
            (
                np.where(single, weight, 1.0 / 3.0),
                np.where(single, mean, net + extra + bulk[0]),
                np.where(single, width, bulk[1]),
                np.where(single, skew, bulk[2]),
            )
        )
    return found


def unfilled(wide: Number, prompts: Number, cv2: Number, spread: Number = 0.0) -> Number:
    """Mean share of an iteration left for later prompts where `prompts` of one queue end in it, `wide` an iteration.

    Lengths of one size leave a sawtooth of `wide`, which their coefficient of variation (`cv2` its square) blurs, as
    does that of `wide` itself, `spread`.
    """
    filled = prompts / wide
    blur = filled * np.sqrt(cv2 / prompts + spread**2)
    total = 0.0
    for z in (-1.2816, -0.5244, 0.0, 0.5244, 1.2816):
        at = filled + z * blur
        total = total + (np.ceil(at - 1e-9) - at)
    return total / 5.0


def plain_wait(cost: StepCost, shape: Shape, batch: Number, extra: Number, lam: Number) -> Number:
    """Rough mean time to first token, for what queues behind a prompt: prefill as M/G/1 with a decode step each."""
    d = iteration(cost, shape, batch, 0.0)
    chunks = np.maximum(1.0, shape.new / shape.chunk)
    own = chunks * d + extra
    rho = np.minimum(lam * extra, 0.97)
    return 0.5 * d + own + 0.5 * rho * own / (1.0 - rho)


def cap_safe(cap: Number) -> Number:
    """The capacity, never zero, for divisions whose result is not shown."""
    return np.maximum(cap, 1e-12)


def _bulk_wait(d: Number, s: Number, lam: Number, wide: Number, shape: Shape) -> list[Number]:
    """Mean, variance, third cumulant of what an arrival waits for in the running and its own iteration.

    Iterations follow T' = d + s Poisson(lam T). The arrival meets a length-biased T, waits its rest, and shares
    its own iteration with what else came during T. Where the chunk bounds how many prompts go together, a queue
    adds an exponential part.
    """
    rho = np.minimum(lam * s, 0.999)
    burst = shape.arrival_cv2 + shape.work_cv2
    mean = d / (1.0 - rho)
    var = s**2 * lam * mean * burst / (1.0 - rho**2)
    third = s**3 * (lam * mean * burst**2 + 3.0 * burst * lam**2 * var) / (1.0 - rho**3)
    m2 = var + mean**2
    m3 = third + 3.0 * var * mean + mean**3
    a1, a2 = m2 / mean, m3 / mean
    a3 = a2 * (2.0 * a2 / a1 - a1)
    x1 = a1 * (0.5 + rho)
    x2 = a2 * (1.0 / 3.0 + rho + rho**2) + s * rho * burst * a1
    x3 = a3 * (0.25 + rho + 1.5 * rho**2 + rho**3) + 3.0 * s * rho * burst * a2 * (0.5 + rho)
    x3 = x3 + s**2 * rho * burst**2 * a1
    together = np.maximum(wide, 1.0)
    tight = np.minimum(lam * (d + together * s) / together, TOP)
    more = tight**together * (d + together * s) / (2.0 * together * (1.0 - tight))
    return [
        x1 + more,
        x2 - x1**2 + more**2,
        np.maximum(x3 - 3.0 * x1 * x2 + 2.0 * x1**3, 0.0) + 2.0 * more**3,
    ]


def _single_wait(s: Number, service: Number, lam: Number, shape: Shape) -> list[Number]:
    """The same behind a prefill, for prompts served one after another: M/G/1 (Takacs' recursion).

    `s` seconds a prompt takes of a queue, `service` with the iterations that end queues part-filled.
    """
    rho = np.minimum(lam * s, TOP)
    cv2 = shape.work_cv2
    # Moments of log-normal work.
    s2, s3, s4 = s**2 * (1 + cv2), s**3 * (1 + cv2) ** 3, s**4 * (1 + cv2) ** 6
    burst = (shape.arrival_cv2 + cv2) / (1.0 + cv2)
    scale = lam / (1.0 - rho)
    w1 = scale * s2 / 2.0 * burst
    w2 = scale * (s2 * w1 + s3 / 3.0) * burst
    w3 = scale * (1.5 * s2 * w2 + s3 * w1 + s4 / 4.0) * burst
    waiting = np.maximum(rho, 1e-12) * _crowded(rho, shape.arrival_cv2)
    x = [w / waiting * (service / s) ** k for k, w in enumerate((w1, w2, w3), start=1)]
    return [x[0], np.maximum(x[1] - x[0] ** 2, 0.0), np.maximum(x[2] - 3 * x[0] * x[1] + 2 * x[0] ** 3, 0.0)]


def _crowded(rho: Number, cv2: Number) -> Number:
    """How many times the share `rho` that waits with Poisson arrivals does (Kraemer and Langenbach-Belz)."""
    rho = np.clip(rho, 0.0, 1.0)
    return 1.0 + np.maximum(cv2 - 1.0, 0.0) * (1.0 - rho) * 4.0 * rho / (cv2 * (1.0 + 4.0 * rho**2))


def _full(order: Number, spin: Number, rho: Number, limit: Number) -> Number:
    """Probability that all `limit` slots are taken: negative binomial below, geometric above."""
    x = np.maximum(spin, 1e-12)
    log_pmf = (
        lgamma(limit + order) - lgamma(order) - lgamma(limit + 1.0) + order * np.log1p(-x) + limit * np.log(x)
    )
    tail = np.exp(np.minimum(log_pmf, 0.0)) / (1.0 - rho)
    mean = order * x / (1.0 - x)
    variance = mean / (1.0 - x)
    below = 1.0 - survival(mean, variance, 2.0 * variance**2 / np.maximum(mean, 1e-12), limit - 0.5)
    # With one or two slots the sum is short and exact.
    first = np.exp(order * np.log1p(-x))
    below = np.where(limit < 1.5, first, np.where(limit < 2.5, first * (1.0 + order * x), below))
    return np.clip(tail / (below + tail), 0.0, 1.0)
