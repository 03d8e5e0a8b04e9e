"""What a model on a device does under a load: latency quantiles, capacity, and how many devices hold an SLO.

`forecast` answers one point with error bars, `gpus_needed` sizes a fleet. Step times come from
`planner.roofline`, waiting from `planner.queueing`; `planner.simulate` is the check on both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from planner import queueing
from planner.replica import Load, Setup, Slo
from planner.roofline import (
    cache_bytes,
    weight_bytes,
)


class Quantiles(Struct, frozen=True):
    """Mean, p50, p95 and p99 of a latency, seconds."""

    mean: float
    p50: float
    p95: float
    p99: float


class Forecast(Struct, frozen=True):
    """One replica under a load. Times in seconds, `capacity` in requests/s with no latency target.

    `fits` is False where the weights, or not even one sequence, do not fit (then `reason` says why, latencies
    are infinite and capacity 0). `stable` is False where the rate exceeds the capacity. `utilisation` is rate over
    capacity; `batch` the mean number of decoding sequences, `max_batch` the bound by memory (and engine).
    `low` and `high` bound each figure at one standard deviation of the device's efficiency, by name
    (`ttft_p95`, `tpot_p95`, `e2e_p95`, `capacity`); `spread` is that relative standard deviation.
    """

    model: str
    gpu: str
    precision: str
    engine: str
    tensor_parallel: int
    fits: bool
    stable: bool
    reason: str
    ttft: Quantiles
    tpot: Quantiles
    e2e: Quantiles
    capacity: float
    utilisation: float
    batch: float
    max_batch: int
    weight_bytes: float
    cache_bytes_per_request: float
    prefill_seconds: float
    decode_step_seconds: float
    spread: float
    low: Mapping[str, float]
    high: Mapping[str, float]


class Sizing(Struct, frozen=True):
    """How many devices hold an SLO: `replicas` of `tensor_parallel` devices, `gpus` in all.

    `rate_per_replica` is the highest rate one replica takes within the SLO; `forecast` is one replica's at its
    share of the load. `feasible` is False where no number of replicas holds the SLO; `reason` then says which
    target fails with an almost idle server.
    """

    feasible: bool
    replicas: int
    gpus: int
    rate_per_replica: float
    forecast: Forecast
    reason: str


def forecast(one: Setup, load: Load) -> Forecast:
    """Latency, capacity and memory of one replica (see `planner.replica.setup`) under `load`, with error bars."""
    shape = one.shape(load)
    weights = weight_bytes(one.arch, one.precision)
    spread = one.eff.spread
    names = ("ttft_p95", "tpot_p95", "e2e_p95", "capacity")
    reason = ""
    if one.max_batch < 1:
        room = one.gpu.memory * one.tensor_parallel
        each = cache_bytes(one.arch, one.precision, load.prompt_tokens + load.output_tokens)
        reason = (
            f"{one.arch.name} in {one.precision.name} needs {weights / 1e9:.1f} GB for weights and a cache of "
            f"{each / 1e9:.1f} GB per request; "
            f"{one.gpu.name} has {room / 1e9:.1f} GB"
        )
    answer = queueing.respond(one.cost, shape, load.rate)
    stable = bool(answer.utilisation < 1.0)
    if not reason and not stable:
        reason = f"{load.rate:g} requests/s exceed the capacity of {float(answer.capacity):.3g}"

    def figures(speed: float) -> dict[str, float]:
        moved = queueing.respond(one.cost.scaled(speed), shape, load.rate, (95.0,))
        values = (moved.ttft[95.0], moved.tpot[95.0], moved.e2e[95.0], moved.capacity)
        return {k: float(v) for k, v in zip(names, values, strict=True)}

    fast, slow = figures(math.exp(spread)), figures(math.exp(-spread))
    return Forecast(
        model=one.arch.name,
        gpu=one.gpu.name,
        precision=one.precision.name,
        engine=one.engine,
        tensor_parallel=one.tensor_parallel,
        fits=one.max_batch >= 1,
        stable=stable,
        reason=reason,
        ttft=_quantiles(answer.ttft_mean, answer.ttft),
        tpot=_quantiles(answer.tpot_mean, answer.tpot),
        e2e=_quantiles(answer.e2e_mean, answer.e2e),
        capacity=float(answer.capacity),
        utilisation=float(answer.utilisation),
        batch=float(answer.batch) if stable else float(one.max_batch),
        max_batch=one.max_batch,
        weight_bytes=weights,
        cache_bytes_per_request=cache_bytes(one.arch, one.precision, load.prompt_tokens + load.output_tokens),
        prefill_seconds=float(answer.prefill),
        decode_step_seconds=float(answer.decode),
        spread=spread,
        low={k: min(fast[k], slow[k]) for k in names},
        high={k: max(fast[k], slow[k]) for k in names},
    )


def _quantiles(mean: object, at: Mapping[float, object]) -> Quantiles:
    return Quantiles(float(mean), float(at[50.0]), float(at[95.0]), float(at[99.0]))  # type: ignore[arg-type]


def gpus_needed(
    one: Setup, load: Load, slo: Slo, *, peak_factor: float = 1.0, max_utilisation: float = 0.9
) -> Sizing:
    """Fewest replicas that hold `slo` when `peak_factor` x `load.rate` is split evenly over them.

    The highest rate of one replica within the SLO is found on a grid of utilisations up to `max_utilisation`
    (without targets that bound alone holds), then the peak is divided by it. The forecast returned is one
    replica's at its share of the peak.
    """
    peak = load.rate * peak_factor
    if one.max_batch < 1:
        nothing = forecast(one, replace(load, rate=peak))
        return Sizing(False, 0, 0, 0.0, nothing, nothing.reason)
    shape = one.shape(load)
    top = float(queueing.capacity(one.cost, shape))
    low, high = 1e-4, max_utilisation
    best = 0.0
    for _ in range(3):
        grid = np.linspace(low, high, 25)
        held = _holds(one, shape, grid * top, slo)
        if not held[0]:
            break
        last = int(np.argmin(held)) - 1 if not held.all() else len(grid) - 1
        best = float(grid[last])
        if last == len(grid) - 1:
            break
        low, high = float(grid[last]), float(grid[last + 1])
    if best <= 0.0:
        idle = forecast(one, replace(load, rate=max(1e-4 * top, 1e-12)))
        return Sizing(False, 0, 0, 0.0, idle, _missed(idle, slo))
    each = best * top
    replicas = max(1, math.ceil(peak / each - 1e-9))
    share = forecast(one, replace(load, rate=peak / replicas))
    return Sizing(True, replicas, replicas * one.tensor_parallel, each, share, "")


def _holds(one: Setup, shape: queueing.Shape, rates: np.ndarray, slo: Slo) -> np.ndarray:
    p = slo.percentile
    answer = queueing.respond(one.cost, shape, rates, (p,))
    good = np.ones(len(rates), dtype=bool)
    for target, value in ((slo.ttft, answer.ttft[p]), (slo.tpot, answer.tpot[p]), (slo.e2e, answer.e2e[p])):
        if target is not None:
            good &= np.asarray(value) <= target
    return good


def _missed(idle: Forecast, slo: Slo) -> str:
    pairs = (
        ("TTFT", slo.ttft, idle.ttft),
        ("TPOT", slo.tpot, idle.tpot),
        ("end-to-end time", slo.e2e, idle.e2e),
    )
    for name, target, value in pairs:
        if target is not None and value.p50 > target:
            return (
                f"{name} is {value.p50 * 1e3:.0f} ms on an idle server; the target is {target * 1e3:.0f} ms"
            )
    return "no load meets the SLO"
