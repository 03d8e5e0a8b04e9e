"""Model families: how a Hugging Face config and its tensor names become llama.cpp's.

Keys, tensor names and the families' quirks follow llama.cpp's own converter (llama.cpp `conversion/`, and the
`gguf` package's tensor map).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.vocab import NotStreamed
from unshot.errors import InputError

Config = dict[str, Any]
# Numbers of a `config.json` that are read here: counts that a model needs, the parts that hold more,
# counts that may be off, and the rest.
SIZES = (
    "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
PARTS = ("text_config", "rope_scaling", "rope_parameters", "full_attention", "sliding_attention")
SWITCHES = (
    "head_dim", "num_key_value_heads", "sliding_window", "max_window_layers", "original_max_position_embeddings",
    "attention_chunk_size", "n_shared_experts", "context_length",
)  # fmt: skip
RATIOS = (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_local_base_freq", "factor", "beta_fast",
    "beta_slow", "low_freq_factor", "high_freq_factor", "attention_factor", "mscale", "mscale_all_dim",
    "partial_rotary_factor", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One architecture: GGUF name, what its metadata needs, and how its weights differ from Hugging Face's.

    `rotary_pairs`: q/k rows are reordered from halves to pairs. `norm_shift` is added to norm weights
    (Gemma stores them less one). `head`: whether llama.cpp reads a head of its own (Gemma 2 always ties it).
    `biases`: the layers whose biases it reads.
    """

    arch: str
    parameters: Callable[[Any, Config], None]
    rotary_pairs: bool = False
    norm_shift: float = 0.0
    head: bool = True
    biases: tuple[str, ...] = ()


def family_of(config: Config) -> Family:
    """The family of a `config.json`; `InputError` names the supported ones."""
    names = config.get("architectures") or ["(none)"]
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise NotStreamed(
        f"architecture {names[0]} is not streamed into GGUF here; {', '.join(sorted(FAMILIES))} are"
    )


def check_numbers(raw: Config, path: Path, defaults: Config) -> None:
    """`InputError` where a `config.json` holds something else in place of a number.

    A number is what `SIZES`, `SWITCHES` and `RATIOS` name, and whatever is one in the class's own `defaults`.
    """
    for key, value in raw.items():
        usual = defaults.get(key)
        if isinstance(value, dict):
            if key in PARTS:
                check_numbers(value, path, usual if isinstance(usual, dict) else {})
            continue
        by_class = isinstance(usual, int | float) and not isinstance(usual, bool)
        named = key in (*SIZES, *SWITCHES, *RATIOS)
        if not named and not (by_class and isinstance(value, str)):
            continue
        off = value is None and not (by_class and key in (*SIZES, "rms_norm_eps"))
        if off or (isinstance(value, list) and isinstance(usual, list)):  # null, or one number per layer
            continue
        whole = key in (*SIZES, *SWITCHES)
        good = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or (key in SIZES and value <= 0):
            kind = "a whole number above 0" if key in SIZES else "a whole number" if whole else "a number"
            raise InputError(
                f"{path}: {key} must be {kind}, not {json.dumps(value)[:60]}; copy the file again"
            )


def rope(config: Config) -> Config:
    """Rotary settings of a config in one form: transformers 5's `rope_parameters`, or 4's separate keys."""
    found: Config = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "full_attention" in found or "sliding_attention" in found:
        return found
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if key not in found and config.get(key) is not None:
            found[key] = config[key]
    if "rope_type" not in found and found.get("type"):
        found["rope_type"] = found["type"]
    if config.get("rope_local_base_freq") is not None:
        found["sliding_attention"] = {"rope_theta": config["rope_local_base_freq"]}
    return found


def head_dim(config: Config) -> int:
    """Width of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _shape(writer: Any, config: Config) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _rotary(writer: Any, config: Config) -> None:
    import gguf

    whole = rope(config)
    main = whole.get("full_attention", whole)
    kind = (main.get("rope_type") or "default").lower()
    factor = main.get("factor")
    if kind == "linear" and factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(factor)
    elif kind == "yarn" and factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(
            main.get("original_max_position_embeddings") or config["max_position_embeddings"]
        )
        ratio = yarn_attention(main) / (1 + 0.1 * math.log(factor) if factor > 1 else 1.0)
        if abs(ratio - 1) > 1e-6:  # llama.cpp multiplies its own attention factor by this
            writer.add_rope_scaling_attn_factors(ratio)
    elif kind in ("longrope", "su"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    elif kind not in ("default", "llama3"):
        raise NotStreamed(f"rope_type {kind} is not streamed; default, linear, yarn, llama3 and longrope are")
    if main.get("rope_theta") is not None:
        writer.add_rope_freq_base(float(main["rope_theta"]))
    local = whole.get("sliding_attention", {}).get("rope_theta")
    if local is not None:
        writer.add_rope_freq_base_swa(float(local))


def yarn_attention(settings: Config) -> float:
    """The factor on cos and sin under YaRN (transformers `_compute_yarn_parameters`)."""
    factor = settings["factor"]

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return scale(settings["mscale"]) / scale(settings["mscale_all_dim"])
    return scale(1.0)


def _usual(writer: Any, config: Config) -> None:
    """What Llama, Qwen and Gemma 3 share."""
    _shape(writer, config)
    _rotary(writer, config)
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])


def _llama(writer: Any, config: Config) -> None:
    _usual(writer, config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(head_dim(config))


def _gemma2(writer: Any, config: Config) -> None:
    _shape(writer, config)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])
    _pattern(writer, config, 2)


def _pattern(writer: Any, config: Config, every: int) -> None:
    """Which layers have the window, where that is not llama.cpp's own rule: all but each `every`-th layer."""
    windowed = windowed_layers(config, every)
    if windowed != [bool((n + 1) % every) for n in range(config["num_hidden_layers"])]:
        writer.add_sliding_window_pattern(windowed)


def windowed_layers(config: Config, every: int) -> list[bool]:
    """Which layers have the sliding window (transformers `layer_types`, else one full layer in `every`)."""
    if config.get("layer_types"):
        return [kind == "sliding_attention" for kind in config["layer_types"]]
    every = config.get("sliding_window_pattern") or every
    return [bool((n + 1) % every) for n in range(config["num_hidden_layers"])]


def _gemma3(writer: Any, config: Config) -> None:
    _usual(writer, config)
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if config.get("sliding_window") and any(windowed_layers(config, 6)):
        writer.add_sliding_window(config["sliding_window"])
        _pattern(writer, config, 6)


def _phi3(writer: Any, config: Config) -> None:
    _shape(writer, config)
    settings = rope(config)
    original = int(settings.get("original_max_position_embeddings") or config["max_position_embeddings"])
    writer.add_rope_scaling_orig_ctx_len(original)
    share = settings.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(share * config["hidden_size"]) // config["num_attention_heads"])
    writer.add_rope_freq_base(float(settings["rope_theta"]))
    writer.add_sliding_window(config.get("sliding_window") or 0)
    if settings.get("long_factor"):
        # Attention factor of LongRoPE (Ding et al. 2024, arXiv 2402.13753).
        stretch = config["max_position_embeddings"] / original
        factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        given = settings.get("attention_factor")
        writer.add_rope_scaling_attn_factors(factor if given is None else float(given))


QKV = ("attn_q", "attn_k", "attn_v")
LLAMA = Family(
    "llama", _llama, rotary_pairs=True, biases=(*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
)
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": Family("qwen2", _usual, biases=QKV),
    "Qwen3ForCausalLM": Family("qwen3", _usual),
    "Gemma2ForCausalLM": Family("gemma2", _gemma2, norm_shift=1.0, head=False),
    "Gemma3ForCausalLM": Family("gemma3", _gemma3, norm_shift=1.0),
    "Phi3ForCausalLM": Family("phi3", _phi3),
}


def extra_tensors(config: Config) -> dict[str, list[float]]:
    """Tensors that no checkpoint holds: rotary factors of Llama 3 and LongRoPE, as fp32 values."""
    settings = rope(config)
    if settings.get("long_factor"):
        return {
            "rope_factors_long.weight": settings["long_factor"],
            "rope_factors_short.weight": settings["short_factor"],
        }
    if (settings.get("rope_type") or "").lower() != "llama3":
        return {}
    return {"rope_freqs.weight": _llama3_factors(settings, head_dim(config))}


def _llama3_factors(settings: Config, width: int) -> list[float]:
    """By how much each rotary frequency is slowed (Llama 3.1's scaling, transformers `_compute_llama3_parameters`)."""
    import torch

    base, factor = settings.get("rope_theta", 10000.0), settings.get("factor", 8.0)
    low, high = settings.get("low_freq_factor", 1.0), settings.get("high_freq_factor", 4.0)
    context = settings.get("original_max_position_embeddings", 8192)
    frequencies = 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    factors = []
    for frequency in frequencies:  # fp32 tensors, as llama.cpp's converter has them
        length = 2 * math.pi / frequency
        if length < context / high:
            factors.append(1.0)
        elif length > context / low:
            factors.append(float(factor))
        else:
            smooth = (context / length - low) / (high - low)
            factors.append(float(1 / ((1 - smooth) / factor + smooth)))
    return factors
