"""One replica under a load: what comes, what it is asked to hold, and the step cost and limits of the server.

`setup` resolves names to a `Setup`, which the closed form (`planner.queueing`), the simulation and the sweep all
start from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from planner import queueing
from planner.roofline import Efficiency, StepCost, cost_of, efficiency, requests_in_memory
from unshot import catalog
from unshot.catalog import Architecture, Gpu, Precision
from unshot.errors import InputError

MAX_BATCH = {"batched": 2048, "llamacpp": 64}
CHUNK = {"batched": 2048, "llamacpp": 512}


class Load(Struct, frozen=True):
    """Requests as they come to one replica.

    `rate` requests/s; tokens are means per request; `cached_tokens` of the prompt are found in a prefix cache.
    `arrival_cv` is the coefficient of variation of the time between arrivals (1 Poisson, above it bursty).
    Lengths spread by `prompt_cv` and `output_cv`, or come from `samples`, pairs (prompt, output) of real requests
    (the simulation draws pairs; the analytic form takes their means and spreads).
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


class Setup(Struct, frozen=True):
    """One replica, resolved: shape, step cost and limits (what `forecast` and `simulate` both start from).

    `max_batch` mean requests fit the memory and the engine; `slots` sequences are the engine's own limit;
    `cache_tokens` is the memory in tokens that are not shared.
    """

    arch: Architecture
    gpu: Gpu
    precision: Precision
    engine: str
    tensor_parallel: int
    cost: StepCost
    eff: Efficiency
    max_batch: int
    slots: int
    chunk: int
    cache_tokens: float

    def shape(self, load: Load) -> queueing.Shape:
        """The load as the queueing formulas take it."""
        new = load.prompt_tokens - load.cached_tokens
        # A running request is more likely a long one, so its context is longer than the mean request's.
        full = load.prompt_tokens + max(load.output_tokens * (1.0 + load.output_cv**2) - 1.0, 0.0) / 2.0
        return queueing.Shape(
            new=new,
            # Pairs grow with the square of the length, so their mean is above the mean length's.
            pairs=windowed_pairs(self.arch, load.prompt_tokens) * (1.0 + load.prompt_cv**2)
            - windowed_pairs(self.arch, load.cached_tokens),
            context=self.arch.cached_tokens(full),
            output=load.output_tokens,
            chunk=float(self.chunk),
            limit=float(self.max_batch),
            work_cv2=(load.prompt_cv * load.prompt_tokens / new) ** 2,
            output_cv2=load.output_cv**2,
            arrival_cv2=load.arrival_cv**2,
            size_cv2=self._size_cv2(load),
            room=self.cache_tokens / self._held(load),
        )

    @staticmethod
    def _held(load: Load) -> float:
        """Tokens of its own that a running request holds, on average."""
        return load.prompt_tokens - load.cached_tokens + load.output_tokens * (1.0 + load.output_cv**2)

    def _size_cv2(self, load: Load) -> float:
        """Squared coefficient of variation of the cache a running request holds; 0 where memory is not the limit.

        Long answers run longer, so running ones are drawn by length (log-normal).
        """
        bias = 1.0 + load.output_cv**2
        mean = self._held(load)
        if self.cache_tokens / mean > 1.5 * self.max_batch:
            return 0.0
        varied = (load.prompt_cv * load.prompt_tokens) ** 2
        return (varied + (load.output_tokens * bias * load.output_cv) ** 2) / mean**2


def all_pairs(tokens: float) -> float:
    """Query-key pairs of a causal prompt."""
    return tokens * (tokens + 1) / 2.0


def windowed_pairs(arch: Architecture, tokens: float) -> float:
    """The same, averaged over layers (windowed layers see at most their window)."""
    full = all_pairs(tokens)
    if not arch.windowed or tokens <= arch.window:
        return full
    windowed = full - all_pairs(tokens - arch.window)
    return full + (windowed - full) * arch.windowed / arch.layers


def setup(
    model: str | Architecture,
    gpu: str | Gpu,
    precision: str | Precision,
    load: Load,
    *,
    engine: str | None = None,
    tensor_parallel: int = 1,
    eff: Efficiency | None = None,
    max_batch: int | None = None,
    chunk: int | None = None,
) -> Setup:
    """Look names up and work out step cost and limits. Raises `InputError` for unknown names.

    `engine` is `batched` (TensorRT-LLM, vLLM) or `llamacpp`, by default what the device usually runs. `eff`
    replaces the catalog's efficiencies (see `planner.fit.calibrate`). `max_batch` and `chunk` are the engine's limits
    on sequences and prefill tokens per iteration.
    """
    arch = catalog.model(model) if isinstance(model, str) else model
    device = catalog.gpu(gpu) if isinstance(gpu, str) else gpu
    form = catalog.precision(precision) if isinstance(precision, str) else precision
    if tensor_parallel < 1:
        raise InputError(f"tensor parallel is {tensor_parallel}; one or more devices are needed")
    engine = engine or device.engine
    eff = eff or efficiency(device, engine)
    cost = cost_of(arch, device, form, engine=engine, eff=eff, tensor_parallel=tensor_parallel)
    # A running request is more likely a long one: answers weigh in by their length.
    held = load.output_tokens * (1.0 + load.output_cv**2)
    fitting = requests_in_memory(
        arch, device, form, load.prompt_tokens + held, engine=engine, tensor_parallel=tensor_parallel,
        shared=load.cached_tokens,
    )  # fmt: skip
    slots = max_batch or MAX_BATCH[engine]
    return Setup(
        arch=arch,
        gpu=device,
        precision=form,
        engine=engine,
        tensor_parallel=tensor_parallel,
        cost=cost,
        eff=eff,
        max_batch=min(int(fitting), slots),
        slots=slots,
        chunk=chunk or CHUNK[engine],
        cache_tokens=fitting * (load.prompt_tokens - load.cached_tokens + held),
    )
