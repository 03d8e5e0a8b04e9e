"""The catalog: model architectures and accelerators, as frozen data with source and date.

Only the standard library is imported: `unshot plan` reads this on a cold start.
"""

from __future__ import annotations

import functools
import re

from unshot.catalog.architecture import Architecture, architecture_from_config
from unshot.catalog.gpu import PRECISIONS, Gpu, Precision, precision
from unshot.catalog.tables import table
from unshot.errors import InputError, nearest

__all__ = [
    "PRECISIONS", "Architecture", "Gpu", "Precision", "architecture_from_config", "gpu", "gpus", "model",
    "models", "precision",
]  # fmt: skip

_NOISE = {"nvidia", "geforce", "apple", "amd", "instinct", "tesla", "gpu", "gen"}


@functools.cache
def models() -> dict[str, Architecture]:
    """Every model of the catalog by its key (`llama-3.1-8b`)."""
    return {key: Architecture.from_catalog(key, row) for key, row in table("models").items()}


@functools.cache
def gpus() -> dict[str, Gpu]:
    """Every accelerator of the catalog by its key (`h100-sxm`)."""
    return {key: Gpu.from_catalog(key, row) for key, row in table("gpus").items()}


def model(name: str) -> Architecture:
    """The architecture called `name`: a key, a repository name (`meta-llama/Llama-3.1-8B-Instruct`) or an alias.

    Raises `InputError` with the nearest names for an unknown one.
    """
    found = _model_index().get(_plain_model(name))
    if found is None:
        raise InputError(f"unknown model '{name}'; {nearest(name, models())}")
    return models()[found]


def gpu(name: str) -> Gpu:
    """The accelerator called `name`: a key or a maker's way to write it (`H100-SXM-80GB`, `RTX 3090 24GB`).

    Raises `InputError` with the nearest names for an unknown one.
    """
    words = _gpu_words(name)
    index = _gpu_index()
    # The memory size tells some variants apart (A100 40/80); where it does not, it is only decoration.
    for candidate in (words, tuple(w for w in words if not w.isdigit() or w not in _sizes(name))):
        if candidate in index:
            return gpus()[index[candidate]]
    raise InputError(f"unknown GPU '{name}'; {nearest(name, gpus())}")


@functools.cache
def _model_index() -> dict[str, str]:
    index: dict[str, str] = {}
    for key, arch in models().items():
        for alias in (key, arch.repo, *arch.aliases):
            index.setdefault(_plain_model(alias), key)
    return index


def _plain_model(name: str) -> str:
    text = name.strip().lower().rsplit("/", 1)[-1]
    text = re.sub(r"[-_ ](instruct|chat|hf|it|pt|base|bf16|4k|128k)(?=$|[-_ ])", "", text)
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
