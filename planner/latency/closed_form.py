"""Latency of a continuous-batching server in a short closed form; every argument may be a float or an array.

It draws curves and gives the sizing its first guess; latencies that are shown come from `planner.latency.simulate`.

The number decoding and the iteration's length follow each other to a fixed point (processor sharing: Kelly,
"Reversibility and Stochastic Networks", 1979). Prompts wait for the running iteration and behind one another as in
M/G/1 (Pollaczek-Khinchine, with Kingman's factor for arrivals that are not Poisson); where the batch is full, for a
slot as in G/G/c (Sakasegawa, "An approximation formula L_q = a rho^b / (1 - rho)", 1977). Waits have an exponential
tail.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
from msgspec import Struct

from planner.latency.replica import Shape
from planner.latency.step import StepCost

Number = Any
FIXED_POINT_STEPS = 30


class Response(Struct, frozen=True):
    """Latency of a load: `ttft`, `tpot`, `e2e` map a percentile to seconds, infinite at or above `capacity`."""

    capacity: Number
    utilisation: Number
    batch: Number
    ttft: dict[float, Number]
    tpot: dict[float, Number]
    e2e: dict[float, Number]


def iteration(cost: StepCost, shape: Shape, sequences: Number, prompts: Number) -> Number:
    """Seconds of an iteration with `sequences` decoding and `prompts` whole prompts prefilled in it."""
    left = np.maximum(shape.chunk - sequences, 1.0)  # decoding takes its share of a chunk
    chunks = np.maximum(prompts * shape.new / left, np.minimum(prompts, 1.0))
    return cost.step(
        prompts * shape.new,
        prompts * shape.pairs,
        sequences,
        sequences * shape.context,
        prompts=prompts,
        chunks=chunks,
    )


def mean_iteration(cost: StepCost, shape: Shape, sequences: Number, prompts: Number) -> Number:
    """Mean seconds of an iteration that brings `prompts` on average.

    Prompts are not spread thinner than one (or one chunk of one) to an iteration; the others only decode.
    """
    joint = np.maximum(prompts, np.minimum(1.0, shape.chunk / shape.new))
    share = prompts / joint
    together = iteration(cost, shape, sequences, joint)
    return share * together + (1.0 - share) * iteration(cost, shape, sequences, 0.0)


def capacity(cost: StepCost, shape: Shape, request: Number = 0.0) -> Number:
    """Requests/s with a queue that never empties: full batch, prefills as regular as slots come free.

    A slot is held for the prefill's iterations and for one per further answer token. `request` is the host's time per
    request, which bounds the rate too. The published offline-throughput rows are compared with this figure.
    """
    held = np.maximum(shape.output - 1.0, 0.0) + np.maximum(1.0, shape.new / shape.chunk)
    inflow = np.maximum(np.minimum(shape.limit / held, shape.chunk / shape.new), 1e-12)
    sequences = inflow * np.maximum(shape.output - 1.0, 0.0)
    seconds = mean_iteration(cost, shape, sequences, inflow)
    return np.where(shape.limit >= 1, 1.0 / np.maximum(seconds / inflow, request), 0.0)


def respond(
    cost: StepCost,
    shape: Shape,
    rate: Number,
    percentiles: tuple[float, ...] = (50.0, 95.0, 99.0),
    *,
    request: Number = 0.0,
    accept: Number = 0.0,
) -> Response:
    """Latency at `rate` requests/s. `request` and `accept` are the host's seconds per request (`Overhead`)."""
    top = capacity(cost, shape, request)
    load = rate / np.maximum(top, 1e-300)
    rho = np.minimum(load, 0.999)
    arrivals = np.maximum(rho * top, 1e-12)
    steps = np.maximum(shape.output - 1.0, 0.0)
    limit = np.maximum(shape.limit, 1.0)
    wide = shape.chunk / shape.new
    length = _length(cost, shape, arrivals, limit)
    batch = np.minimum(limit, arrivals * steps * length)
    tpot = mean_iteration(cost, shape, np.minimum(batch + 1.0, limit), np.minimum(arrivals * length, wide))
    # The number decoding spreads like a Poisson number, and prefills fall into an answer at random.
    prefill = np.maximum(tpot - iteration(cost, shape, batch + 1.0, 0.0), 0.0)
    unsure = (tpot - iteration(cost, shape, 1.0, 0.0)) / np.sqrt(np.maximum(batch, 1.0))
    unsure = np.hypot(unsure, prefill / np.sqrt(np.maximum(arrivals * steps * tpot, 1.0)))
    plain = iteration(cost, shape, batch, 0.0)
    own = iteration(cost, shape, batch, 1.0) + (np.maximum(np.ceil(1.0 / wide), 1.0) - 1.0) * plain
    # A prompt's place in the queue of chunks: as many prompts as fill one share an iteration.
    full = np.maximum(wide, 1.0)
    service = iteration(cost, shape, batch, np.minimum(full, wide)) / np.minimum(full, wide)
    busy = np.minimum(arrivals * np.maximum(service, request), 0.999)
    variability = (shape.arrival_cv2 + shape.prompt_cv2) / 2.0
    queue = service * busy / (1.0 - busy) * variability
    slots = rho ** (np.sqrt(2.0 * (limit + 1.0)) - 1.0) / (limit * (1.0 - rho))
    queue = queue + slots * (own + steps * tpot) * (shape.arrival_cv2 + shape.output_cv2) / 2.0
    met = 1.0 - np.exp(-batch) * (1.0 - np.minimum(arrivals * own, 1.0))
    waiting = np.maximum(busy, rho ** np.sqrt(limit))

    def first_token(percentile: float) -> Number:
        share = 1.0 - percentile / 100.0
        tail = queue / np.maximum(waiting, 1e-9) * np.maximum(np.log(np.maximum(waiting, 1e-9) / share), 0.0)
        # The running iteration is met with probability `met`, anywhere in it; a long prompt is the slowest itself.
        residual = plain * np.clip((percentile / 100.0 - (1.0 - met)) / np.maximum(met, 1e-9), 0.0, 1.0)
        longer = np.exp(_spread(shape.prompt_cv2, percentile))
        return accept + request + own * longer + residual + tail

    stable = load < 1.0
    shown = {p: np.where(stable, first_token(p), np.inf) for p in percentiles}
    slow = {p: tpot + np.maximum(_normal(p), 0.0) * unsure for p in percentiles}
    answer = {p: steps * slow[p] * np.exp(_spread(shape.output_cv2, p)) for p in percentiles}
    return Response(
        capacity=top,
        utilisation=load,
        batch=batch,
        ttft=shown,
        tpot={
            p: np.where(stable, np.maximum(tpot + _normal(p) * unsure, 0.9 * tpot), np.inf)
            for p in percentiles
        },
        e2e={p: shown[p] + answer[p] for p in percentiles},
    )


def _length(cost: StepCost, shape: Shape, arrivals: Number, limit: Number) -> Number:
    """Mean seconds of an iteration when it and the number decoding agree."""
    steps, wide = np.maximum(shape.output - 1.0, 0.0), shape.chunk / shape.new
    length = iteration(cost, shape, 1.0, 0.0)
    for _ in range(FIXED_POINT_STEPS):
        batch = np.minimum(limit, arrivals * steps * length)
        prompts = np.minimum(arrivals * length, wide)
        length = 0.5 * length + 0.5 * mean_iteration(cost, shape, batch, prompts)
    return length


def _spread(cv2: Number, percentile: float) -> Number:
    """Logarithm of a log-normal quantile over its mean."""
    sigma2 = np.log1p(cv2)
    return _normal(percentile) * np.sqrt(sigma2) - sigma2 / 2.0


def _normal(percentile: float) -> float:
    return NormalDist().inv_cdf(percentile / 100.0)
