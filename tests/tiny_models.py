"""Tiny random models of every family the exporter writes, with real tokenizers trained on a few sentences."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

TEXT = [
    "The supplier shall not be liable for any indirect loss under this agreement.",
    "Either party may end the contract on sixty days' written notice; fees are due in 30 days.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 40))  # 42",
    "Qui a écrit cela? Größe, naïve, договор, 合同 🙂",
    "What's the price? It's $1,234.56, isn't it? I'm sure we'll see 2024 again.",
] * 4
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# family -> (config class, its own settings, tokenizer kind)
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", {"rope_theta": 500000.0, "attention_bias": False}, "llama-bpe"),
    "llama3": (
        "LlamaConfig",
        {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        "llama-bpe",
    ),
    "mistral": ("MistralConfig", {"head_dim": 32, "sliding_window": None}, "spm"),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True, "rope_theta": 1000000.0}, "qwen2"),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "rope_theta": 1000000.0}, "qwen2"),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
        "spm-bare",
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 7},
        "spm-bare",
    ),
    "phi3": (
        "Phi3Config",
        {"sliding_window": None, "pad_token_id": 0, "original_max_position_embeddings": 256},
        "spm",
    ),
}


def make(family: str, folder: Path, *, seed: int = 0, dtype: str = "float32", **more: Any) -> Path:
    """Write a random model of a family with its tokenizer; every tensor, norms and biases too, is random.

    `more` are further settings of its configuration.
    """
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    kind, settings, tokenizer = FAMILIES.get(family) or OTHERS[family]
    settings = {**settings, **more}
    size = write_tokenizer(folder, tokenizer)
    rope = settings.get("rope_scaling")
    plain = {k: v for k, v in settings.items() if k not in ("rope_scaling", "text_config")}
    scaling = {"rope_scaling": dict(rope)} if rope else {}
    own = {"vocab_size": size, "bos_token_id": 1, "eos_token_id": 2}
    if "hidden_size_per_layer_input" in settings:
        own["vocab_size_per_layer_input"] = size
    if "text_config" in settings:  # a model with images, of which the text part is looked at
        config = getattr(transformers, kind)(
            text_config={**settings["text_config"], **scaling, **own}, **plain
        )
    else:
        config = getattr(transformers, kind)(**{**SHAPE, **plain}, **scaling, **own)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.uniform_(-0.2, 0.2)
                if name.endswith("norm.weight") and "gemma" not in family:
                    value.add_(1.0)
            else:
                value.normal_(0, 0.6 / value.shape[-1] ** 0.5 if "embed" not in name else 0.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder, safe_serialization=True)
    return folder


def write_tokenizer(folder: Path, kind: str) -> int:
    """Train and write a tokenizer; returns its size."""
    return _spm(folder, prefix=kind == "spm") if kind.startswith("spm") else _byte_level(folder, kind)


def _settings(folder: Path, **more: Any) -> None:
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    content = {
        "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        **more,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2))


def _byte_level(folder: Path, kind: str) -> int:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    from unshot.text.gguf import PRE

    kind, _, more = kind.partition("+")
    pattern = PRE[kind]
    tokenizer = Tokenizer(models.BPE())
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<unk>", "<|endoftext|>", "<|im_end|>", "<|im_start|>", *([more] if more else [])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    _settings(folder)
    return tokenizer.get_vocab_size()


def _spm(folder: Path, *, prefix: bool) -> int:
    """A byte-fallback BPE tokenizer as Llama 2's or Gemma's, and the same as a SentencePiece model."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    learned = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    learned.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=520, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
    )
    learned.train_from_iterator(TEXT, trainer)
    data = json.loads(learned.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in data["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=data["vocab"], merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    _settings(folder, unk_token="<unk>")
    _write_model(folder / "tokenizer.model", data["vocab"], merges)
    return len(data["vocab"])


def _write_model(path: Path, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges, start=1):
        ranks.setdefault(left + right, rank)
    out = b""
    for text, number in sorted(vocab.items(), key=lambda item: item[1]):
        kind = 2 if number == 0 else 3 if number < 4 else 6 if number < 260 else 1
        score = -float(ranks.get(text, len(merges) + 1)) if kind == 1 else 0.0
        raw = text.encode()
        piece = (
            b"\x0a" + _varint(len(raw)) + raw + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(kind)
        )
        out += b"\x0a" + _varint(len(piece)) + piece
    # TrainerSpec: model_type BPE (field 3), byte_fallback (field 35)
    path.write_bytes(out + b"\x12\x05\x18\x02\x98\x02\x01")


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


# Families outside those that are streamed: config class, its own settings, tokenizer kind.
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "granite": (
        "GraniteConfig",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2},
        "llama-bpe",
    ),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}, "llama-bpe"),
    "olmo2": ("Olmo2Config", {"pad_token_id": 0}, "llama-bpe"),
    # llama.cpp's converter looks its turn's token up by name
    "glm4": ("Glm4Config", {"head_dim": 16, "pad_token_id": 0}, "llama-bpe+<|user|>"),
    "stablelm": ("StableLmConfig", {}, "llama-bpe"),
    "falcon": ("FalconConfig", {"new_decoder_architecture": True, "alibi": False, "bias": False}, "llama-bpe"),
    "gpt_neox": ("GPTNeoXConfig", {}, "llama-bpe"),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}, "spm"),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16,
         "norm_topk_prob": True},
        "qwen2",
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "shared_expert_intermediate_size": 32},
        "qwen2",
    ),
    "gpt_oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 16, "pad_token_id": 0},
        "gpt-4o",
    ),
    "phi4_mini": (
        "Phi3Config",
        {"sliding_window": None, "pad_token_id": 0, "original_max_position_embeddings": 256,
         "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
        "gpt-4o",
    ),
    "ministral3": ("Ministral3Config", {"head_dim": 16, "sliding_window": None}, "tekken"),
    "gemma": ("GemmaConfig", {"head_dim": 32}, "spm-bare"),
    "gemma3_vision": (
        "Gemma3Config",
        {"text_config": {**SHAPE, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16,
                         "num_hidden_layers": 7},
         "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                           "num_attention_heads": 2, "image_size": 28, "patch_size": 14}},
        "spm-bare",
    ),
    "gemma3n": (
        "Gemma3nTextConfig",
        {"head_dim": 32, "sliding_window": 16, "num_hidden_layers": 5, "num_kv_shared_layers": 0,
         "hidden_size_per_layer_input": 16, "laurel_rank": 8, "intermediate_size": 96,
         "activation_sparsity_pattern": [0.0] * 5},
        "spm-bare",
    ),
    "smollm3": ("SmolLM3Config", {"pad_token_id": 0}, "llama-bpe"),
    "cohere2": (
        "Cohere2Config",
        {"logit_scale": 0.25, "sliding_window": 16, "head_dim": 16, "rotary_pct": 1.0},
        "llama-bpe",
    ),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_ctx": 256}, "llama-bpe"),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}, "llama-bpe"),
    "lfm2": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"], "block_ff_dim": 96, "block_auto_adjust_ff_dim": False,
         "conv_L_cache": 3},
        "llama-bpe",
    ),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}, "llama-bpe"),
    "phi": ("PhiConfig", {"pad_token_id": 0, "num_key_value_heads": 4, "intermediate_size": 256}, "llama-bpe"),
}  # fmt: skip
