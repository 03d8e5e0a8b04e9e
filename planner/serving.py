"""What the forecast says of one self-hosted option: rate within the SLO, latency, dollars per hour."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from planner.latency.closed_form import capacity as saturated
from planner.latency.replica import Load, Replica, replica
from planner.latency.replica import Slo as SecondsSlo
from planner.latency.sizing import Latency, Sizing, closed_form, rate_within, simulated
from planner.latency.step import Draft, Efficiency
from planner.usage import Usage
from unshot import catalog
from unshot.case import CandidateSettings, Slo, TrafficSettings
from unshot.catalog import Architecture, Engine, Gpu
from unshot.contracts.plan import MachinePrice
from unshot.errors import InputError

if TYPE_CHECKING:
    from planner.latency.calibrate import Calibration

# Without a price range of its own a GPU costs between these factors of its typical price (5th and 95th percentile of
# what clouds ask for one card, spot aside).
PRICE_LOW, PRICE_HIGH = 0.6, 1.6
Z95 = 1.645
# Tensor parallelism that is tried where one device does not hold the model.
SHARDS = (2, 4, 8)


class Serving(Struct, frozen=True):
    """One replica of a model on a device under one prompt's requests.

    `capacity` requests/s within the SLO (0 if `fits` is False, then `why` says why, and `slow` whether it is the SLO
    alone that is missed). `capacity_interval` and `price_interval` are 90% factors.
    """

    fits: bool
    why: str
    capacity: float
    gpus_per_replica: int
    machine: MachinePrice
    train_flops: float
    capacity_interval: tuple[float, float]
    price_interval: tuple[float, float]
    load: Load
    one: Replica
    slow: bool = False

    def length_factor(self, prompt: Any, output: Any, cached: Any) -> Any:
        """Capacity with other mean lengths (tokens; numbers or arrays) over that with the load's own."""
        one, load = self.one, self.load
        prompt = np.maximum(prompt, cached + 1.0)
        shape = one.shape(load, prompt=prompt, output=np.maximum(output, 1.0), cached=cached)
        there = saturated(one.cost, shape, one.overhead.request)
        return there / float(saturated(one.cost, one.shape(load), one.overhead.request))

    def curve(self, rates: list[float], measure: str, percentile: float) -> list[float]:
        """`measure` (ttft, tpot or e2e) in milliseconds at the percentile, for rates of one replica (closed form)."""
        answer = closed_form(self.one, self.load, np.asarray(rates), (percentile,))
        return [float(v) * 1e3 for v in np.atleast_1d(getattr(answer, measure)[percentile])]

    def latency(self, rate: float) -> dict[str, Latency]:
        """TTFT, TPOT and end-to-end time in seconds of one replica at `rate` requests/s, simulated."""
        return simulated(self.one, replace(self.load, rate=max(rate, 1e-9)))


def machine(device: Gpu, price: float | None, factor: float = 1.0) -> MachinePrice:
    """What an hour of a device costs: the user's price, else the catalog's, times `factor` (a reservation, spot).

    Raises `InputError` if neither is known.
    """
    if price is not None:
        hour, source, date = price, "your price", ""
    elif device.price is None:
        raise InputError(
            f"{device.name}: the catalog has no price for it; pass --gpu-price {device.name}=DOLLARS"
        )
    else:
        hour, source, date = device.price, device.price_source, device.price_date
    if factor != 1.0:
        source = ", ".join(filter(None, (f"{factor:g} (your factor) x ${hour:g}, {source}", date)))
        hour, date = hour * factor, ""
    return MachinePrice(
        name=device.name,
        title=device.title,
        kind="cpu" if device.family == "cpu" else "gpu",
        dollars_per_hour=hour,
        source=source,
        date=date,
    )


def describe(price: MachinePrice) -> str:
    """One line for the list of assumptions."""
    where = ", ".join(filter(None, (price.source, price.date)))
    return f"{price.title}: ${price.dollars_per_hour:g} per hour; {where}"


def load_of(usage: Usage, rate: float, arrival_cv: float, *, cached: int) -> Load:
    """The requests of a prompt; `cached` prefix tokens are found in the prefix cache."""
    shortest = min(prompt for prompt, _ in usage.samples)
    return Load.of_samples(
        rate,
        [(float(p), float(o)) for p, o in usage.samples],
        cached_tokens=float(max(min(cached, shortest - 1), 0)),
        arrival_cv=arrival_cv,
    )


def serve(
    model: str,
    device: Gpu,
    precision: str,
    usage: Usage,
    *,
    prefix_cache: bool,
    traffic: TrafficSettings,
    slo: Slo,
    price: float | None,
    setup: CandidateSettings,
    calibration: Path | None = None,
) -> Serving:
    """Size one replica for the prompt's requests. Raises `InputError` for unknown names.

    If one GPU does not hold the model and a request's cache, two, four or eight share it (tensor parallelism), unless
    `setup` says how many. `setup` also gives engine, KV-cache precision and the engine's limits.
    """
    arch = catalog.model(model)
    engine = engine_on(device, setup.engine)
    cached = usage.prefix // engine.block * engine.block if prefix_cache else 0
    load = load_of(usage, traffic.rate, traffic.arrival_cv, cached=cached)
    eff: Efficiency | None = None
    measured = _calibrated(calibration) if calibration is not None else None
    if measured is not None and measured.holds_for(device):
        eff = measured.efficiency
        if measured.engine.name != engine.name and setup.engine is not None:
            raise InputError(
                f"{calibration} was taken with {measured.engine.title} and [candidate] engine is {engine.name}: leave "
                "one of them out"
            )
        engine = measured.engine

    def sized(shards: int) -> Replica:
        return replica(
            arch, device, precision, load, engine=engine, tensor_parallel=shards, eff=eff,
            cache=setup.kv_cache, slots=setup.max_sequences, chunk=setup.chunk, draft=draft_of(setup),
        )  # fmt: skip

    one = sized(setup.tensor_parallel or 1)
    if setup.tensor_parallel is None and engine.kernels == "batched":
        for shards in SHARDS:
            one = one if one.limit >= 1 else sized(shards)
    why = _too_long(arch, usage)
    if arch.heads % one.tensor_parallel:
        why = f"{arch.name}'s {arch.heads} heads do not divide among {one.tensor_parallel} devices"
    form = catalog.precision(precision)
    if {form.name, form.note} & {*engine.lacks.get(device.family, ()), *engine.lacks.get("all", ())}:
        why = f"{engine.title} has no {precision} kernels for {device.title}"
    sizing = Sizing(0.0, why) if why else rate_within(one, load, seconds(slo))
    spread = math.exp(Z95 * one.eff.spread)
    return Serving(
        fits=not sizing.reason,
        why=sizing.reason,
        capacity=sizing.rate,
        gpus_per_replica=one.tensor_parallel,
        machine=machine(device, price, setup.price_factor),
        train_flops=device.peak("fp16"),
        capacity_interval=(1 / spread, spread),
        price_interval=(1.0, 1.0) if price is not None else (PRICE_LOW, PRICE_HIGH),
        load=load,
        one=one,
        slow=bool(sizing.reason) and not why and one.limit >= 1,
    )


def engine_on(device: Gpu, asked: str | None) -> Engine:
    """The engine asked for, else what the device usually runs; on a CPU or an Apple chip always llama.cpp."""
    engine = catalog.engine(asked or device.engine)
    return catalog.engine(device.engine) if _exchanged(engine, device) else engine


def _exchanged(engine: Engine, device: Gpu) -> bool:
    return engine.kernels == "batched" and device.engine == "llamacpp"


def exchanged(device: Gpu, asked: str | None) -> str:
    """What is said where another engine than the one asked for is forecast; empty otherwise."""
    if asked is None or not _exchanged(catalog.engine(asked), device):
        return ""
    used = catalog.engine(device.engine).title
    return f"{catalog.engine(asked).title} does not run on {device.title}: {used} is forecast there"


def draft_of(setup: CandidateSettings) -> Draft | None:
    """Speculative decoding as the case has it. Raises `InputError` without an acceptance rate: none is assumed."""
    if setup.speculative_tokens is None:
        if setup.acceptance is not None:
            raise InputError(
                "[candidate] acceptance (--acceptance) counts only with speculative_tokens: how many are drafted?"
            )
        return None
    if setup.acceptance is None:
        raise InputError(
            "speculative decoding needs the share of drafted tokens that your requests accept: measure it (vLLM's and "
            "SGLang's logs show it) and give [candidate] acceptance (--acceptance)"
        )
    return Draft(setup.speculative_tokens, setup.acceptance, setup.draft_share)


def _too_long(arch: Architecture, usage: Usage) -> str:
    """Why the longest request does not fit the model's context; empty if it does."""
    longest = max(prompt + output for prompt, output in usage.samples)
    if not arch.context or longest <= arch.context:
        return ""
    return f"the longest request has {longest:,} tokens; {arch.name} takes {arch.context:,}"


def seconds(slo: Slo) -> SecondsSlo:
    """The case file's targets (milliseconds) in seconds."""
    ttft, tpot, e2e = (None if v is None else v / 1e3 for v in (slo.ttft_ms, slo.tpot_ms, slo.e2e_ms))
    return SecondsSlo(ttft, tpot, e2e, slo.percentile)


@functools.cache
def _calibrated(path: Path) -> Calibration:
    """What a bench report says of its machine."""
    from planner.latency.calibrate import calibrate

    return calibrate(path)


def calibrated(path: Path | None, device: Gpu) -> bool:
    """Whether a bench report, if there is one, is about a device."""
    return path is not None and _calibrated(path).holds_for(device)


def calibration_note(path: Path, device: Gpu) -> str:
    """One line on whether a bench report is about a device."""
    found = _calibrated(path)
    if found.holds_for(device):
        return f"efficiencies of {device.name} with {found.engine.title} fitted to {path}"
    return f"efficiencies of {device.name} are the catalog's: {path} was taken on {found.gpu.name}"
