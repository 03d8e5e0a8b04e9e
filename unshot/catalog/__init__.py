"""The catalog: model architectures, accelerators and serving engines, as frozen data with source and date."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from unshot.catalog.architecture import Architecture, architecture_from_config
from unshot.catalog.gpu import GIB, PRECISIONS, Gpu, Precision, precision
from unshot.catalog.tables import table
from unshot.data.files import read_object
from unshot.errors import InputError, nearest

__all__ = [
    "PRECISIONS", "Architecture", "Engine", "Gpu", "Precision", "architecture_from_config", "engine", "engines", "gpu",
    "gpus", "model", "models", "precision", "read_architecture", "use_own",
]  # fmt: skip

# Devices and models of a case file, which go before the catalog's; set by `use_own`.
_OWN_GPUS: dict[str, Gpu] = {}
_OWN_MODELS: dict[str, Architecture] = {}

# Words of a maker's or a driver's (NVML) name that tell no device from another.
_NOISE = {
    "nvidia", "geforce", "apple", "amd", "instinct", "tesla", "gpu", "gen", "generation", "edition", "server",
    "workstation", "blackwell", "oam", "radeon", "accelerator",
}  # fmt: skip


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
    fp8: float = 0.8
    unconfirmed: str = ""
    lacks: Mapping[str, list[str]] = {}
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


@functools.cache
def models() -> dict[str, Architecture]:
    """Every model of the catalog by its key (`llama-3.1-8b`)."""
    rows = table("models")
    same = {key: {**rows[row["like"]], "aliases": (), "source": "", "unconfirmed": "", **row} if "like" in row else row
            for key, row in rows.items()}  # fmt: skip
    return {key: Architecture.from_catalog(key, row) for key, row in same.items()}


@functools.cache
def gpus() -> dict[str, Gpu]:
    """Every accelerator of the catalog by its key (`h100-sxm`)."""
    return {key: Gpu.from_catalog(key, row) for key, row in table("gpus").items()}


# For the case file's key: the engines that can be named.
ENGINE_NAMES = tuple(table("engines"))


@functools.cache
def engines() -> dict[str, Engine]:
    """Every serving engine of the catalog by its key (`vllm`)."""
    return {key: Engine.from_catalog(key, row) for key, row in table("engines").items()}


def engine(name: str) -> Engine:
    """The engine called `name`, a version after a dash left aside (`vllm-0.11`). Raises `InputError`."""
    text = re.sub(r"[-_ ]v?\d[\w.]*$", "", name.strip().lower())
    for one in engines().values():
        if text in (one.name, *one.aliases):
            return one
    raise InputError(f"unknown engine '{name}'; {nearest(text, engines())}")


def model(name: str) -> Architecture:
    """The architecture called `name`: a key, a repository name (`meta-llama/Llama-3.1-8B-Instruct`) or an alias.

    Raises `InputError` with the nearest names for an unknown one.
    """
    if name in _OWN_MODELS:
        return _OWN_MODELS[name]
    path = Path(name).expanduser()
    if path.suffix == ".json" or (path.is_dir() and (path / "config.json").is_file()):
        return read_architecture(path)
    found = _model_index().get(_plain_model(name))
    if found is None:
        known = [*models(), *_OWN_MODELS]
        raise InputError(
            f"unknown model '{name}'; {nearest(name, known)} Or give its directory or config.json"
        )
    return models()[found]


def gpu(name: str) -> Gpu:
    """The accelerator called `name`: a key or a maker's way to write it (`H100-SXM-80GB`, `RTX 3090 24GB`).

    Raises `InputError` with the nearest names for an unknown one.
    """
    if name in _OWN_GPUS:
        return _OWN_GPUS[name]
    if name.strip().lower() in table("instances"):
        return _of_instance(name.strip().lower())
    words = _gpu_words(name)
    index = _gpu_index()
    # The memory size tells some variants apart (A100 40/80); where it does not, it is only decoration.
    for candidate in (words, tuple(w for w in words if not w.isdigit() or w not in _sizes(name))):
        if candidate in index:
            return gpus()[index[candidate]]
    raise InputError(f"unknown GPU '{name}'; {nearest(name, [*gpus(), *_OWN_GPUS])}")


def _of_instance(name: str) -> Gpu:
    """One device of a cloud instance, at its share of the instance's price where the catalog has that."""
    row = table("instances")[name]
    device = replace(gpus()[row["gpu"]], instance=name, per_instance=row["count"])
    if "price" not in row:
        return device
    region, price = next(iter(row["price"].items()))
    return replace(
        device,
        price=price / row["count"],
        price_source=f"{name} in {region}, 1/{row['count']} of ${price:g}; {row['source']}",
        price_date=row["date"],
    )


def use_own(gpus: Mapping[str, Gpu], models: Mapping[str, Architecture]) -> None:
    """Let a case file's own devices and models be found by name, before the catalog's; replaces earlier ones."""
    _OWN_GPUS.clear()
    _OWN_GPUS.update(gpus)
    _OWN_MODELS.clear()
    _OWN_MODELS.update(models)


def read_architecture(path: Path) -> Architecture:
    """The architecture of a `config.json` or of the directory that holds it. Raises `InputError`."""
    file = path / "config.json" if path.is_dir() else path
    config = read_object(file, wanted="not a JSON object", advice="; give a model's config.json")
    named = replace(architecture_from_config(config, name=str(file)), name=file.resolve().parent.name)
    return named


@functools.cache
def _model_index() -> dict[str, str]:
    index: dict[str, str] = {}
    for key, arch in models().items():
        for alias in (key, arch.repo, *arch.aliases):
            index.setdefault(_plain_model(alias), key)
    return index


def _plain_model(name: str) -> str:
    text = name.strip().lower().rsplit("/", 1)[-1]
    text = re.sub(r"[-_ ](instruct|chat|hf|it|pt|base|bf16|4k)(?=$|[-_ ])", "", text)
    text = re.sub(r"[-_ ](2407|2501|v0\.[23])$", "", text)
    text = re.sub(r"[-_ ]v(?=\d+(\.\d+)?[-_ ]\d)", "", text.replace("meta-llama", "llama"))
    return re.sub(r"[-_ ]", "", text)


@functools.cache
def _gpu_index() -> dict[tuple[str, ...], str]:
    index: dict[tuple[str, ...], str] = {}
    for key, item in gpus().items():
        for alias in (key, *item.aliases, item.title):
            index.setdefault(_gpu_words(alias), key)
    for key in gpus():
        if key.startswith("rtx-"):  # benchmark tables write a bare `3090`
            index.setdefault(_gpu_words(key.removeprefix("rtx-")), key)
    return index


def _sizes(name: str) -> set[str]:
    """The numbers in `name` that are memory sizes: `80` of `80GB`."""
    return set(re.findall(r"(\d+)\s*gi?b", name.lower()))


def _gpu_words(name: str) -> tuple[str, ...]:
    text = re.sub(r"(\d+)\s*gi?b\b", r" \1 ", name.strip().lower())
    text = re.sub(r"\b(sxm|nvl|pcie|hbm)\d?e?\b", lambda m: m[1] if m[1] != "hbm" else " ", text)
    text = re.sub(r"(rtx|gtx)(?=\d)", r"\1 ", text)
    text = re.sub(r"(?<=\d)(ti|super)\b", r" \1", text)
    words = re.findall(r"[a-z]+\d+[a-z]*|\d+[a-z]*|[a-z]+", text)
    return tuple(sorted(w for w in words if w not in _NOISE))
