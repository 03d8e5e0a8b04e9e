"""One replica under a load: what comes, what it is asked to hold, and the step cost and limits of the server.

`replica` resolves names to a `Replica`, from which the closed form, the simulation and the sizing all start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from planner.latency.step import (
    Draft,
    Efficiency,
    Overhead,
    StepCost,
    cache_room,
    cost_of,
    efficiency,
    overheads,
    spread_of,
    weight_bytes,
)
from unshot import catalog
from unshot.catalog import Architecture, Engine, Gpu, Precision
from unshot.errors import InputError

Number = Any  # float or numpy array

# Bytes per key or value element by the name of a KV cache's precision.
CACHE_BYTES = {"fp16": 2.0, "fp8": 1.0}


class Load(Struct, frozen=True):
    """Requests as they come to one replica.

    `rate` requests/s; tokens are means per request; `cached_tokens` of the prompt are found in a prefix cache.
    `arrival_cv` is the coefficient of variation of the time between arrivals (1 Poisson, above it bursty).
    Lengths spread by `prompt_cv` and `output_cv`, or come from `samples`, pairs (prompt, output) of real requests
    (the simulation draws pairs; the closed form takes their means and spreads).
    """

    rate: float
    prompt_tokens: float
    output_tokens: float
    cached_tokens: float = 0.0
    arrival_cv: float = 1.0
    prompt_cv: float = 0.0
    output_cv: float = 0.0
    samples: tuple[tuple[float, float], ...] | None = None

    def __post_init__(self) -> None:
        for name in ("rate", "prompt_tokens", "output_tokens", "arrival_cv"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"load: `{name}` is {value}; a number above zero is needed")
        for name in ("cached_tokens", "prompt_cv", "output_cv"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"load: `{name}` is {value}; zero or more is needed")
        if self.cached_tokens >= self.prompt_tokens:
            raise InputError(
                f"load: `cached_tokens` is {self.cached_tokens:g} of {self.prompt_tokens:g} prompt tokens; "
                "at least one token must be new"
            )

    @classmethod
    def of_samples(
        cls,
        rate: float,
        samples: Sequence[tuple[float, float]],
        *,
        cached_tokens: float = 0.0,
        arrival_cv: float = 1.0,
    ) -> Load:
        """A load whose lengths are those of real requests, `(prompt tokens, output tokens)` each."""
        if not samples:
            raise InputError("load: no samples; give at least one (prompt, output) pair")
        array = np.asarray(samples, dtype=float)
        mean, spread = array.mean(0), array.std(0)
        return cls(
            rate=rate,
            prompt_tokens=float(mean[0]),
            output_tokens=float(max(1.0, mean[1])),
            cached_tokens=cached_tokens,
            arrival_cv=arrival_cv,
            prompt_cv=float(spread[0] / mean[0]),
            output_cv=float(spread[1] / max(1.0, mean[1])),
            samples=tuple((float(p), float(o)) for p, o in array),
        )


class Slo(Struct, frozen=True):
    """Targets in seconds at `percentile` (0-100); None means no target."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None
    percentile: float = 95.0

    @property
    def targets(self) -> dict[str, float]:
        """The targets that were set, by measure."""
        named = {"ttft": self.ttft, "tpot": self.tpot, "e2e": self.e2e}
        return {name: value for name, value in named.items() if value is not None}


class Shape(Struct, frozen=True):
    """What one request asks of the server: means, and squared coefficients of variation. Floats or arrays.

    `new` prompt tokens to prefill, `pairs` query-key pairs of that prefill, `context` mean cached tokens while
    decoding, `output` answer tokens, `chunk` prefill tokens one iteration takes, `limit` sequences at most.
    """

    new: Number
    pairs: Number
    context: Number
    output: Number
    chunk: Number
    limit: Number
    prompt_cv2: Number = 0.0
    output_cv2: Number = 0.0
    arrival_cv2: Number = 1.0


class Replica(Struct, frozen=True):
    """One replica, resolved. `slots` sequences are the engine's own limit, `room` the cache's bytes, `element` bytes
    per key or value element; `limit` sequences of the mean length fit both.
    """

    arch: Architecture
    gpu: Gpu
    precision: Precision
    engine: Engine
    tensor_parallel: int
    cost: StepCost
    eff: Efficiency
    overhead: Overhead
    limit: int
    slots: int
    chunk: int
    room: float
    element: float

    def held(self, prompt: Number, output: Number, cached: Number, output_cv: float = 0.0) -> Number:
        """Bytes of its own that a running request holds, on average: a running request is more likely a long one."""
        tokens = prompt + output * (1.0 + output_cv**2)
        return self._bytes(tokens) - self._bytes(cached)

    def slots_in_memory(
        self, prompt: Number, output: Number, cached: Number, output_cv: float = 0.0
    ) -> Number:
        """How many such requests the cache holds at once, prefix tokens that all share kept once."""
        left = np.maximum(self.room - self._bytes(cached), 0.0)
        return left / np.maximum(self.held(prompt, output, cached, output_cv), 1.0)

    def _bytes(self, tokens: Number) -> Number:
        return self.arch.kv_elements * self.element * kept_tokens(self.arch, tokens)

    def shape(
        self, load: Load, *, prompt: Number = None, output: Number = None, cached: Number = None
    ) -> Shape:
        """The load as the closed form takes it, with other mean lengths if they are given (floats or arrays)."""
        prompt = load.prompt_tokens if prompt is None else prompt
        output = load.output_tokens if output is None else output
        cached = load.cached_tokens if cached is None else cached
        new = prompt - cached
        # A running request is more likely a long one, so its context is longer than the mean request's.
        full = prompt + np.maximum(output * (1.0 + load.output_cv**2) - 1.0, 0.0) / 2.0
        spread = load.prompt_cv * load.prompt_tokens / max(load.prompt_tokens - load.cached_tokens, 1.0)
        return Shape(
            new=new,
            # Pairs grow with the square of the length, so their mean is above the mean length's.
            pairs=windowed_pairs(self.arch, prompt) * (1.0 + load.prompt_cv**2)
            - windowed_pairs(self.arch, cached),
            context=kept_tokens(self.arch, full),
            output=output,
            chunk=float(self.chunk),
            limit=np.minimum(
                np.floor(self.slots_in_memory(prompt, output, cached, load.output_cv)), self.slots
            ),
            prompt_cv2=spread**2,
            output_cv2=load.output_cv**2,
            arrival_cv2=load.arrival_cv**2,
        )

    @property
    def why_not(self) -> str:
        """Why nothing fits on the device; empty where something does."""
        if self.limit >= 1:
            return ""
        weights = weight_bytes(self.arch, self.precision)
        memory = self.gpu.memory * self.tensor_parallel
        several = self.tensor_parallel > 1
        devices = f"{self.tensor_parallel} x {self.gpu.name} have" if several else f"{self.gpu.name} has"
        return (
            f"{self.arch.name} in {self.precision.name} needs {weights / 1e9:.1f} GB for weights, and a request's "
            f"cache beside them; {devices} {memory / 1e9:.1f} GB"
        )


def kept_tokens(arch: Architecture, tokens: Number) -> Number:
    """Mean over layers of the tokens kept for a context (windowed layers keep only their window)."""
    if not arch.windowed:
        return tokens
    return tokens + np.minimum(arch.window - tokens, 0.0) * (arch.windowed / arch.layers)


def all_pairs(tokens: Number) -> Number:
    """Query-key pairs of a causal prompt."""
    return tokens * (tokens + 1) / 2.0


def windowed_pairs(arch: Architecture, tokens: Number) -> Number:
    """The same, averaged over layers (windowed layers see at most their window)."""
    full = all_pairs(tokens)
    if not arch.windowed:
        return full
    return full - all_pairs(np.maximum(tokens - arch.window, 0.0)) * (arch.windowed / arch.layers)


def replica(
    model: str | Architecture,
    gpu: str | Gpu,
    precision: str | Precision,
    load: Load,
    *,
    engine: str | Engine | None = None,
    tensor_parallel: int = 1,
    eff: Efficiency | None = None,
    overhead: Overhead | None = None,
    cache: str | None = None,
    slots: int | None = None,
    chunk: int | None = None,
    draft: Draft | None = None,
) -> Replica:
    """Look names up and work out step cost and limits. Raises `InputError` for unknown names.

    `engine` is by default what the device usually runs; `eff` and `overhead` replace the catalog's numbers; `cache`
    is the precision of keys and values (None: the engine's default for these weights); `slots` and `chunk` are the
    engine's limits on sequences and prefill tokens of an iteration.
    """
    arch = catalog.model(model) if isinstance(model, str) else model
    device = catalog.gpu(gpu) if isinstance(gpu, str) else gpu
    form = catalog.precision(precision) if isinstance(precision, str) else precision
    if tensor_parallel < 1:
        raise InputError(f"tensor parallel is {tensor_parallel}; one or more devices are needed")
    server = catalog.engine(engine or device.engine) if not isinstance(engine, Engine) else engine
    kept = CACHE_BYTES.get(cache or "", form.cache)
    if cache is None and server.cache_fp8 and form.name == "fp8":
        kept = CACHE_BYTES["fp8"]
    eff = eff or efficiency(device, server)
    eff = replace(eff, spread=spread_of(eff, arch, tensor_parallel))
    default_chunk, default_slots = server.limits(device)
    built = Replica(
        arch=arch,
        gpu=device,
        precision=form,
        engine=server,
        tensor_parallel=tensor_parallel,
        cost=cost_of(
            arch, device, form, engine=server, eff=eff, tensor_parallel=tensor_parallel, cache_element=kept,
            overhead=overhead, draft=draft,
        ),
        eff=eff,
        overhead=overhead or overheads().get(server.name, Overhead()),
        limit=0,
        slots=slots or default_slots,
        chunk=chunk or default_chunk,
        room=cache_room(arch, device, form, engine=server, tensor_parallel=tensor_parallel),
        element=kept,
    )  # fmt: skip
    return replace(built, limit=int(built.shape(load).limit))
