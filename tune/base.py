"""The base model before a weight is loaded: its shape, and everything for which the load would refuse it."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unshot.errors import InputError
from unshot.methods import METHODS
from unshot.models import Source

# What to do about a base that is quantised already, by the name in its `quantization_config`.
QUANTISED = {
    "gptq": "GPTQ's integer weights carry no gradient here",
    "awq": "AWQ's integer weights carry no gradient here",
    "mxfp4": "MXFP4 experts carry no gradient here",
}
HEADER_LIMIT = 100 * 2**20


@dataclass(frozen=True)
class Shape:
    """What a base's configuration says, whatever its family calls it; `context` None: no limit is known."""

    family: str
    hidden: int
    layers: int
    vocabulary: int
    intermediate: int
    context: int | None
    experts: int

    @property
    def words(self) -> str:
        """Family and size."""
        return f"{self.family}, {self.layers} layers of {self.hidden}"


def inspect_base(source: Source, method: str) -> Shape:
    """The base's shape. Raises `InputError`, naming the way out, for a base that cannot be tuned by `method`."""
    config = source.config()
    _check_family(source, config)
    _check_quantisation(source, config, method)
    check_weights(source)
    from transformers import AutoConfig

    try:
        known = AutoConfig.from_pretrained(str(source.path))
        return Shape(
            family=str(known.model_type),
            hidden=int(known.hidden_size),
            layers=int(known.num_hidden_layers),
            vocabulary=int(known.vocab_size),
            intermediate=_width(known),
            context=getattr(known, "max_position_embeddings", None) or None,
            experts=next((int(n) for key in EXPERTS if (n := getattr(known, key, None))), 0),
        )
    except Exception as error:  # configurations fail in as many ways as there are families
        raise InputError(
            f"{source.path / 'config.json'}: transformers cannot read it as a {config.get('model_type')} "
            f"({type(error).__name__}: {_line(error)})"
        ) from None


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def _width(config: Any) -> int:
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return int(width) if isinstance(width, int) else 4 * int(config.hidden_size)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _check_family(source: Source, config: Mapping[str, Any]) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    family = config.get("model_type")
    where = source.path / "config.json"
    if not isinstance(family, str):
        raise InputError(f"{where}: no `model_type`; give a Hugging Face model directory")
    towers = [key for key in ("vision_config", "audio_config") if config.get(key)]
    if towers:
        text = (config.get("text_config") or {}).get("model_type") or "text"
        raise InputError(
            f"{source.path}: {family} is multimodal ({', '.join(towers)}); tune its text tower ({text}) as a model of "
            "its own: docs/tune.md has the five lines that save it; give that directory"
        )
    if family not in known:
        own = ", and code from a model's directory is not run" if config.get("auto_map") else ""
        raise InputError(
            f"{where}: no causal language model of the installed transformers is called {family!r}{own}; give a "
            "decoder model that transformers knows"
        )


def _check_quantisation(source: Source, config: Mapping[str, Any], method: str) -> None:
    found = config.get("quantization_config")
    if not isinstance(found, Mapping):
        return
    name = str(found.get("quant_method") or "unknown").lower()
    name = "bitsandbytes" if found.get("load_in_4bit") or found.get("load_in_8bit") else name
    if name == "bitsandbytes" and METHODS[method].four_bit and not found.get("load_in_8bit"):
        return
    able = ", ".join(n for n, m in METHODS.items() if m.four_bit)
    if name == "bitsandbytes":
        raise InputError(
            f"{source.path}: its weights are quantised by bitsandbytes, which {method} cannot train on; give the "
            f"unquantised model, or --method {able} where its weights are 4-bit (CUDA)"
        )
    reason = QUANTISED.get(name, f"weights quantised by {name} carry no gradient here")
    raise InputError(
        f"{source.path}: {reason}; give the unquantised model ({able} quantises it by itself), and quantise the tuned "
        "one on export"
    )


def check_weights(source: Source) -> None:
    """Refuse weights of which a file is missing, cut short or no safetensors."""
    for path in source.weight_files():
        _check_safetensors(path)


def _check_safetensors(path: Path) -> None:
    """The header of a safetensors file is JSON and its tensors end where the file does."""
    size = path.stat().st_size
    try:
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(size, HEADER_LIMIT):
                raise ValueError("no header")
            header = json.loads(handle.read(length))
        end = max(
            (facts["data_offsets"][1] for name, facts in header.items() if name != "__metadata__"), default=0
        )
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise InputError(f"{path}: not a safetensors file, or damaged; copy or download it again") from None
    if 8 + length + end != size:
        raise InputError(
            f"{path}: {size:,} bytes, where its header says {8 + length + end:,}; copy or download it again"
        )
