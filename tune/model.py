"""The base model with its adapter: what is trained, in which precision, with which defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unshot.case import Tune
from unshot.errors import InputError, OutsideError
from unshot.models import Source


@dataclass(frozen=True)
class Defaults:
    """Settings chosen for a model and a data size, with the reason for each."""

    learning_rate: float
    batch_rows: int
    reasons: dict[str, str]


def choose_defaults(settings: Tune, hidden_size: int, rows: int) -> Defaults:
    """Learning rate and batch size where the user gave none.

    LoRA's best rate is about 10x full fine-tuning's and falls with width, 5e-5 * 10 * (2000 / hidden)^0.781
    (Schulman et al., "LoRA Without Regret", Thinking Machines Lab, 2025-09, for the Llama family).
    """
    reasons = {}
    if settings.learning_rate is not None:
        rate = settings.learning_rate
        reasons["learning_rate"] = "given"
    else:
        rate = 5e-5 * (2000 / hidden_size) ** 0.781 * (1 if settings.method == "full" else 10)
        rate = float(f"{rate:.2g}")
        reasons["learning_rate"] = (
            f"5e-5 x {'1' if settings.method == 'full' else '10 (LoRA)'} x (2000 / hidden {hidden_size})^0.781, "
            "Thinking Machines Lab 2025-09"
        )
    batch = 8 if rows < 1000 else 16 if rows < 10000 else 32
    reasons["batch_rows"] = (
        f"{batch} rows a step for {rows} rows: small sets need steps more than smooth gradients"
    )
    return Defaults(rate, batch, reasons)


def load_base(source: Source, device: str) -> Any:
    """The base model in bf16 (fp32 where the CPU has no fast bf16), attention by sdpa."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if device != "cpu" or cpu_has_bf16() else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(str(source.path), dtype=dtype, use_safetensors=True)
    except Exception as error:  # damaged weights raise many kinds
        raise InputError(
            f"{source.path}: the model cannot be loaded ({type(error).__name__}: {error})"
        ) from None
    return model.to(device)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX); without it bf16 is slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def add_adapter(model: Any, settings: Tune) -> Any:
    """Wrap the model with a fresh LoRA adapter (fp32) on every linear layer but the head; seeds torch first.

    `settings.layers` keeps it to the top of the model, so that no gradient runs through what lies below.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    if settings.method not in ("lora", "dora"):
        raise InputError(f"`tune.method` is \"{settings.method}\"; accepted here: 'lora' or 'dora'")
    total = model.config.num_hidden_layers
    if settings.layers is not None and settings.layers > total:
        raise InputError(f"`tune.layers` is {settings.layers}; the model has {total} layers")
    top = None if settings.layers in (None, total) else list(range(total - settings.layers, total))
    torch.manual_seed(settings.seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or 2 * settings.rank,
        lora_dropout=settings.dropout,
        use_dora=settings.method == "dora",
        target_modules=linear_names(model) if top else "all-linear",
        layers_to_transform=top,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def linear_names(model: Any) -> list[str]:
    """Last parts of the names of all linear layers but the head."""
    import torch

    head = model.get_output_embeddings()
    found = {
        n.rsplit(".", 1)[-1]
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and m is not head
    }
    return sorted(found)


def pick_device() -> str:
    """`cuda` where torch sees a GPU, else `cpu`."""
    try:
        import torch
    except ImportError as error:
        raise OutsideError(f"tuning needs torch ({error}); run `pip install 'unshot[tune]'`") from None
    return "cuda" if torch.cuda.is_available() else "cpu"


def pack_capacity(batch_tokens: int, device: str) -> int:
    """Tokens of one packed sequence.

    Attention computes the masked-out squares between packed rows too; a CPU's matrix products are at full speed from
    some 256 rows on, so that longer packs only add attention (measured: 512 is 1.6 times as fast as 2,048).
    """
    return min(batch_tokens, 384) if device == "cpu" else batch_tokens


def warmup_cosine(step: int, total: int, *, warmup: float = 0.06, floor: float = 0.1) -> float:
    """Learning-rate factor of a step in [0, total): linear warm-up, then cosine down to `floor`."""
    start = max(1, round(warmup * total))
    if step < start:
        return (step + 1) / start
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, total - start)))
