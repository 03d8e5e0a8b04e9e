"""The merged model as a Hugging Face directory: safetensors written row by row, with config and tokenizer.

For vLLM, TGI and transformers, and what the ONNX writers start from. Nothing larger than a piece of a tensor is in
memory (format: https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from export import fp8
from export.families import Config, rope
from export.gguf_file import encode
from export.merge import Merged
from export.tensors import tail
from unshot.catalog.formats import Target
from unshot.data.files import optional_object, write_text
from unshot.errors import InputError

# our name -> safetensors dtype, bytes, torch's name in config.json
DTYPES = {
    "f32": ("F32", 4, "float32"), "f16": ("F16", 2, "float16"), "bf16": ("BF16", 2, "bfloat16"),
    "fp8": ("BF16", 2, "bfloat16"), "w4a16": ("BF16", 2, "bfloat16"),  # what is no linear layer
}  # fmt: skip
SHARD_BYTES = 4 * 10**9
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt",
)  # fmt: skip


def write_merged(
    folder: Path,
    base: Path,
    tensors: Merged,
    precision: str = "f32",
    *,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the merged model into `folder`; `progress` is called with the bytes just written.

    `tokenizer` is the directory of the tokenizer where that is not `base`. Raises `InputError` where a weight does not
    fit fp16, or is no finite number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    width = DTYPES[precision][1]
    layers = fp8.linear_layers(base) if precision == "fp8" else set()
    shards: list[list[str]] = [[]]
    size = total = 0
    for name in tensors.names():
        count = width * math.prod(tensors.shape(name))
        if size and size + count > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + count, total + count
    index = {}
    for number, names in enumerate(shards, start=1):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        eighths = {name for name in names if tail(name) in layers}
        _write_shard(folder / file, tensors, names, precision, progress, eighths)
        index.update(dict.fromkeys([*names, *(f"{name}{fp8.SCALE}" for name in eighths)], file))
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        write_text(folder / "model.safetensors.index.json", json.dumps(content, indent=2) + "\n")
    write_text(folder / "config.json", json.dumps(merged_config(base, tensors, precision), indent=2) + "\n")
    copy_tokenizer(base, folder)
    if tokenizer and tokenizer != base:
        copy_tokenizer(tokenizer, folder, ends=False)


def merged_config(base: Path, tensors: Merged, precision: str) -> Config:
    """The base's `config.json` with what the merge changed; nothing is left of a quantised upload."""
    config: Config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for key in ("dtype", "quantization_config", "unsloth_fixed", "unsloth_version"):
        config.pop(key, None)
    config |= {
        "torch_dtype": DTYPES[precision][2],
        "tie_word_embeddings": tensors.tied and not tensors.untied,
    }
    if precision == "fp8":
        config["quantization_config"] = fp8.settings()
    if tensors.resized:
        config["vocab_size"] = tensors.resized
    return config


def refuse(target: Target, merged: Merged, tokenizer: Path) -> None:
    """Any architecture that transformers loads is written; in 8 bits and fewer no mixture of experts."""
    if target.precision in ("fp8", "w4a16") and any("expert" in k and v for k, v in merged.config.items()):
        raise InputError(f"{target} is not written for mixtures of experts; use hf:bf16")


def _write_shard(
    path: Path,
    tensors: Merged,
    names: list[str],
    precision: str,
    progress: Callable[[int], None] | None,
    eighths: set[str],
) -> None:
    """One file; those in `eighths` as 8-bit floats, each followed by its scales."""
    kind, width, _ = DTYPES[precision]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0

    def place(name: str, dtype: str, size: int, shape: tuple[int, ...]) -> None:
        nonlocal offset
        end = offset + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end

    for name in names:
        shape = tensors.shape(name)
        if name in eighths:
            place(name, "F8_E4M3", 1, shape)
            place(f"{name}{fp8.SCALE}", "BF16", 2, (shape[0], 1))
        else:
            place(name, kind, width, shape)
    plain = "bf16" if precision == "fp8" else precision
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            if name in eighths:
                scales = b""
                for weight, scale in fp8.pieces(tensors, name):
                    handle.write(weight)
                    scales += scale
                    if progress:
                        progress(2 * len(weight))
                handle.write(scales)
                continue
            for start, stop in tensors.ranges(name):
                data = encode(tensors.rows(name, start, stop), plain, name)
                handle.write(data.data)
                if progress:
                    progress(data.nbytes)


def copy_tokenizer(base: Path, folder: Path, *, ends: bool = True) -> None:
    """Copy the tokenizer's files as they are: a tokenizer loaded and saved again may come out different."""
    for name in (*TOKENIZER_FILES, *(["generation_config.json"] if ends else [])):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def set_ends(folder: Path, ends: list[int]) -> None:
    """Write the tokens that end an answer into the folder's generation config."""
    path = folder / "generation_config.json"
    config = optional_object(path)
    config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    write_text(path, json.dumps(config, indent=2) + "\n")


def older_config(folder: Path) -> None:
    """Say the rotary settings as transformers 4 has them too: the writers that start from a directory may be older."""
    path = folder / "config.json"
    whole: Config = json.loads(path.read_text(encoding="utf-8"))
    for config in (whole, whole.get("text_config")):
        if not config or not config.get("rope_parameters"):
            continue
        settings = rope({"rope_parameters": config["rope_parameters"]})
        main = dict(settings.get("full_attention", settings))
        config.setdefault("rope_theta", main.pop("rope_theta", None))
        local = settings.get("sliding_attention", {}).get("rope_theta")
        if local is not None:
            config.setdefault("rope_local_base_freq", local)
        if main.get("partial_rotary_factor") is not None:
            config.setdefault("partial_rotary_factor", main["partial_rotary_factor"])
            config.setdefault("rotary_pct", main["partial_rotary_factor"])  # as GPT-NeoX has it
        if main.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", main)
    write_text(path, json.dumps(whole, indent=2) + "\n")
