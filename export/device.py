"""Whether an artifact fits the device it is for, before any work: weights, KV cache at the context, workspace.

Rules of thumb, on the safe side. The system and other programs keep a quarter of a computer's RAM, at most 4 GiB; on a
GPU a tenth stays free, as vLLM leaves it (`gpu_memory_utilization` 0.9). A layer with a sliding window is counted as
if it kept the whole context, as llama.cpp does by default for some families.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from export import gguf_file
from export.families import family_of
from export.merge import EMBEDDING, HEAD, Merged
from unshot.catalog import architecture_from_config, gpu
from unshot.catalog.formats import FORMATS, STREAMED, Target
from unshot.errors import InputError, nearest

GIB = 2**30
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
PRESETS = {
    "laptop-8gib": "ram=8GiB",
    "laptop-16gib": "ram=16GiB",
    "laptop-32gib": "ram=32GiB",
    "raspberry-pi-5": "ram=8GiB",
}
CONTEXT = 4096
# Tokens that an engine runs through the model together in prefill (llama.cpp's n_ubatch).
MICRO_BATCH = 512
# Bits per weight of a matrix: block layouts of llama.cpp's ggml-common.h, for mixtures the mean its quantiser prints
# (tools/quantize/quantize.cpp) rounded up; MatMulNBits with blocks of 32 and fp32 (CPU) or fp16 (CUDA) scales.
BITS = {
    "gguf": {
        "q6_k": 6.6, "q5_k_m": 5.7, "q5_0": 5.5, "q4_k_m": 4.9, "q4_k_s": 4.6, "q4_0": 4.5, "iq4_xs": 4.3,
        "iq4_nl": 4.5, "q3_k_m": 4.0, "q2_k": 3.4, "iq3_xxs": 3.3, "iq2_xs": 2.6,
    },
    "onnx": {"fp32": 32.0},
    "hf": {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "fp8": 8.1, "w4a16": 4.3},
    "genai": {"fp32": 32.0, "int8": 9.0, "int4": 5.0},
    "genai-cuda": {"fp16": 16.0, "int4": 4.5},
}  # fmt: skip
# Bits per weight of embeddings and head: llama.cpp keeps them in q6_k beside its low-bit types; GenAI keeps the
# embedding as it computes.
ENDS = {"hf:w4a16": 16.0, "gguf": 6.6, "onnx": 32.0, "genai": 32.0, "genai-cuda": 16.0}
CACHE_BYTES = {"gguf": 2, "onnx": 4, "hf": 2, "genai": 4, "genai-cuda": 2}


@dataclass(frozen=True)
class Device:
    """Where an artifact is to run; `memory` and `reserved` in bytes."""

    name: str
    kind: str
    memory: float
    reserved: float

    @property
    def usable(self) -> float:
        """Bytes a model may take."""
        return self.memory - self.reserved


@dataclass(frozen=True)
class Need:
    """Bytes an artifact takes while it runs at `context` tokens."""

    target: str
    context: int
    weights: float
    cache: float
    workspace: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.cache + self.workspace

    def __str__(self) -> str:
        return (
            f"{self.target} needs {gib(self.total)} (weights {gib(self.weights)} + KV cache {gib(self.cache)} at "
            f"{self.context:,} tokens + workspace {gib(self.workspace)})"
        )


def gib(count: float) -> str:
    """Bytes in GiB, two digits."""
    return f"{count / GIB:.2f} GiB"


def parse_device(text: str) -> Device:
    """`ram=8GiB`, `gpu=rtx-4090` or a preset; `InputError` for anything else."""
    wanted = PRESETS.get(text.strip().lower(), text.strip())
    kind, equals, value = wanted.partition("=")
    kind = kind.strip().lower()
    if not equals or kind not in ("ram", "gpu"):
        raise InputError(
            f"unknown device '{text}': give ram=8GiB, gpu=NAME from the catalog, or a preset ({nearest(text, PRESETS)})"
        )
    if kind == "gpu":
        found = gpu(value)
        return Device(found.title, "gpu", found.memory, 0.1 * found.memory)
    match = re.fullmatch(r"([\d.]+)\s*([kmg]?i?)b?", value.strip().lower())
    size = float(match[1]) * UNITS.get(match[2], 0) if match and match[1].count(".") <= 1 else 0
    if not size:
        raise InputError(f"'{value}' is no amount of memory; give e.g. ram=8GiB or ram=16GB")
    return Device(f"{gib(size)} of RAM", "ram", size, min(size / 4, 4 * GIB))


def need(target: Target, merged: Merged, context: int) -> Need:
    """What one artifact takes; the layout is the config's, so no weight is read."""
    shape = architecture_from_config(merged.config)
    cache = shape.kv_elements * context * CACHE_BYTES[target.kind]
    rows = min(MICRO_BATCH, context)
    if target.kind == "gguf":
        # Of one micro-batch: the logits or the attention scores, whichever are larger, and the widest activations.
        scores = shape.heads * context
        work = 4 * rows * (max(shape.vocab, scores) + 2 * shape.hidden + 2 * shape.intermediate)
    else:
        # The graphs give logits for the whole prompt, and optimum's copies the cache as it grows.
        work = 4 * context * (shape.vocab + 2 * shape.hidden + 2 * shape.intermediate)
        cache *= 2 if target.kind == "onnx" else 1
    return Need(str(target), context, weights(target, merged), cache, work)


def weights(target: Target, merged: Merged) -> float:
    """Bytes of the weights in a target's format: exact where they are written here, else by bits per weight."""
    if target.kind == "gguf" and target.precision in STREAMED:
        plan = gguf_file.tensor_plan(merged, family_of(merged.config), merged.config, target.precision)
        return float(sum(gguf_file.nbytes(t.shape, t.kind) for t in plan))
    bits = BITS[target.kind][target.precision]
    ends = ENDS.get(str(target), ENDS.get(target.kind, bits))
    total = 0.0
    for name in merged.names():
        count = math.prod(merged.shape(name))
        total += count * (ends if name in (EMBEDDING, HEAD) else bits) / 8
    return total


def fitting(device: Device, merged: Merged, context: int, kinds: set[str]) -> list[Need]:
    """Every format of these kinds that fits, the largest weights first."""
    found = [need(Target(k, p), merged, context) for k in sorted(kinds) for p in FORMATS[k].precisions]
    return sorted((n for n in found if n.total <= device.usable), key=lambda n: -n.weights)


def check_fits(device: Device, targets: list[Target], merged: Merged, context: int | None) -> list[Need]:
    """What each target takes on the device; `InputError` with the arithmetic where one does not fit.

    An adapter alone has the size of its base's file, which is not known here: it is left out. `context` None means
    the model's own, at most 4,096 tokens.
    """
    own = int(merged.config.get("max_position_embeddings") or CONTEXT)
    tokens = context or min(own, CONTEXT)
    if tokens > own:
        raise InputError(f"--context {tokens}: the model holds {own} tokens; give that or fewer")
    plain = [t for t in targets if not t.format.on_base]
    needs = [need(t, merged, tokens) for t in plain]
    for one in needs:
        if one.total <= device.usable:
            continue
        others = fitting(device, merged, tokens, {t.kind for t in plain} | {"gguf"})
        advice = (
            f"{others[0].target} would fit with {gib(others[0].total)}"
            if others
            else "no format fits; take a smaller base model"
        )
        raise InputError(
            f"{one}, and {device.name} leaves {gib(device.usable)} (of {gib(device.memory)}, "
            f"{gib(device.reserved)} kept free); {advice}"
        )
    return needs


def as_dict(device: Device, needs: list[Need]) -> dict[str, Any]:
    """The arithmetic for the manifest."""
    return {
        "device": device.name,
        "memory": device.memory,
        "usable": device.usable,
        "needs": [{**vars(n), "total": n.total} for n in needs],
    }
