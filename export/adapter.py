"""A peft adapter (LoRA, rsLoRA, DoRA, embeddings, modules_to_save) as changes to named base tensors."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.tensors import Shards
from unshot.data.rows import read_text
from unshot.errors import InputError

PREFIX = "base_model.model."
PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
# Options of a peft config that change the merge and that this reader does not know; each must be unset.
UNREAD = ("layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens")


@dataclass
class Delta:
    """`weight += scale * B @ A` for one base tensor; with `magnitude` the rows are then rescaled (DoRA)."""

    scale: float
    a: Any = None
    b: Any = None
    magnitude: Any = None
    embedding: bool = False
    transposed: bool = False  # fan_in_fan_out: the base weight is stored (in, out)


@dataclass
class Adapter:
    """Everything an adapter changes: low-rank deltas and whole tensors put in place of the base's."""

    deltas: dict[str, Delta] = field(default_factory=dict)
    replaced: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def changed(self) -> set[str]:
        """Names of the base tensors that differ after the merge."""
        return {*self.deltas, *self.replaced}


def load_adapter(folder: Path) -> Adapter:
    """Read `adapter_config.json` and `adapter_model.safetensors`; `InputError` for anything not understood."""
    path = folder / "adapter_config.json"
    try:
        config = json.loads(read_text(path))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        raise InputError(
            f"{path}: peft_type is {kind or 'missing'}; export merges LORA adapters (DoRA included)"
        )
    for key in UNREAD:
        if config.get(key):
            raise InputError(f"{path}: `{key}` is set; export cannot merge that, merge with peft instead")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise InputError(f"{weights}: no such file; the adapter's weights must be safetensors")
    tensors = Shards([weights])
    adapter = Adapter(config=config)
    for name in tensors:
        value = tensors[name].read().float()
        if not value.isfinite().all():
            raise InputError(f"{weights}: `{name}` holds NaN or infinity; the run diverged, tune again")
        _place(adapter, name.removeprefix(PREFIX), value, weights)
    for name, delta in adapter.deltas.items():
        if delta.a is None or delta.b is None:
            raise InputError(f"{weights}: `{name}` has only half of its LoRA pair; the file is damaged")
    return adapter


def _place(adapter: Adapter, name: str, value: Any, path: Path) -> None:
    for part in PARTS:
        head, found, tail = name.partition(f".{part}")
        if not found or tail not in ("", ".weight", ".default", ".default.weight"):
            continue
        embedding = part.startswith("lora_embedding")
        delta = adapter.deltas.get(f"{head}.weight")
        if delta is None:
            delta = Delta(
                scale=scaling(adapter.config, head),
                transposed=bool(adapter.config.get("fan_in_fan_out")) and not embedding,
            )
            adapter.deltas[f"{head}.weight"] = delta
        if part.endswith("_A"):
            delta.a, delta.embedding = value, embedding
        elif part.endswith("_B"):
            delta.b = value
        else:
            delta.magnitude = value
        return
    if "lora_" in name:
        raise InputError(
            f"{path}: `{name}` is of a LoRA kind that export cannot merge; merge with peft instead"
        )
    # What is left are whole tensors: modules_to_save and trained biases.
    adapter.replaced[re.sub(r"\.(modules_to_save(\.default)?|base_layer)\.", ".", name)] = value


def scaling(config: dict[str, Any], module: str) -> float:
    """peft's scale of a module: `alpha / r`, or `alpha / sqrt(r)` for rsLoRA, with the per-module patterns."""
    rank = _pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The first pattern that names the module or its tail (as peft's `get_pattern_key`)."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
