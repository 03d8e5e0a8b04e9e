"""What of a model's shape sets its speed and memory, read from the catalog or from a `config.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct

from unshot.errors import InputError


class Architecture(Struct, frozen=True):
    """A decoder-only transformer. Sizes are counts of elements; `intermediate` is one expert's width.

    `window` is the sliding-window size in tokens and `windowed` the number of layers that use it (0: none), weighted by
    what a layer keeps where layers differ. `attention` are the weights of all attention layers and `cache` the key and
    value elements of one token, 0 where the plain formula holds. `published_params` is the publisher's own parameter
    count, 0 where not given. `unconfirmed` is what of the shape no source that was read confirms.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int = 0
    tied: bool = False
    experts: int = 0
    experts_per_token: int = 0
    shared_intermediate: int = 0
    window: int = 0
    windowed: float = 0
    attention: int = 0
    cache: int = 0
    gated: bool = True
    repo: str = ""
    aliases: tuple[str, ...] = ()
    published_params: int = 0
    source: str = ""
    unconfirmed: str = ""
    stored: str = ""  # the format its checkpoint's weights are quantised to, by its config.json

    @classmethod
    def from_catalog(cls, key: str, row: Mapping[str, Any]) -> Architecture:
        """An architecture from one table of `models.toml`."""
        values = dict(row)
        values.pop("like", None)
        values["published_params"] = values.pop("params", 0)
        values["aliases"] = tuple(values.get("aliases", ()))
        values.setdefault("head_dim", values["hidden"] // values["heads"])
        return cls(name=key, **values)

    @property
    def attention_params(self) -> int:
        """Weights of the q, k, v and output projections of all layers."""
        if self.attention:
            return self.attention
        per_layer = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * per_layer

    @property
    def expert_params(self) -> int:
        """Weights of one expert (or of the one MLP) of one layer."""
        return (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def mlp_params(self) -> int:
        """Weights of every MLP and router of all layers."""
        shared = (3 if self.gated else 2) * self.hidden * self.shared_intermediate
        routed = self.expert_params * max(1, self.experts) + self.hidden * self.experts
        return self.layers * (routed + shared)

    @property
    def linear_params(self) -> int:
        """Weights that every pass may read: all but embeddings, output head and norms."""
        return self.attention_params + self.mlp_params

    @property
    def active_params(self) -> int:
        """Of `linear_params`, those one token is multiplied with (top-k experts only)."""
        idle = max(0, self.experts - self.experts_per_token) if self.experts else 0
        return self.linear_params - self.layers * idle * self.expert_params

    @property
    def head_params(self) -> int:
        """Weights of the output head (shared with the embedding where tied, but still multiplied)."""
        return self.hidden * self.vocab

    @property
    def params(self) -> int:
        """All weights, norms included (two a layer and the last), biases not."""
        embeddings = self.head_params * (1 if self.tied else 2)
        return self.linear_params + embeddings + self.hidden * (2 * self.layers + 1)

    @property
    def kv_elements(self) -> int:
        """Key and value elements one token adds to the cache, over all layers (MHA, GQA and MQA alike)."""
        return self.cache or 2 * self.layers * self.kv_heads * self.head_dim

    def cached_tokens(self, context: float) -> float:
        """Mean over layers of the tokens kept for a context of `context` tokens (windowed layers keep fewer)."""
        if not self.windowed or context <= self.window:
            return context
        return context + (self.window - context) * self.windowed / self.layers


def architecture_from_config(config: Mapping[str, Any], *, name: str = "config.json") -> Architecture:
    """The architecture a transformers `config.json` describes.

    Understands multi-head, grouped, multi-query and latent attention, explicit `head_dim`, tied embeddings, mixtures of
    experts (Mixtral, Qwen MoE, DeepSeek-style shared experts), sliding windows (one for all layers, `layer_types`,
    `sliding_window_pattern`, Gemma 2's every second layer) and multimodal files that keep the text model under
    `text_config`. What it counts too coarsely goes into `unconfirmed`. Raises `InputError` naming a key that is missing
    or not a positive number: only what transformers derives from other keys is derived.
    """
    if isinstance(config.get("text_config"), Mapping):
        outer = {k: config[k] for k in ("tie_word_embeddings",) if k in config}
        config = {**outer, "model_type": config.get("model_type", ""), **config["text_config"]}
    if config.get("full_attention_interval") and not config.get("layer_types"):
        every, count = config["full_attention_interval"], config.get("num_hidden_layers")
        if isinstance(every, int) and isinstance(count, int):
            kinds = ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(count)]
            config = {**config, "layer_types": kinds}
    _refuse(config, name)

    def number(*keys: str, default: int | None = None) -> int:
        for key in keys:
            value = config.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(f"{name}: `{key}` is {value!r}; a whole number is needed")
            return value
        if default is None:
            raise InputError(f"{name}: no `{keys[0]}`; give the config.json of a decoder-only language model")
        return default

    kind = str(config.get("model_type", ""))
    layers = number("num_hidden_layers", "n_layer", "num_layers")
    hidden = number("hidden_size", "n_embd", "d_model")
    heads = number("num_attention_heads", "n_head")
    if not layers or not hidden or not heads:
        raise InputError(f"{name}: layers, hidden size and heads must be above zero")
    mqa = config.get("multi_query") is True
    kv_heads = 1 if mqa else number("num_key_value_heads", "num_kv_heads", default=heads)
    experts = number("num_local_experts", "num_experts", "n_routed_experts", default=0)
    four = 4 * hidden if kind in FOUR_WIDE else None
    dense = number("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", default=four)
    window, windowed = _windows(config, kind, layers)
    shared = number("shared_expert_intermediate_size", default=0)
    if experts and kind in ("llama4", "llama4_text", "gemma4", "gemma4_text"):
        shared = dense  # a dense MLP stands beside the experts in every layer
    attention, cache, by_weight = _uneven(config, number, hidden, heads, kv_heads, windowed)
    if not shared and config.get("n_shared_experts"):
        shared = number("n_shared_experts") * number("moe_intermediate_size")
    return Architecture(
        name=str(config.get("_name_or_path") or name),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(config, number) or hidden // heads,
        intermediate=number("moe_intermediate_size", default=dense) if experts else dense,
        vocab=number("vocab_size"),
        context=number("max_position_embeddings", "n_positions", default=0),
        tied=bool(config.get("tie_word_embeddings", _tied_by_default(kind))),
        experts=experts,
        experts_per_token=number(*PER_TOKEN) if experts else 0,
        shared_intermediate=shared,
        window=window,
        windowed=by_weight,
        attention=attention,
        cache=cache,
        unconfirmed=_coarse(config) if experts else "",
        stored=_stored(config),
        gated=kind
        not in {"gpt2", "gpt_neox", "gptj", "opt", "falcon", "phi", "bloom", "starcoder2", "gpt_bigcode"},
    )


KNOWN_LAYERS = {"full_attention", "sliding_attention", "linear_attention", "chunked_attention", "attention"}
STATE_SPACE = ("mamba_d_state", "ssm_state_size", "state_size", "ssm_cfg", "hybrid_override_pattern")
ENCODERS = ("bert", "roberta", "electra", "mpnet", "longformer", "xlnet")


def _refuse(config: Mapping[str, Any], name: str) -> None:
    """Refuse what the formulas do not cover: state-space layers, encoders. Raises `InputError`."""
    kind = str(config.get("model_type", ""))
    types = config.get("layer_types") or config.get("layers_block_type") or config.get("block_types")
    other = sorted({str(t) for t in types} - KNOWN_LAYERS) if isinstance(types, list) else []
    if not isinstance(types, list):
        other = [key for key in STATE_SPACE if config.get(key)]
    if other:
        raise InputError(
            f"{name}: layers that are neither attention nor linear attention (`{other[0]}`) are not forecast; plan "
            "with a model without them"
        )
    if any(word in kind for word in ENCODERS):
        raise InputError(
            f"{name}: `{kind}` is an encoder; give the config.json of a decoder-only language model"
        )


def _stored(config: Mapping[str, Any]) -> str:
    """The format that `quantization_config` names; empty where there is none."""
    found = config.get("quantization_config")
    return str(found.get("quant_method", "quantised")) if isinstance(found, Mapping) else ""


# Families whose MLP is four times the hidden size where the file does not say (transformers 4.57.6).
FOUR_WIDE = {"bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "mpt"}
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts")


def _coarse(config: Mapping[str, Any]) -> str:
    """What says that some layers have no experts, which are counted in every layer here; empty if nothing does."""
    some = {key: config[key] for key in ("first_k_dense_replace", "mlp_only_layers") if config.get(key)}
    steps = ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_freq")
    some |= {key: config[key] for key in steps if config.get(key) not in (None, 1)}
    told = ", ".join(f"{key} {value}" for key, value in some.items())
    return (
        f"its weights are too many: experts are counted in every layer, its config.json has {told}"
        if told
        else ""
    )


def _uneven(
    config: Mapping[str, Any],
    number: Callable[..., int],
    hidden: int,
    heads: int,
    kv_heads: int,
    windowed: int,
) -> tuple[int, int, float]:
    """`(attention weights, key and value elements of a token, windowed layers by weight)` where layers differ.

    Zeros where the plain formula holds. Qwen3-Next and 3.5: layers of linear attention between those of full attention
    with a gated output; Gemma 4: global layers with their own head size and number of key-value heads.
    """
    if config.get("kv_lora_rank") is not None:
        return *_latent(config, number, hidden, heads), windowed
    types = config.get("layer_types")
    if not isinstance(types, list):
        return 0, 0, windowed
    size, full = number("head_dim", default=0) or hidden // heads, types.count("full_attention")
    if "linear_attention" in types:
        keys = number("linear_num_key_heads") * number("linear_key_head_dim")
        values = number("linear_num_value_heads") * number("linear_value_head_dim")
        queries = heads * (2 if config.get("attn_output_gate", True) else 1)
        own = hidden * size * (queries + heads + 2 * kv_heads)
        linear = hidden * (2 * keys + 3 * values)
        return full * own + (len(types) - full) * linear, 0, windowed
    wide = number("global_head_dim", default=0)
    if not wide:
        return 0, 0, windowed
    few = number("num_global_key_value_heads", default=0) or kv_heads
    local = len(types) - full
    shared = 1 if config.get("attention_k_eq_v") else 2
    weights = hidden * (local * size * (2 * heads + 2 * kv_heads) + full * wide * (2 * heads + shared * few))
    kept = 2 * local * kv_heads * size, 2 * full * few * wide
    return weights, sum(kept), len(types) * kept[0] / sum(kept)


def _head_dim(config: Mapping[str, Any], number: Callable[..., int]) -> int:
    """Size of a head; with latent attention the mean of its keys' and its values'. 0 where the file does not say."""
    if config.get("kv_lora_rank") is None:
        return number("head_dim", default=0)
    return (number("qk_nope_head_dim") + number("qk_rope_head_dim") + number("v_head_dim")) // 2


def _latent(
    config: Mapping[str, Any], number: Callable[..., int], hidden: int, heads: int
) -> tuple[int, int]:
    """Weights of all layers and cached elements of a token with multi-head latent attention.

    One compressed vector and one rotated key are kept for all heads (DeepSeek-V2, arXiv 2405.04434, section 2.1).
    """
    layers, rank, rope = number("num_hidden_layers"), number("kv_lora_rank"), number("qk_rope_head_dim")
    plain, values = number("qk_nope_head_dim"), number("v_head_dim")
    squeezed = number("q_lora_rank", default=0)
    queries = squeezed * (hidden + heads * (plain + rope)) if squeezed else hidden * heads * (plain + rope)
    each = queries + hidden * (rank + rope) + rank * heads * (plain + values) + heads * values * hidden
    return layers * each, layers * (rank + rope)


def _tied_by_default(kind: str) -> bool:
    """What transformers assumes where `tie_word_embeddings` is not written."""
    return kind not in {
        "deepseek_v2",
        "deepseek_v3",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt_neox",
        "gpt_oss",
        "gptj",
        "granite",
        "granitemoe",
        "llama",
        "llama4",
        "llama4_text",
        "ministral",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "qwen3_next",
        "seed_oss",
        "stablelm",
    }  # fmt: skip  (transformers 4.57.6, the default of each config class)


def _windows(config: Mapping[str, Any], kind: str, layers: int) -> tuple[int, int]:
    """`(window, number of layers that use it)`."""
    types = config.get("layer_types")
    if isinstance(types, list) and "linear_attention" in types:
        # A linear-attention layer keeps a state of fixed size: next to nothing beside a cache.
        return 1, sum(t == "linear_attention" for t in types)
    chunked = config.get("attention_chunk_size")
    if kind.startswith("llama4") and isinstance(chunked, int):
        # Every fourth layer sees the whole context.
        return chunked, types.count("chunked_attention") if isinstance(types, list) else layers - layers // 4
    window = config.get("sliding_window")
    if not isinstance(window, int) or isinstance(window, bool) or window <= 0:
        return 0, 0
    if config.get("use_sliding_window") is False:
        return 0, 0
    if isinstance(types, list):
        return window, sum(t == "sliding_attention" for t in types)
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern")
    if not pattern and kind.startswith("gemma3"):
        pattern = 6
    if not pattern and kind in {"gemma2", "cohere2"}:
        pattern = 2 if kind == "gemma2" else 4
    if isinstance(pattern, int) and pattern > 0:
        # Every `pattern`-th layer is global.
        return window, layers - layers // pattern
    if kind.startswith("qwen2") and isinstance(config.get("max_window_layers"), int):
        return window, max(0, layers - config["max_window_layers"])
    return window, layers
