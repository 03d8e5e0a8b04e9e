"""What an engine lacks of a model, read from the configuration before any work.

Either the file can never be the model (`InputError` by name), or it is the model up to a number of tokens (`Boundary`),
beyond which the engine does something else. Read from llama.cpp at the version that llama-cpp-python 0.3.36 bundles
(`src/models/*.cpp`, `src/llama-context.cpp`, `src/llama-model.cpp` `get_rope_factors`); the gate's sequences reach past
every window and rotary switch that the engine is said to have, so that a wrong line here shows.
"""

from __future__ import annotations

from dataclasses import dataclass

from export.families import Config, head_dim, rope, windowed_layers
from unshot.errors import InputError

# Tokens that `serve.sh` serves at most: what a small device holds, and what the gate runs through.
SERVED = 4096
# Tokens of a sequence beyond the boundary it is to reach past.
PAST = 64
# What each streamed family's graph in llama.cpp computes, by Hugging Face's names of the same function.
SILU, TANH_GELU = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
ACTIVATION = {
    "LlamaForCausalLM": SILU, "MistralForCausalLM": SILU, "Qwen2ForCausalLM": SILU, "Qwen3ForCausalLM": SILU,
    "Phi3ForCausalLM": SILU, "Gemma2ForCausalLM": TANH_GELU, "Gemma3ForCausalLM": TANH_GELU,
}  # fmt: skip
# Families whose sliding window llama.cpp has (one full layer in so many); of the others it leaves it out.
WITH_WINDOW = {"Gemma2ForCausalLM": 2, "Gemma3ForCausalLM": 6}
# Layers by which llama.cpp knows Gemma's 27B, whose attention is scaled by another width.
LARGE_GEMMA = {"Gemma2ForCausalLM": 46, "Gemma3ForCausalLM": 62}
# Mixtures of experts: whether llama.cpp makes the chosen experts' weights sum to one (`build_moe_ffn`, `norm_w`).
NORMED_EXPERTS = {"Qwen3MoeForCausalLM": True, "Qwen2MoeForCausalLM": False, "OlmoeForCausalLM": False}


@dataclass(frozen=True)
class Boundary:
    """The file is the model for sequences of up to `tokens` tokens; `why` says what the engine does beyond."""

    tokens: int
    why: str


def architecture(config: Config) -> str:
    """The first architecture of a `config.json`."""
    return str((config.get("architectures") or ["(none)"])[0])


def boundaries(config: Config) -> list[Boundary]:
    """Up to how many tokens llama.cpp computes this model; `InputError` by name where it never does."""
    name = architecture(config)
    normed = NORMED_EXPERTS.get(name)
    if normed is not None and bool(config.get("norm_topk_prob")) is not normed:
        does = "always" if normed else "never"
        raise InputError(
            f"{name} with norm_topk_prob {'off' if normed else 'on'}: llama.cpp {does} makes the weights of the chosen "
            "experts sum to one there; use --to hf:bf16"
        )
    if config.get("use_bidirectional_attention"):
        raise InputError(
            f"{name} with use_bidirectional_attention: llama.cpp lets no token see a later one; use --to hf:bf16"
        )
    if name not in ACTIVATION:
        return _longrope(config)  # llama.cpp's own converter and the gate judge the others
    _activation(name, config)
    _attention_scale(name, config)
    _soft_caps(name, config)
    _yarn(name, config)
    return [*_window(name, config), *_longrope(config)]


def _activation(name: str, config: Config) -> None:
    wanted = ACTIVATION[name]
    # Gemma's older configurations say "gelu" in hidden_act and mean the tanh form; hidden_activation is exact.
    found = config.get("hidden_activation") if wanted is TANH_GELU else config.get("hidden_act")
    if found is not None and found not in wanted:
        raise InputError(
            f"{name} with the activation {found}: llama.cpp always computes {wanted[0]} there; use --to hf:bf16"
        )


def _attention_scale(name: str, config: Config) -> None:
    scalar = config.get("query_pre_attn_scalar")
    if name not in LARGE_GEMMA or scalar is None:
        return
    large = config["num_hidden_layers"] == LARGE_GEMMA[name]
    used = config["hidden_size"] // config["num_attention_heads"] if large else head_dim(config)
    if float(scalar) != float(used):
        raise InputError(
            f"{name} with query_pre_attn_scalar {scalar:g}: llama.cpp scales its attention by {used}; use --to hf:bf16"
        )


def _soft_caps(name: str, config: Config) -> None:
    if name == "Gemma2ForCausalLM":
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if not config.get(key):
                raise InputError(
                    f"{name} with {key} off: llama.cpp always caps Gemma 2's logits; use --to hf:bf16"
                )
    elif config.get("attn_logit_softcapping"):
        raise InputError(
            f"{name} with attn_logit_softcapping: llama.cpp caps no attention logits there; use --to hf:bf16"
        )


def _yarn(name: str, config: Config) -> None:
    if differs := yarn_differs(config):
        raise InputError(f"{name} with {differs}; use --to hf:bf16")


def yarn_differs(config: Config) -> str | None:
    """What llama.cpp computes of YaRN otherwise than the configuration says (`ggml_rope_yarn_corr_dims`), if anything.

    gpt-oss's own configuration says it: its GGUF files are a little off the model everywhere.
    """
    settings = rope(config)
    settings = settings.get("full_attention", settings)
    if (settings.get("rope_type") or "default").lower() != "yarn":
        return None
    fast, slow = settings.get("beta_fast") or 32, settings.get("beta_slow") or 1
    if (float(fast), float(slow)) != (32.0, 1.0):
        return f"YaRN's beta_fast {fast:g} and beta_slow {slow:g}: llama.cpp computes 32 and 1 there"
    if settings.get("truncate") is False:
        return "YaRN's truncate off: llama.cpp rounds the corrected range"
    return None


def _window(name: str, config: Config) -> list[Boundary]:
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False or not any(sliding(name, config)):
        return []
    if name in WITH_WINDOW or int(window) >= int(config.get("max_position_embeddings") or 0):
        return []
    return [
        Boundary(
            int(window),
            f"sliding window of {window} tokens, which llama.cpp leaves out for {name}: longer sequences attend to "
            "more",
        )
    ]


def sliding(name: str, config: Config) -> list[bool]:
    """Which layers have the sliding window."""
    layers = int(config["num_hidden_layers"])
    if config.get("layer_types") or name in WITH_WINDOW:
        return windowed_layers(config, WITH_WINDOW.get(name, 1))
    if name.startswith("Qwen"):  # from this layer on (transformers `Qwen2Config.layer_types`)
        return [n >= int(config.get("max_window_layers") or 0) for n in range(layers)]
    return [True] * layers


def _longrope(config: Config) -> list[Boundary]:
    settings = rope(config)
    if not settings.get("long_factor"):
        return []
    original = int(settings.get("original_max_position_embeddings") or config["max_position_embeddings"])
    if original >= int(config["max_position_embeddings"]):
        return []
    return [
        Boundary(
            original,
            f"long rotary factors beyond {original} tokens: the model picks them by the sequence, llama.cpp by the "
            "context it is started with",
        )
    ]


def served_context(config: Config, found: list[Boundary]) -> int:
    """Tokens that `serve.sh` serves: the model's, at most `SERVED`, and none for which the file is not the model."""
    own = int(config.get("max_position_embeddings") or SERVED)
    return min(own, SERVED, *(b.tokens for b in found))


def reach(config: Config, context: int) -> int | None:
    """Length of a sequence past every window within the served context; None where there is none to reach past."""
    marks = [config.get("sliding_window"), config.get("attention_chunk_size")]
    marks += [rope(config).get("original_max_position_embeddings")]
    inside = [int(m) for m in marks if m and int(m) < context]
    return min(context, max(inside) + PAST) if inside else None


def check_rows_fit(found: list[Boundary], longest: int) -> None:
    """`InputError` where the run's own rows are longer than what the file is right for."""
    for one in found:
        if longest > one.tokens:
            raise InputError(
                f"the run's longest row takes {longest} tokens, and the file would be right only up to {one.tokens}: "
                f"{one.why}; use --to hf:bf16 or onnx:fp32"
            )
