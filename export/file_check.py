"""A full-precision GGUF file read back and held against the model's own files, where no prompt would show a fault.

A rotary length beyond the rows, an epsilon below the rounding, two rows of the embedding or two tokens that occur in no
row: none of these moves the logits of a test row. So the file's metadata is compared with the configuration, its tokens
and merges with `tokenizer.json`, and its embedding row by row with the merged one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from export import fp8, w4a16
from export.families import FAMILIES, Config, rope
from export.source import Model
from export.tensor_check import WEIGHT_ERROR
from export.tensors import Shards
from unshot.contracts.parity import FileReport
from unshot.text.gguf import Tensor, read

# GGUF key (behind the architecture's name) -> names of the same number in `config.json`.
SAME = {
    "block_count": ("num_hidden_layers", "n_layer"),
    "embedding_length": ("hidden_size", "n_embd"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_count": ("num_local_experts", "num_experts"),
    "logit_scale": ("logit_scale", "logits_scaling"),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "attention.scale": ("attention_multiplier",),
    "rope.freq_base": ("rope_theta",),
    "rope.freq_base_swa": ("rope_local_base_freq",),
    "rope.scaling.factor": ("factor",),
}
# Keys without which llama.cpp computes with a default of its own, where the configuration has them.
NEEDED = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope.freq_base",
    "rope.scaling.factor",
    "logit_scale",
)
# What llama.cpp takes where a key is missing.
DEFAULTS = {"rope.freq_base": 10000.0}
# Of the streamed families alone: other converters write these for models that do not use them, or by other rules.
STREAMED_SAME = {
    "context_length": ("max_position_embeddings",),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "rope.scaling.original_context_length": ("original_max_position_embeddings",),
}
WINDOWED = ("gemma2", "gemma3")
# Of a merged directory's config.json: what a merge may change, or a quantised upload have left.
MAY_CHANGE = {
    "dtype", "torch_dtype", "tie_word_embeddings", "vocab_size", "quantization_config", "unsloth_fixed",
    "unsloth_version",
}  # fmt: skip


def compare_with_model(model: Model, path: Path, report: FileReport) -> None:
    """Append to `report` what of a full-precision GGUF file is not the model's."""
    file = read(path)
    wrong = wrong_keys(model.config, file.fields)
    if wrong:
        report.failures.append(f"metadata is not the model's: {', '.join(wrong[:4])}")
    wrong = wrong_tokens(model, file.fields)
    if wrong:
        report.failures.append(f"{len(wrong)} tokens or merges are not the tokenizer's, first {wrong[0]}")
    rows = wrong_rows(model, file.tensors.get("token_embd.weight"))
    if rows:
        report.failures.append(
            f"{len(rows)} rows of the embedding are not the model's, first that of token {rows[0]}"
        )


def wrong_keys(config: Config, fields: Mapping[str, Any]) -> list[str]:
    """Numbers of the metadata that are not the configuration's, as `key 1 is 2`."""
    name = str(fields["general.architecture"])
    settings = rope(config)
    everywhere = settings.get("full_attention", settings)
    known = {**config, **{k: v for k, v in everywhere.items() if v is not None}}
    local = settings.get("sliding_attention", {}).get("rope_theta")
    if local is not None:
        known["rope_local_base_freq"] = local
    if (everywhere.get("rope_type") or "default").lower() not in ("linear", "yarn"):
        known.pop("factor", None)  # its factors are a tensor, or are written by another rule
    streamed = any(a in FAMILIES for a in config.get("architectures") or [])
    table = {**SAME, **(STREAMED_SAME if streamed else {})}
    if name in WINDOWED:
        table["attention.sliding_window"] = ("sliding_window",)
    found = []
    for key, names in table.items():
        wanted = next((known[n] for n in names if isinstance(known.get(n), (int, float))), None)
        value = fields.get(f"{name}.{key}")
        if wanted is None or isinstance(value, list):
            continue
        needed = key in NEEDED and (streamed or key == "rope.freq_base")
        if value is None and (needed or key.startswith("attention.sliding")):
            value = DEFAULTS.get(key)
            if value is None:
                found.append(f"{key} is missing ({wanted:g} in config.json)")
                continue
        if value is not None and not _near(float(value), float(wanted)):
            found.append(f"{key} is {value:g} ({wanted:g} in config.json)")
    return found


def _near(value: float, wanted: float) -> bool:
    return abs(value - wanted) <= 1e-6 * max(abs(value), abs(wanted))


def wrong_tokens(model: Model, fields: Mapping[str, Any]) -> list[str]:
    """Tokens by id, and merges, that are not those of `tokenizer.json`."""
    backend = model.chat.tokenizer.backend
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    added = model.chat.tokenizer.added
    found = []
    for text, number in backend.get_vocab(with_added_tokens=True).items():
        if number >= len(tokens):
            found.append(f"{text!r} is missing")
        elif tokens[number] not in (text, *([text.replace("\u2581", " ")] if number in added else [])):
            found.append(f"{tokens[number]!r} for {text!r}")
    data = json.loads((model.tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    theirs = fields.get("tokenizer.ggml.merges")
    if theirs is not None and not found:
        merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"].get("merges", [])]
        found += [f"the merge {b!r} for {a!r}" for a, b in zip(merges, theirs, strict=False) if a != b]
        found += ["the number of merges"] if len(merges) != len(theirs) else []
    return found


def wrong_rows(model: Model, tensor: Tensor | None) -> list[int]:
    """Rows of the embedding that differ from the merged model's by more than their type's rounding."""
    merged = model.merged()
    if tensor is None or merged.embedding not in merged.base:
        return []
    bound = 2 * WEIGHT_ERROR.get(tensor.type_name, 1.0)  # a row may be worse than its tensor
    found: list[int] = []
    for start, stop in merged.ranges(merged.embedding):
        ours = merged.rows(merged.embedding, start, stop).numpy()
        theirs = tensor.values(start, stop)
        width = min(len(ours), len(theirs))
        apart = np.linalg.norm(theirs[:width] - ours[:width], axis=1)
        found += (
            start + np.flatnonzero(~(apart <= bound * np.linalg.norm(ours[:width], axis=1) + 1e-12))
        ).tolist()
    return found


def _written(folder: Path) -> tuple[Shards, set[str]]:
    """A directory's tensors, and the names of those in 8 bits or 4, which `Shards` refuses to read as weights."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    names: set[str] = set()
    for path in files:
        with safe_open(path, "pt") as handle:
            names |= {n.removesuffix(fp8.SCALE) for n in handle.keys() if n.endswith(f".weight{fp8.SCALE}")}  # noqa: SIM118
    parts = ("", fp8.SCALE, w4a16.PACKED, w4a16.SHAPE)
    return Shards(files, skip={f"{n}{part}" for n in names for part in parts}), names


def _coded(folder: Path, name: str) -> tuple[str, Any]:
    """The type of a layer in 8 bits or 4, and the fp32 values that it stands for."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as handle:
            if f"{name}{w4a16.PACKED}" in handle.keys():  # noqa: SIM118 (no mapping)
                packed, scale, shape = (
                    handle.get_tensor(f"{name}{part}") for part in (w4a16.PACKED, w4a16.SCALE, w4a16.SHAPE)
                )
                return "W4A16", w4a16.values(packed, scale, shape.tolist())
    return "F8_E4M3", fp8.read(folder, name)


def compare_directory(model: Model, folder: Path, report: FileReport) -> None:
    """Append to `report` what of a written Hugging Face directory is not the merged model, tensor by tensor."""
    merged = model.merged()
    written, eighths = _written(folder)
    wrong = sorted({*merged.names()} ^ {*written, *eighths})
    for name in merged.names():
        if name in written and written.shape(name) != merged.shape(name):
            wrong.append(name)
        elif name not in wrong:
            kind, whole = _coded(folder, name) if name in eighths else (written[name].dtype, None)
            bound = WEIGHT_ERROR[kind]
            apart = size = 0.0
            for start, stop in merged.ranges(name):
                ours = merged.rows(name, start, stop)
                theirs = written[name].read(start, stop).float() if whole is None else whole[start:stop]
                apart, size = apart + float((theirs - ours).square().sum()), size + float(ours.square().sum())
            if not apart <= bound**2 * size:
                wrong.append(name)
    if wrong:
        report.failures.append(f"{len(wrong)} tensors are not the model's, first `{wrong[0]}`")
    ours = model.base.config()
    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    changed = [k for k in {*ours, *theirs} - MAY_CHANGE if ours.get(k) != theirs.get(k)]
    if changed:
        report.failures.append(f"config.json is not the base's: {', '.join(sorted(changed)[:4])}")
