"""`hf:fp8`: 8-bit floats in compressed-tensors' form, which vLLM serves on GPUs without converting anything.

The scheme is llm-compressor's FP8_DYNAMIC: weights of linear layers as float8_e4m3fn with one scale a row (the row's
largest value is 448), activations rounded per token by the server; embeddings, norms and head stay bf16.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export.families import Config
from export.merge import Merged
from export.reference import auto_config, transformers_quietly
from export.tensors import tail
from unshot.errors import InputError

LARGEST = 448.0  # of float8_e4m3fn
SCALE = "_scale"


def linear_layers(base: Path) -> set[str]:
    """Tails of the names of the weights that are rounded: every linear layer but the head."""
    import torch
    from accelerate import init_empty_weights

    config = auto_config(base)
    with init_empty_weights():
        net = transformers_quietly().AutoModelForCausalLM.from_config(config)
    head = net.get_output_embeddings()
    return {
        tail(f"{name}.weight")
        for name, module in net.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and "vision" not in name
    }


def rounded(values: Any) -> tuple[Any, Any]:
    """fp32 rows as float8_e4m3fn, and their scales, bf16, shape `(rows, 1)`."""
    import torch

    scale = (values.abs().amax(dim=1, keepdim=True) / LARGEST).to(torch.bfloat16)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (values / scale.float()).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def settings() -> Config:
    """`quantization_config` of config.json."""
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**common, "strategy": "channel", "dynamic": False},
                "input_activations": {**common, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["lm_head"],
    }


def proven_here() -> bool:
    """Whether transformers can run such a directory: it needs the package compressed-tensors."""
    return importlib.util.find_spec("compressed_tensors") is not None


def pieces(tensors: Merged, name: str) -> Iterator[tuple[bytes, bytes]]:
    """Weights and scales of a linear layer, some rows at a time."""
    import torch

    for start, stop in tensors.ranges(name):
        values = tensors.rows(name, start, stop)
        if not values.isfinite().all():
            raise InputError(
                f"tensor `{name}` holds NaN or infinity; the file is damaged, or the run diverged"
            )
        weight, scale = rounded(values)
        yield weight.view(torch.uint8).numpy().tobytes(), scale.view(torch.uint8).numpy().tobytes()


def read(folder: Path, name: str) -> Any:
    """The values that a written layer stands for, fp32."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as handle:
            if name in handle.keys():  # noqa: SIM118 (no mapping)
                return handle.get_tensor(name).float() * handle.get_tensor(f"{name}{SCALE}").float()
    raise InputError(f"{folder}: no tensor `{name}`")
