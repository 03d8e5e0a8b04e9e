"""Seconds of one scheduler iteration, from the model's shape and the device's data sheet.

A roofline by phase (Williams et al., "Roofline", CACM 2009; Kwon et al., "vLLM", SOSP 2023 for the serving loop):
an iteration reads the weights once, multiplies every token of it with them, reads the cached keys and values of
each decoding sequence, and pays a launch. Four efficiencies per device family say how much of the data sheet is
reached, and what an engine adds on the host; they are catalog data (`efficiency.toml`), fitted by
`planner.latency.fit`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from unshot.catalog import Architecture, Engine, Gpu, Precision
from unshot.catalog.tables import table

# Engine-wide constants: not fitted per class. How they were chosen stands in docs/capacity.md.
SMOOTH = 2.0  # exponent that joins the two roofs of one matrix product
ATTENTION_PREFILL = 0.5  # share of the fp16 peak that flash attention reaches in prefill
UBATCH_LAUNCHES = 10.0  # llama.cpp: prefill launches per ubatch and layer, in units of a decode step's
WEIGHT_ONLY = (
    1.3  # time of a product whose weights are unpacked to fp16 first, in units of the plain fp16 product
)
QUANTISED_PREFILL = (
    0.2  # Metal and CPU: what unpacking q4_k's weights adds to a prefill product, fp16's time = 1
)
WORKSPACE = 2e9 / 4096  # bytes of activations and workspace by hidden size
CORE_SMOOTH = 4.0  # exponent that joins the memory's and the cores' bandwidth limits
ALLREDUCE_LATENCY = 12e-6  # s, NCCL small-message all-reduce inside one node
LINK_SHARE = 0.4  # share of a link's bandwidth that an all-reduce of activations reaches
# A board with less power per operation than its family's fitted ones slows by this power of the ratio.
POWER = 0.8

Number = Any  # float or numpy array


class Efficiency(Struct, frozen=True):
    """How much of a data sheet one device family reaches with one kind of kernels: the four fitted numbers.

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


class Overhead(Struct, frozen=True):
    """What one engine adds to its kernels: factors on a family's efficiency, and costs on the host in seconds.

    `compute`, `bandwidth` multiply the efficiency's, `step` its seconds per layer. `sequence`: host time per running
    sequence and iteration (sampling, detokenising, scheduling). `request`: host time per request that no other
    request overlaps (it bounds requests per second). `accept`: what passes, overlapped, between a request's arrival at
    a server and its prefill, and from its first token to the client (HTTP, tokenising). `spread`: relative standard
    deviation of one forecast of throughput or ITL, `spread_first` of one of TTFT, both from rows left out of the fit;
    `rows` fitted, 0 if none are known.
    """

    compute: float = 1.0
    bandwidth: float = 1.0
    step: float = 1.0
    sequence: float = 0.0
    request: float = 0.0
    accept: float = 0.0
    spread: float = 0.35
    spread_first: float = 0.7
    rows: int = 0
    families: tuple[str, ...] = ()
    how: str = ""


@functools.cache
def _efficiencies() -> dict[tuple[str, str], Efficiency]:
    return {
        (kernels, family): Efficiency(**{**row, "errors": tuple(row["errors"])})
        for kernels, families in table("efficiency")["family"].items()
        for family, row in families.items()
    }


@functools.cache
def overheads() -> dict[str, Overhead]:
    """The fitted overhead of every engine."""
    rows = table("efficiency")["engine"]
    return {name: Overhead(**{**row, "families": tuple(row["families"])}) for name, row in rows.items()}


# Relative standard deviation that a forecast has more if no row of the family, or none of a model spread over several
# devices or made of experts, was fitted.
UNKNOWN_FAMILY, UNKNOWN_KIND = 0.25, 0.2


def family_efficiency(gpu: Gpu, kernels: str) -> Efficiency:
    """The fitted numbers for a device's family, whatever the engine; a family without rows gets the pooled ones."""
    found = _efficiencies()
    return found.get((kernels, gpu.family)) or found[kernels, pool(gpu, kernels)]


def efficiency(gpu: Gpu, engine: Engine) -> Efficiency:
    """The fitted numbers for a device's family with an engine; a family without rows gets the pooled ones.

    `spread` is the engine's own, wider where the engine has no rows of that family.
    """
    own = family_efficiency(gpu, engine.kernels)
    added = overheads().get(engine.name)
    if added is None:  # llama.cpp: the family's fit is the engine's
        return own
    spread = added.spread if gpu.family in added.families else math.hypot(added.spread, UNKNOWN_FAMILY)
    return replace(
        own,
        compute=own.compute * added.compute,
        bandwidth=own.bandwidth * added.bandwidth,
        third=own.third * added.bandwidth,
        step=own.step * added.step,
        spread=spread,
    )


def spread_of(eff: Efficiency, arch: Architecture, tensor_parallel: int) -> float:
    """Relative standard deviation of a forecast: the engine's, wider for kinds of models that none was fitted on."""
    return math.hypot(eff.spread, UNKNOWN_KIND) if tensor_parallel > 1 or arch.experts else eff.spread


def pool(gpu: Gpu, kernels: str) -> str:
    """Name of the pooled class a family without own rows falls back to."""
    if kernels == "llamacpp" and gpu.family in {"apple", "cpu"}:
        return gpu.family
    return "pooled"


class StepCost(Struct, frozen=True):
    """Coefficients of one iteration's time, seconds each.

    `fixed` per iteration; `weights` to read the dense weights; `experts` to read all experts (`routed` = top-k
    over number of experts); `head` to read the output head; `token` arithmetic per token; `move` activation
    traffic per token; `sampled` output-head arithmetic per sampled position; `sequence` host time per sampled
    position; `context` per cached token read in decode; `pair` per query-key pair in prefill; `chunk` extra per
    prefill chunk. With speculative decoding each sequence puts `wide` tokens through an iteration and `gain` of them
    become answer: an iteration is counted as `gain` shorter ones of one token each.
    """

    fixed: Number = 0.0
    weights: Number = 0.0
    experts: Number = 0.0
    routed: Number = 1.0
    head: Number = 0.0
    token: Number = 0.0
    move: Number = 0.0
    sampled: Number = 0.0
    sequence: Number = 0.0
    context: Number = 0.0
    pair: Number = 0.0
    chunk: Number = 0.0
    wide: Number = 1.0
    gain: Number = 1.0

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
        samples = sequences * self.wide + prompts
        tokens = prefill + sequences * self.wide
        touched = 1.0 - (1.0 - self.routed) ** np.maximum(tokens, 1.0)
        read = self.weights + self.experts * touched
        linear = np.hypot(read, tokens * self.token)
        head = np.hypot(self.head, samples * self.sampled)
        rest = tokens * self.move + context * self.context + pairs * self.pair + chunks * self.chunk
        rest = rest + (sequences + prompts) * self.sequence
        whole = self.fixed + linear + head + rest
        if isinstance(self.gain, float) and self.gain == 1.0:
            return whole
        # What decoding alone takes brings `gain` tokens, so a token's share of it is counted.
        alone = replace(self, gain=1.0).step(0.0, 0.0, sequences, context)
        return whole - np.where(np.asarray(sequences) > 0, alone, 0.0) * (1.0 - 1.0 / self.gain)

    def scaled(self, speed: Number) -> StepCost:
        """The same device running `speed` times as fast."""
        return StepCost(
            **{
                name: getattr(self, name) / (1.0 if name in ("routed", "wide", "gain") else speed)
                for name in self.__struct_fields__
            }
        )


class Draft(Struct, frozen=True):
    """Speculative decoding: `tokens` drafted per iteration, each accepted with probability `acceptance` if those before
    it were, at `share` of the time of the model's own iteration."""

    tokens: int
    acceptance: float
    share: float

    @property
    def gain(self) -> float:
        """Answer tokens per iteration: Leviathan, Kalman, Matias, ICML 2023, equation 1."""
        a = self.acceptance
        return self.tokens + 1.0 if a >= 1.0 else (1.0 - a ** (self.tokens + 1)) / (1.0 - a)


def cost_of(
    arch: Architecture,
    gpu: Gpu,
    precision: Precision,
    *,
    engine: Engine,
    eff: Efficiency,
    tensor_parallel: int = 1,
    cache_element: float | None = None,
    overhead: Overhead | None = None,
    draft: Draft | None = None,
) -> StepCost:
    """Step coefficients of a model on `tensor_parallel` devices; `cache_element` bytes per key or value element."""
    dense = arch.linear_params - arch.layers * max(0, arch.experts) * arch.expert_params
    experts = arch.linear_params - dense if arch.experts else 0
    routed = arch.experts_per_token / arch.experts if arch.experts else 1.0
    kernels = _batched if engine.kernels == "batched" else _llamacpp
    found = kernels(arch, gpu, precision, eff, precision.cache if cache_element is None else cache_element)
    # Activations that are scaled to fp8 as they come cost a pass of their own before each product.
    slower = engine.fp8 if precision.compute == "fp8" and "fp8" in gpu.flops else 1.0
    added = overhead or overheads().get(engine.name, Overhead())
    shards = float(tensor_parallel)
    fixed, move = eff.step * arch.layers, found.move
    half = gpu.served("fp16") if engine.kernels == "batched" else gpu.peak("fp16")
    if tensor_parallel > 1:
        # Two all-reduces of the hidden state a layer, ring volume 2(n-1)/n, fp16.
        volume = 2 * arch.layers * arch.hidden * 2.0 * 2 * (shards - 1) / shards
        move = move / shards + volume / (max(gpu.link, 8e9) * LINK_SHARE)
        fixed += 2 * arch.layers * ALLREDUCE_LATENCY
    weights = dense * found.weight / shards
    if draft is not None:
        fixed += draft.tokens * draft.share * (fixed + weights)
    return StepCost(
        fixed=fixed,
        weights=weights,
        experts=experts * found.weight / shards,
        routed=routed,
        head=arch.head_params * precision.head * found.head_byte / shards,
        token=2.0 * arch.active_params * found.operation / slower / shards,
        move=move,
        sampled=2.0 * arch.head_params / (half * found.reached) / shards,
        sequence=added.sequence,
        context=arch.kv_elements * found.context / shards,
        pair=4.0 * arch.heads * arch.head_dim * arch.layers / (half * ATTENTION_PREFILL) / shards,
        chunk=found.chunk,
        wide=1.0 if draft is None else draft.tokens + 1.0,
        gain=1.0 if draft is None else draft.gain,
    )


class Kernels(Struct, frozen=True):
    """Seconds per unit of work: `weight` read, `operation` done, `head_byte` read, cache element read (`context`),
    activation traffic of a token over all layers (`move`), prefill chunk; `reached` share of the fp16 peak."""

    weight: float
    operation: float
    head_byte: float
    context: float
    move: float
    chunk: float
    reached: float


def _batched(
    arch: Architecture, gpu: Gpu, precision: Precision, eff: Efficiency, cache_element: float
) -> Kernels:
    reached = eff.reached(gpu)
    bandwidth = gpu.bandwidth * eff.bandwidth
    # Elementwise work between the products: about 14 hidden-sized and 3 MLP-sized reads or writes of a byte
    # (fp8) to two bytes (fp16) per token and layer.
    width = arch.intermediate * max(1, arch.experts_per_token) + arch.shared_intermediate
    weight_only = precision.weight < 2.0 and (
        precision.compute == "fp16" or precision.compute not in gpu.flops
    )
    return Kernels(
        weight=precision.weight / bandwidth,
        operation=(WEIGHT_ONLY if weight_only else 1.0) / (gpu.served(precision.compute) * reached),
        head_byte=1.0 / bandwidth,
        context=cache_element / (gpu.bandwidth * eff.third),
        move=arch.layers * (14 * arch.hidden + 3 * width) / bandwidth,
        chunk=0.0,
        reached=reached,
    )


def _llamacpp(
    arch: Architecture, gpu: Gpu, precision: Precision, eff: Efficiency, cache_element: float
) -> Kernels:
    bandwidth = gpu.bandwidth * eff.bandwidth
    cores = gpu.cores * gpu.clock * eff.third
    quantised = precision.weight < 2.0
    unpack = 0.0
    if gpu.family in {"apple", "cpu"}:
        # Unpacking quantised weights costs arithmetic that the memory hides in part.
        unpack = precision.unpack / cores if quantised else 0.0
    else:
        # Bytes in flight per SM bound what a matrix-vector kernel can draw (Little's law).
        bandwidth = (bandwidth**-CORE_SMOOTH + cores**-CORE_SMOOTH) ** (-1 / CORE_SMOOTH)
    half = gpu.peak("fp16") * eff.compute
    slower, unpacked = 1.0, 0.0
    if quantised and gpu.family in {"apple", "cpu"}:
        # The product's own kernel unpacks: beside its arithmetic where integer pipelines run in parallel.
        added = QUANTISED_PREFILL * precision.unpack
        slower = math.hypot(1.0, added) if gpu.int_beside_float else 1.0 + added
    elif quantised:
        # A pass per ubatch reads the quantised weights and writes them as fp16, for cuBLAS to multiply with.
        unpacked = arch.linear_params * (precision.weight + 2.0) / bandwidth
    return Kernels(
        weight=math.hypot(precision.weight / bandwidth, unpack),
        operation=slower / half,
        head_byte=1.0 / bandwidth,
        context=cache_element / bandwidth,
        move=0.0,
        chunk=UBATCH_LAUNCHES * eff.step * arch.layers + unpacked,
        reached=eff.compute,
    )


def weight_bytes(arch: Architecture, precision: Precision) -> float:
    """Bytes of all weights on the device, embeddings and head in the format's wider type."""
    embeddings = arch.head_params * (1 if arch.tied else 2)
    return arch.linear_params * precision.weight + embeddings * precision.head


def cache_room(
    arch: Architecture, gpu: Gpu, precision: Precision, *, engine: Engine, tensor_parallel: int = 1
) -> float:
    """Bytes left for the cache beside weights and workspace; below zero where the weights do not fit.

    1.5% of the memory goes to the driver (Apple's GPU may use three quarters of the shared memory); activations and
    workspace grow with the hidden size (2 GB at 4,096), at most 6% of the memory (llama.cpp: 0.5 GB). The engine
    takes its share of the whole memory or of what weights leave (`engines.toml`).
    """
    share = engine.memory if engine.memory_of == "total" else 1.0
    usable = gpu.memory * min(share, 0.75 if gpu.family == "apple" else 0.985)
    workspace = min(WORKSPACE * arch.hidden, 0.06 * gpu.memory) if engine.kernels == "batched" else 0.5e9
    left = tensor_parallel * (usable - workspace) - weight_bytes(arch, precision)
    return left * (engine.memory if engine.memory_of == "free" else 1.0)
