"""The adapter alone in peft's form, for `vllm serve --enable-lora`: one base in the server, many adapters beside it.

vLLM reads one rank and one alpha from the configuration and knows neither patterns nor rsLoRA per module, so every
module's own scale is multiplied into its B, and every pair is filled up with zeros to one rank.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from export.adapter import CONFIG, PREFIX, WEIGHTS, Adapter
from export.gguf_file import encode
from export.gguf_lora import refuse as refuse_adapter
from export.merge import Merged
from export.safetensors_dir import DTYPES
from export.tensor_check import WEIGHT_ERROR
from export.tensors import Shards
from unshot.catalog.formats import Target
from unshot.contracts.parity import FileReport
from unshot.data.files import write_text
from unshot.errors import InputError

# Ranks that vLLM's --max-lora-rank takes (vllm/config/lora.py, MaxLoRARanks).
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def refuse(target: Target, merged: Merged, tokenizer: Path) -> None:
    """`InputError` where there is no adapter, or one that vLLM does not serve beside its base."""
    adapter = refuse_adapter(merged.adapter if merged.adapter.config else None, "hf:bf16")
    if merged.tied and merged.head in adapter.deltas:
        raise InputError(
            f"the adapter changes `{merged.head}`, which is tied to the embedding in the base, and vLLM leaves such a "
            "change out; use --to hf:bf16"
        )
    if rank_of(adapter) > RANKS[-1]:
        raise InputError(
            f"the adapter has rank {rank_of(adapter)}, and vLLM takes {RANKS[-1]} at most; use --to hf:bf16"
        )


def rank_of(adapter: Adapter) -> int:
    """The largest rank of its pairs."""
    return max(int(delta.a.shape[0]) for delta in adapter.deltas.values())


def served_rank(adapter: Adapter) -> int:
    """What vLLM's --max-lora-rank must be."""
    return next(rank for rank in RANKS if rank >= rank_of(adapter))


def write_adapter(folder: Path, adapter: Adapter, precision: str, base: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`."""
    import torch
    from safetensors.torch import save_file

    rank = rank_of(adapter)
    tensors: dict[str, Any] = {}
    for name, delta in sorted(adapter.deltas.items()):
        missing = rank - delta.a.shape[0]
        module = PREFIX + name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = torch.nn.functional.pad(delta.a, (0, 0, 0, missing))
        tensors[f"{module}.lora_B.weight"] = torch.nn.functional.pad(delta.b * delta.scale, (0, missing))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": rank,
        "target_modules": [name.removesuffix(".weight") for name in sorted(adapter.deltas)], "bias": "none",
        "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "inference_mode": True,
    }  # fmt: skip
    folder.mkdir(parents=True)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    for name, value in tensors.items():
        encode(value, precision, name)  # refuses what does not fit the precision
        tensors[name] = value.to(getattr(torch, DTYPES[precision][2])).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def compare_adapters(full: Path, path: Path, report: FileReport) -> None:
    """Append to `report` what of an adapter directory is not the rounding of the full-precision one."""
    if (full / CONFIG).read_bytes() != (path / CONFIG).read_bytes():
        report.failures.append(f"{CONFIG} differs from {full.name}'s")
    ours, theirs = Shards([full / WEIGHTS]), Shards([path / WEIGHTS])
    odd = sorted({*ours} ^ {*theirs})
    for name in ours:
        if name in odd or ours.shape(name) != theirs.shape(name):
            odd.append(name)
            continue
        one, two = ours[name].read(), theirs[name].read().float()
        if not (two - one).norm() <= WEIGHT_ERROR[theirs[name].dtype] * one.norm():
            odd.append(name)
    if odd:
        report.failures.append(f"{len(odd)} tensors are not those of {full.name}, first `{odd[0]}`")
