"""What the capacity forecast says of one self-hosted option: rate within the SLO, latency, dollars per hour."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from planner.capacity import gpus_needed
from planner.queueing import Shape, respond
from planner.queueing import capacity as saturated
from planner.replica import Load, Setup, setup
from planner.replica import Slo as SecondsSlo
from planner.roofline import StepCost, columns
from planner.usage import Usage
from unshot import catalog
from unshot.case import Slo
from unshot.catalog import Gpu
from unshot.errors import InputError
from unshot.machine import usable_cores
from unshot.memo import Task, ahead, remember

# vLLM keeps the prefix cache in blocks of 16 tokens (docs.vllm.ai, "Automatic Prefix Caching").
CACHE_BLOCK = 16
# Without a price range of its own a GPU costs between these factors of its typical price (5th and 95th percentile of
# what clouds ask for one card, spot aside).
PRICE_LOW, PRICE_HIGH = 0.6, 1.6
Z95 = 1.645
PERCENTILES = (50.0, 95.0, 99.0)
# Where the closed form is held to a tenth (docs/capacity.md): up to this share of the capacity, and from so many slots
# on. Elsewhere the latencies shown are simulated, with so many requests.
SIMULATED, SLOTS, REQUESTS = 0.7, 10, 40_000
# Without an SLO a replica is loaded to this share of its capacity (as `gpus_needed` bounds it).
MAX_UTILISATION = 0.9


class Serving(Struct, frozen=True):
    """One replica of a model on a device under one prompt's requests.

    `capacity` requests/s within the SLO (0 where `fits` is False, then `why` says why); elasticities say by what
    power of the prompt's and the answer's length it falls. `capacity_interval` and `price_interval` are 90% factors.
    """

    fits: bool
    why: str
    capacity: float
    gpus_per_replica: int
    price_hour: float
    price_source: str
    price_date: str
    train_flops: float
    input_elasticity: float
    output_elasticity: float
    capacity_interval: tuple[float, float]
    price_interval: tuple[float, float]
    load: Load
    one: Setup

    def simulation(self, rate: float) -> Task:
        """For `remember`: percentiles in seconds from a simulation of `REQUESTS` requests, by measure."""
        load = replace(self.load, rate=rate)

        def run() -> dict[str, dict[str, float]]:
            from planner.simulate import simulate

            found = simulate(self.one, load, requests=REQUESTS)
            seen = {measure: found.quantiles(measure) for measure in ("ttft", "tpot", "e2e")}
            return {m: {"50.0": q.p50, "95.0": q.p95, "99.0": q.p99} for m, q in seen.items()}

        return "latency", (self.one, load, REQUESTS), run

    def curve(self, rates: list[float], measure: str, percentile: float) -> list[float]:
        """`measure` (ttft, tpot or e2e) in milliseconds at the percentile, for rates of one replica."""
        answer = respond(self.one.cost, self.one.shape(self.load), np.asarray(rates), (percentile,))
        return [float(v) * 1e3 for v in np.atleast_1d(getattr(answer, measure)[percentile])]


def latencies(loads: Sequence[tuple[Serving, float]]) -> list[dict[str, Any]]:
    """TTFT, TPOT and end-to-end p50/p95/p99 in milliseconds of replicas, each at its own requests/s, in one go.

    `p95_interval` is the p95's 90% interval over the error of the device's efficiency. `from` says where the
    percentiles come from: `simulation` above `SIMULATED` of the capacity and below `SLOTS` slots, where the
    closed form is often more than a tenth off, else `closed form`.
    """
    if not loads:
        return []
    costs, shapes, rates = [], [], []
    for serving, rate in loads:
        spread = Z95 * serving.one.eff.spread
        costs += [serving.one.cost.scaled(speed) for speed in (1.0, math.exp(-spread), math.exp(spread))]
        shapes += [serving.one.shape(serving.load)] * 3
        rates += [max(rate, 1e-9)] * 3
    answer = respond(StepCost(**columns(costs)), Shape(**columns(shapes)), np.asarray(rates), PERCENTILES)
    tasks: dict[int, Task] = {}
    for k, (serving, rate) in enumerate(loads):
        share = float(answer.utilisation[3 * k])
        if share < 1.0 and (share > SIMULATED or serving.one.max_batch < SLOTS):
            tasks[k] = serving.simulation(rate)
    todo, cores = list(tasks.values()), usable_cores()
    for other in range(1, cores):
        ahead(todo[other::cores])
    found = []
    for k in range(len(loads)):
        seen: dict[str, dict[str, float]] | None = remember(*tasks[k]) if k in tasks else None
        row: dict[str, Any] = {"from": "simulation" if seen is not None else "closed form"}
        for measure in ("ttft", "tpot", "e2e"):
            values = getattr(answer, measure)
            at = {p: [float(v) * 1e3 for v in values[p][3 * k : 3 * k + 3]] for p in PERCENTILES}
            if seen is not None:
                # The interval is moved by the factor by which its middle is.
                at = {p: [v * seen[measure][str(p)] * 1e3 / at[p][0] for v in at[p]] for p in PERCENTILES}
            row[measure] = {
                **{f"p{p:g}": at[p][0] for p in PERCENTILES},
                "p95_interval": [min(at[95.0][1:]), max(at[95.0][1:])],
            }
        found.append(row)
    return found


def machine(gpu: Gpu, price: float | None) -> dict[str, Any]:
    """The device's name and dollars per hour with source and date. Raises `InputError` where no price is known."""
    if price is None and gpu.price is None:
        raise InputError(f"{gpu.name}: no price is known; pass --gpu-price {gpu.name}=DOLLARS_PER_HOUR")
    hour = float(price if price is not None else gpu.price or 0.0)
    source, date = ("your price", "-") if price is not None else (gpu.price_source, gpu.price_date)
    return {
        "name": gpu.name,
        "title": gpu.title,
        "kind": "cpu" if gpu.family == "cpu" else "gpu",
        "dollars_per_hour": hour,
        "source": source,
        "date": date,
        "line": f"{gpu.name} ({gpu.title}): ${hour:g} per hour; {source}, {date}",
    }


def serve(
    model: str,
    gpu: str,
    precision: str,
    usage: Usage,
    *,
    prefix_cache: bool,
    rate: float,
    peak_factor: float,
    slo: Slo,
    price: float | None,
    arrival_cv: float = 1.0,
    calibration: Path | None = None,
) -> Serving:
    """Size one replica for the prompt's requests. Raises `InputError` for unknown names.

    Where one GPU does not hold the model and a request's cache, two, four or eight share it (tensor parallelism).
    """
    device = catalog.gpu(gpu)
    cached = usage.prefix // CACHE_BLOCK * CACHE_BLOCK if prefix_cache else 0
    shortest = min(prompt for prompt, _ in usage.samples)
    load = Load.of_samples(
        rate,
        [(float(p), float(o)) for p, o in usage.samples],
        cached_tokens=float(min(cached, shortest - 1)),
        arrival_cv=arrival_cv,
    )
    options: dict[str, Any] = {}
    if calibration is not None and device.engine == "llamacpp":
        options = {"eff": _calibrated(calibration, device.name), "engine": "llamacpp"}
    one = setup(model, device, precision, load, **options)
    for shards in (2, 4, 8) if one.engine == "batched" and one.max_batch < 1 else ():
        shared = setup(model, device, precision, load, tensor_parallel=shards, **options)
        if shared.max_batch >= 1:
            one = shared
            break
    targets = SecondsSlo(_seconds(slo.ttft_ms), _seconds(slo.tpot_ms), _seconds(slo.e2e_ms), slo.percentile)
    if one.max_batch >= 1 and targets.ttft is targets.tpot is targets.e2e is None:
        fits, why = True, ""
        capacity = MAX_UTILISATION * float(saturated(one.cost, one.shape(load)))
    else:
        sizing = gpus_needed(one, load, targets, peak_factor=peak_factor, max_utilisation=MAX_UTILISATION)
        fits, why, capacity = sizing.feasible, sizing.reason, sizing.rate_per_replica
    facts = machine(device, price)
    spread = math.exp(Z95 * one.eff.spread)
    return Serving(
        fits=fits,
        why=why,
        capacity=capacity,
        gpus_per_replica=one.tensor_parallel,
        price_hour=facts["dollars_per_hour"],
        price_source=facts["source"],
        price_date=facts["date"],
        train_flops=device.peak("fp16"),
        input_elasticity=_elasticity(one, load, "prompt_tokens"),
        output_elasticity=_elasticity(one, load, "output_tokens"),
        capacity_interval=(1 / spread, spread),
        price_interval=(1.0, 1.0) if price is not None else (PRICE_LOW, PRICE_HIGH),
        load=load,
        one=one,
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _elasticity(one: Setup, load: Load, name: str) -> float:
    """Minus d log(capacity) / d log(length), from a tenth more."""
    more = replace(load, **{name: getattr(load, name) * 1.1})
    before, after = (float(saturated(one.cost, one.shape(at))) for at in (load, more))
    return -math.log(after / before) / math.log(1.1) if before > 0 and after > 0 else 0.0


@functools.cache
def _calibrated(path: Path, gpu: str) -> Any:
    """The efficiencies a bench report shows for its machine (benches run llama.cpp)."""
    from planner.fit import calibrate

    return calibrate(path, gpu=gpu)
