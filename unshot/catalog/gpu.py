"""One accelerator, and the number formats weights and caches come in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from unshot.errors import InputError, nearest

if TYPE_CHECKING:
    from unshot.case import OwnGpu

GIB = float(2**30)


class Gpu(Struct, frozen=True):
    """One device (a GPU, an Apple chip or a CPU).

    `memory` bytes, `bandwidth` bytes/s, `flops` dense peak operations/s by `fp16`, `fp8`, `int8` (only what the
    hardware has), `cores` SMs or cores, `clock` Hz, `link` bytes/s to a neighbour in one direction, `price` US$ per
    hour or None. `family` names the class its efficiencies are fitted for, `engine` the serving engine it usually
    runs (see `unshot.catalog.engines`).
    """

    name: str
    title: str
    family: str
    engine: str
    memory: float
    bandwidth: float
    flops: Mapping[str, float]
    cores: int
    clock: float
    link: float
    tdp: float | None
    source: str
    price: float | None
    price_source: str
    price_date: str
    aliases: tuple[str, ...] = ()
    # Share of the float peaks that is left when products are summed in fp32, as serving engines do (GeForce: half).
    fp32_sums: float = 1.0
    # Whether integer and float instructions run side by side (Apple's GPUs from M3 on).
    int_beside_float: bool = False
    # When the source was read, and what of the row no source that was read confirms.
    read: str = ""
    unconfirmed: str = ""
    # The cloud instance that it is part of, and how many such devices that has.
    instance: str = ""
    per_instance: int = 1

    @classmethod
    def from_catalog(cls, key: str, row: Mapping[str, Any]) -> Gpu:
        """A device from one table of `gpus.toml`."""
        return cls(
            name=key,
            title=row["title"],
            family=row["family"],
            engine=row["engine"],
            memory=row["memory_gib"] * GIB,
            bandwidth=row["bandwidth_gbs"] * 1e9,
            flops={kind: row[kind] * 1e12 for kind in ("fp16", "fp8", "int8") if kind in row},
            cores=row["cores"],
            clock=row["clock_ghz"] * 1e9,
            link=row.get("link_gbs", 16) * 1e9 / 2,
            tdp=row.get("tdp_w"),
            source=row["source"],
            price=row.get("price"),
            price_source=row.get("price_source", ""),
            price_date=row.get("price_date", ""),
            aliases=tuple(row.get("aliases", ())),
            fp32_sums=row.get("fp32_sums", 1.0),
            int_beside_float=row.get("int_beside_float", False),
            read=row.get("read", ""),
            unconfirmed=row.get("unconfirmed", ""),
        )

    def peak(self, compute: str) -> float:
        """Dense peak operations/s in `compute`; the fp16 rate where the hardware lacks that format."""
        return self.flops.get(compute, self.flops["fp16"])

    def served(self, compute: str) -> float:
        """The peak that a serving engine can use: float products are summed in fp32."""
        return self.peak(compute) * (1.0 if compute == "int8" and compute in self.flops else self.fp32_sums)


def own_gpu(name: str, own: OwnGpu) -> Gpu:
    """A device of the case file (`[gpu.NAME]`)."""
    row = {**own.plain(), "title": name, "source": "your case file", "price_source": "your case file"}
    return Gpu.from_catalog(name, {k: v for k, v in row.items() if v is not None})


class Precision(Struct, frozen=True):
    """How weights (`weight` bytes each), cache (`cache` bytes per element) and arithmetic (`compute`) are kept.

    `head` is the bytes per weight of embeddings and output head, which most formats keep wider.
    """

    name: str
    weight: float
    head: float
    cache: float
    compute: str
    note: str = ""
    # What a matrix-vector kernel spends to unpack one weight, in units of q4_k's (llama.cpp on Metal and CPU), by the
    # operations of a weight: q4_0 3.6, counted in ggml-metal.metal; q4_k 4.75 and q8_0 2.8, estimated from how the
    # types are packed, not read there; the others were not counted.
    unpack: float = 1.0


def _precisions() -> dict[str, Precision]:
    rows = [
        Precision("fp16", 2.0, 2.0, 2.0, "fp16", "fp16 or bf16 throughout"),
        Precision(
            "fp8",
            1.0,
            2.0,
            2.0,
            "fp8",
            "fp8 products (weight-only on cards without fp8); head in fp16",
        ),
        Precision("w8a8", 1.0, 2.0, 2.0, "int8", "int8 weights and activations; head and cache in fp16"),
        Precision("int8", 1.0, 2.0, 2.0, "fp16", "weight-only (W8A16); arithmetic, head and cache in fp16"),
        # 4 bits, and one fp16 scale and zero for each group of 128 (AWQ, GPTQ).
        Precision("int4", 0.53, 2.0, 2.0, "fp16", "W4A16, groups of 128; arithmetic in fp16"),
        # Bits per weight of the GGUF formats: block layouts in llama.cpp, ggml-common.h; k-quant mixtures as
        # the mean over a Llama-3-8B file (4.92 GB for q4_k_m, 5.73 q5_k_m, 6.60 q6_k, 8.54 q8_0).
        Precision("q8_0", 8.5 / 8, 8.5 / 8, 2.0, "fp16", "GGUF", unpack=0.6),
        Precision("q6_k", 6.5625 / 8, 6.5625 / 8, 2.0, "fp16", "GGUF"),
        Precision("q5_k_m", 5.7 / 8, 5.9 / 8, 2.0, "fp16", "GGUF"),
        Precision("q4_k_m", 4.83 / 8, 5.5 / 8, 2.0, "fp16", "GGUF"),
        Precision("q4_0", 4.5 / 8, 5.5 / 8, 2.0, "fp16", "GGUF", unpack=0.75),
        Precision("q3_k_m", 3.9 / 8, 5.0 / 8, 2.0, "fp16", "GGUF"),
        Precision("fp32", 4.0, 4.0, 2.0, "fp16", "weights in fp32"),
    ]
    return {row.name: row for row in rows}


PRECISIONS: dict[str, Precision] = _precisions()
_ALIASES = {
    "f16": "fp16", "bf16": "fp16", "float16": "fp16", "bfloat16": "fp16", "f32": "fp32", "float32": "fp32",
    "e4m3": "fp8", "fp8_e4m3": "fp8", "w8a16": "int8", "w4a16": "int4", "awq": "int4", "gptq": "int4", "nf4": "int4",
    "int4_awq": "int4", "w4a16_awq": "int4", "q8": "q8_0", "q4": "q4_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m",
    "w8a8_int8": "w8a8", "smoothquant": "w8a8",
}  # fmt: skip


def precision(name: str) -> Precision:
    """The number format called `name` (aliases such as `bf16` or `awq` included). Raises `InputError`."""
    key = name.strip().lower().replace("-", "_").replace(" ", "_")
    key = _ALIASES.get(key, key)
    if key not in PRECISIONS:
        raise InputError(f"unknown precision '{name}'; {nearest(key, PRECISIONS)}")
    return PRECISIONS[key]
