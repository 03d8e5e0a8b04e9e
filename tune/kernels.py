"""Faster kernels where they are installed: flash-attention 3 and 2, and Liger; each taken only if it says the same.

A kernel is another way to the same numbers. Each is tried on the loaded base with two short packs, as in a run, and
taken where the logits are those of torch's own kernels within what their precision allows (`tune.packing.ALONE`).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from tune.packing import ALONE, PACKS, logits_of

# transformers' names of attention implementations, the package of each, and the least compute capability.
ATTENTIONS = (
    ("flash_attention_3", "flash_attn_interface", (9, 0)),
    ("flash_attention_2", "flash_attn", (8, 0)),
)
LIGER = "liger_kernel"


def installed(device: str) -> list[str]:
    """What of the faster kernels this machine has, best first; nothing on a CPU."""
    if device == "cpu":
        return []
    able = torch.cuda.get_device_capability()
    found = [name for name, package, least in ATTENTIONS if able >= least and find_spec(package) is not None]
    return found[:1] + ([LIGER] if find_spec(LIGER) is not None else [])


def adopt(net: Any, names: list[str], device: str, *, bf16: bool) -> tuple[list[str], str | None]:
    """Put kernels into a loaded causal model; what is in it afterwards, and the name of one that must be undone.

    A model that needs its attention as it is (a soft cap) keeps it. An attention that fails or differs is put back; a
    Liger kernel cannot be taken out again: the caller loads the model anew without it.
    """
    taken: list[str] = []
    for name in names:
        before = _read(net, device, bf16)
        if name == LIGER:
            if not _put_liger(net):
                continue
            if _differs(net, before, device, bf16):
                return taken, LIGER
        elif not use_attention(net, name, before, device, bf16=bf16):
            continue
        taken.append(name)
    return taken, None


def use_attention(net: Any, name: str, before: list[torch.Tensor], device: str, *, bf16: bool) -> bool:
    """Switch the model's attention where its logits stay what they were; else leave it."""
    usual = net.config._attn_implementation
    if usual != "sdpa":
        return False
    try:
        net.set_attn_implementation(name)
        if not _differs(net, before, device, bf16):
            return True
    except Exception:  # packages built for another torch or GPU raise what they like
        pass
    net.set_attn_implementation(usual)
    return False


def _put_liger(net: Any) -> bool:
    """Liger's norms, rotary embeddings and gated layers; its loss is not used, as ours reads answer tokens alone."""
    from liger_kernel.transformers import monkey_patch

    if net.config.model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    monkey_patch._apply_liger_kernel_to_instance(net, cross_entropy=False, fused_linear_cross_entropy=False)
    return True


def _read(net: Any, device: str, bf16: bool) -> list[torch.Tensor]:
    """Logits of packs of random rows, the same ones each time."""
    draw = np.random.default_rng(0)
    size = min(int(net.config.get_text_config().vocab_size), 50_000)
    net.eval()
    return [
        logits_of(
            net,
            draw.integers(0, size, sum(lengths)),
            np.concatenate([np.arange(n) for n in lengths]),
            device,
            bf16,
        )
        for lengths in PACKS
    ]


def _differs(net: Any, before: list[torch.Tensor], device: str, bf16: bool) -> bool:
    dtype = torch.bfloat16 if bf16 else next(net.parameters()).dtype
    limit = ALONE.get(dtype, ALONE[torch.float32])
    after = _read(net, device, bf16)
    worst = max(
        float((a - b).abs().max() / b.std().clamp(min=1e-6)) for a, b in zip(after, before, strict=True)
    )
    return not worst <= limit
