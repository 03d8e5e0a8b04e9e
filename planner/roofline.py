"""Seconds of one scheduler iteration, from the model's shape and the device's data sheet.

A roofline by phase (Williams et al., "Roofline", CACM 2009; Kwon et al., "vLLM", SOSP 2023 for the serving loop):
an iteration reads the weights once, multiplies every token of it with them, reads the cached keys and values of
each decoding sequence, and pays a launch. Four efficiencies per device family say how much of the data sheet is
reached; they are catalog data (`efficiency.toml`), fitted by `planner.fit`.

Every field of `StepCost` may be a float or an array: one code path serves a single forecast and a sweep.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from unshot.catalog import Architecture, Gpu, Precision
from unshot.catalog.tables import table
from unshot.errors import InputError, nearest

ENGINES = ("batched", "llamacpp")

# Engine-wide constants: not fitted per class. How they were chosen stands in docs/capacity.md.
SMOOTH = 2.0  # exponent that joins the two roofs of one matrix product
ATTENTION_PREFILL = 0.5  # share of the fp16 peak that flash attention reaches in prefill
UBATCH_LAUNCHES = 10.0  # llama.cpp: prefill launches per ubatch and layer, in units of a decode step's
QUANTISED_PREFILL = 1.2  # llama.cpp: cost of a prefill product with quantised weights, fp16 = 1
WORKSPACE = 2e9 / 4096  # bytes of activations and workspace by hidden size
CORE_SMOOTH = 4.0  # exponent that joins the memory's and the cores' bandwidth limits
ALLREDUCE_LATENCY = 12e-6  # s, NCCL small-message all-reduce inside one node
LINK_SHARE = 0.4  # share of a link's bandwidth that an all-reduce of activations reaches
# A board with less power per operation than its family's fitted ones slows by this power of the ratio.
POWER = 0.8

Number = Any  # float or numpy array


class Efficiency(Struct, frozen=True):
    """How much of a data sheet one device family reaches with one engine: the four fitted numbers.

    `compute`: share of the dense peak in matrix products. `bandwidth`: share of the memory bandwidth when weights
    are read. `third` and `step`: for `batched` the share of the bandwidth when the cache is read by decode
    attention, and seconds of overhead per layer and iteration; for `llamacpp` bytes (CUDA) or quantised weights
    (Metal, CPU) one core handles per clock, and seconds of launch per layer and iteration.
    `errors` are relative standard errors of the four, `spread` the relative standard deviation left in one
    forecast, `rows` how many measured rows were fitted (0: taken over from other families). `watts` is the fitted
    devices' board power over their fp16 peak, W per 1e12 operations/s (data sheets; 0: not known).
    """

    compute: float
    bandwidth: float
    third: float
    step: float
    errors: tuple[float, float, float, float] = (0.3, 0.2, 0.2, 0.3)
    spread: float = 0.25
    rows: int = 0
    how: str = ""
    watts: float = 0.0

    def reached(self, gpu: Gpu) -> float:
        """Share of the peak in matrix products on one device: less where its board has less power to spend on them."""
        if not self.watts or gpu.tdp is None:
            return self.compute
        return self.compute * min(1.0, gpu.tdp / gpu.peak("fp16") * 1e12 / self.watts) ** POWER

    def vector(self) -> np.ndarray:
        """The four numbers as natural logarithms, shape (4,)."""
        return np.log([self.compute, self.bandwidth, self.third, self.step])

    def with_vector(self, logs: np.ndarray) -> Efficiency:
        """The same record with other numbers, given as logarithms, shape (4,)."""
        c, b, t, s = (float(x) for x in np.exp(logs))
        return replace(self, compute=c, bandwidth=b, third=t, step=s)


@functools.cache
def _efficiencies() -> dict[tuple[str, str], Efficiency]:
    found = {}
    for engine, families in table("efficiency").items():
        if not isinstance(families, dict):
            continue
        for family, row in families.items():
            row = dict(row)
            row["errors"] = tuple(row["errors"])
            found[engine, family] = Efficiency(**row)
    return found


def efficiency(gpu: Gpu, engine: str | None = None) -> Efficiency:
    """The fitted numbers for a device's family; a family without rows gets its engine's pooled ones."""
    engine = engine or gpu.engine
    if engine not in ENGINES:
        raise InputError(f"unknown engine '{engine}'; {nearest(engine, ENGINES)}")
    found = _efficiencies()
    return found.get((engine, gpu.family)) or found[engine, pool(gpu, engine)]


def pool(gpu: Gpu, engine: str) -> str:
    """Name of the pooled class a family without own rows falls back to."""
    if engine == "llamacpp" and gpu.family in {"apple", "cpu"}:
        return gpu.family
    return "pooled"


class StepCost(Struct, frozen=True):
    """Coefficients of one iteration's time, seconds each.

    `fixed` per iteration; `weights` to read the dense weights; `experts` to read all experts (`routed` = top-k
    over number of experts); `head` to read the output head; `token` arithmetic per token; `move` activation
    traffic per token; `sampled` output-head arithmetic per sampled position; `context` per cached token read in
    decode; `pair` per query-key pair in prefill; `chunk` extra per prefill chunk.
    """

    fixed: Number = 0.0
    weights: Number = 0.0
    experts: Number = 0.0
    routed: Number = 1.0
    head: Number = 0.0
    token: Number = 0.0
    move: Number = 0.0
    sampled: Number = 0.0
    context: Number = 0.0
    pair: Number = 0.0
    chunk: Number = 0.0

    def step(
        self,
        prefill: Number,
        pairs: Number,
        sequences: Number,
        context: Number,
        *,
        prompts: Number = 0.0,
        chunks: Number = 0.0,
    ) -> Number:
        """Seconds of an iteration.

        `prefill` prompt tokens, `pairs` query-key pairs among them, `prompts` of which the last token is sampled,
        `sequences` decoding one token each over `context` cached tokens in all, `chunks` prefill chunks.
        """
        tokens = prefill + sequences
        touched = 1.0 - (1.0 - self.routed) ** np.maximum(tokens, 1.0)
        read = self.weights + self.experts * touched
        linear = np.hypot(read, tokens * self.token)
        head = np.hypot(self.head, (sequences + prompts) * self.sampled)
        rest = tokens * self.move + context * self.context + pairs * self.pair + chunks * self.chunk
        return self.fixed + linear + head + rest

    def scaled(self, speed: Number) -> StepCost:
        """The same device running `speed` times as fast."""
        return StepCost(
            **{
                name: getattr(self, name) / (1.0 if name == "routed" else speed)
                for name in self.__struct_fields__
            }
        )


def columns(records: Sequence[Any]) -> dict[str, np.ndarray]:
    """The fields of records as arrays, shape `(len(records),)`, to make one record of arrays from."""
    return {
        name: np.array([float(getattr(r, name)) for r in records]) for name in records[0].__struct_fields__
    }


def cost_of(
    arch: Architecture,
    gpu: Gpu,
    precision: Precision,
    *,
    engine: str | None = None,
    eff: Efficiency | None = None,
    tensor_parallel: int = 1,
) -> StepCost:
    """Step coefficients of a model on `tensor_parallel` devices."""
    engine = engine or gpu.engine
    eff = eff or efficiency(gpu, engine)
    dense = arch.linear_params - arch.layers * max(0, arch.experts) * arch.expert_params
    experts = arch.linear_params - dense if arch.experts else 0
    routed = arch.experts_per_token / arch.experts if arch.experts else 1.0
    reached = eff.reached(gpu) if engine == "batched" else eff.compute
    half = gpu.peak("fp16") * reached
    pair = 4.0 * arch.heads * arch.head_dim * arch.layers / (gpu.peak("fp16") * ATTENTION_PREFILL)
    shards = float(tensor_parallel)
    if engine == "batched":
        bandwidth = gpu.bandwidth * eff.bandwidth
        arithmetic = gpu.peak(precision.compute) * reached
        # Elementwise work between the products: about 14 hidden-sized and 3 MLP-sized reads or writes of a byte
        # (fp8) to two bytes (fp16) per token and layer.
        width = arch.intermediate * max(1, arch.experts_per_token) + arch.shared_intermediate
        moved = arch.layers * (14 * arch.hidden + 3 * width)
        weights, expert_read = dense * precision.weight / bandwidth, experts * precision.weight / bandwidth
        context = arch.kv_elements * precision.cache / (gpu.bandwidth * eff.third)
        token, move, chunk = 2.0 * arch.active_params / arithmetic, moved / bandwidth, 0.0
    else:
        bandwidth = gpu.bandwidth * eff.bandwidth
        cores = gpu.cores * gpu.clock * eff.third
        quantised = precision.weight < 2.0
        unpack = 0.0
        if gpu.family in {"apple", "cpu"}:
            # Unpacking quantised weights costs arithmetic that the memory hides in part.
            unpack = 1.0 / cores if quantised else 0.0
        else:
            # Bytes in flight per SM bound what a matrix-vector kernel can draw (Little's law).
            bandwidth = (bandwidth**-CORE_SMOOTH + cores**-CORE_SMOOTH) ** (-1 / CORE_SMOOTH)
        weights = dense * math.hypot(precision.weight / bandwidth, unpack)
        expert_read = experts * math.hypot(precision.weight / bandwidth, unpack)
        context = arch.kv_elements * precision.cache / bandwidth
        token = 2.0 * arch.active_params / half * (QUANTISED_PREFILL if quantised else 1.0)
        move, chunk = 0.0, UBATCH_LAUNCHES * eff.step * arch.layers
    fixed = eff.step * arch.layers
    if tensor_parallel > 1:
        # Two all-reduces of the hidden state a layer, ring volume 2(n-1)/n, fp16.
        volume = 2 * arch.layers * arch.hidden * 2.0 * 2 * (shards - 1) / shards
        move = move / shards + volume / (max(gpu.link, 8e9) * LINK_SHARE)
        fixed += 2 * arch.layers * ALLREDUCE_LATENCY
    return StepCost(
        fixed=fixed,
        weights=weights / shards,
        experts=expert_read / shards,
        routed=routed,
        head=arch.head_params * precision.head / bandwidth / shards,
        token=token / shards,
        move=move,
        sampled=2.0 * arch.head_params / half / shards,
        context=context / shards,
        pair=pair / shards,
        chunk=chunk,
    )


def weight_bytes(arch: Architecture, precision: Precision) -> float:
    """Bytes of all weights on the device, embeddings and head in the format's wider type."""
    embeddings = arch.head_params * (1 if arch.tied else 2)
    return arch.linear_params * precision.weight + embeddings * precision.head


def cache_bytes(arch: Architecture, precision: Precision, tokens: float) -> float:
    """Bytes of cache one sequence of `tokens` tokens holds (sliding windows keep only their window)."""
    return arch.kv_elements * precision.cache * arch.cached_tokens(tokens)


def cache_room(
    arch: Architecture, gpu: Gpu, precision: Precision, *, engine: str | None = None, tensor_parallel: int = 1
) -> float:
    """Bytes left for the cache beside weights and workspace; below zero where the weights do not fit.

    1.5% of the memory goes to the driver; activations and workspace grow with the hidden size (2 GB at 4,096), at
    most 6% of the memory (llama.cpp: 0.5 GB). Of what is left the engine takes 95%, as the published runs do. Apple's
    GPU may use three quarters of the shared memory.
    """
    engine = engine or gpu.engine
    usable = gpu.memory * (0.75 if gpu.family == "apple" else 0.985)
    workspace = min(WORKSPACE * arch.hidden, 0.06 * gpu.memory) if engine == "batched" else 0.5e9
    return (tensor_parallel * (usable - workspace) - weight_bytes(arch, precision)) * 0.95


def requests_in_memory(
    arch: Architecture,
    gpu: Gpu,
    precision: Precision,
    tokens: float,
    *,
    engine: str | None = None,
    tensor_parallel: int = 1,
    shared: float = 0.0,
) -> float:
    """How many sequences of `tokens` tokens (prompt and answer) the memory holds at once; 0 where none.

    `shared` prefix tokens are kept once for all sequences (prefix caching).
    """
    room = cache_room(arch, gpu, precision, engine=engine, tensor_parallel=tensor_parallel)
    each = cache_bytes(arch, precision, tokens)
    if shared:
        room -= cache_bytes(arch, precision, shared)
        each -= cache_bytes(arch, precision, shared)
    return max(0.0, room) / max(each, 1.0)
