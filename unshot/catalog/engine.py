"""Serving engines: what of a scheduler's limits a forecast needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from unshot.catalog.gpu import GIB, Gpu


class Large(Struct, frozen=True):
    """Limits that hold on devices with at least `memory_gib`, `but` for those whose names begin with one of these."""

    memory_gib: float
    chunk: int
    sequences: int
    but: tuple[str, ...] = ()


class Engine(Struct, frozen=True):
    """One serving engine; docs of the fields stand in `engines.toml`."""

    name: str
    title: str
    kernels: str
    chunk: int
    sequences: int
    memory: float
    memory_of: str
    block: int
    source: str
    date: str
    cache_fp8: bool = False
    aliases: tuple[str, ...] = ()
    large: Large | None = None

    @classmethod
    def from_catalog(cls, key: str, row: Mapping[str, Any]) -> Engine:
        """An engine from one table of `engines.toml`."""
        values = {**row, "aliases": tuple(row.get("aliases", ()))}
        if "large" in row:
            values["large"] = Large(**{**row["large"], "but": tuple(row["large"].get("but", ()))})
        return cls(name=key, **values)

    def limits(self, gpu: Gpu) -> tuple[int, int]:
        """`(prefill tokens of one iteration, most sequences at once)` on a device, by the engine's own defaults."""
        large = self.large
        if large and gpu.memory >= large.memory_gib * GIB and not gpu.name.startswith(large.but):
            return large.chunk, large.sequences
        return self.chunk, self.sequences
