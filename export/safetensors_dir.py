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

from export.families import Config
from export.gguf_file import encode
from export.merge import Merged
from unshot.catalog.formats import Target
from unshot.data.files import write_text

# our name -> safetensors dtype, bytes, torch's name in config.json
DTYPES = {"f32": ("F32", 4, "float32"), "f16": ("F16", 2, "float16"), "bf16": ("BF16", 2, "bfloat16")}
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
        _write_shard(folder / file, tensors, names, precision, progress)
        index.update(dict.fromkeys(names, file))
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
    if tensors.resized:
        config["vocab_size"] = tensors.resized
    return config


def refuse(target: Target, merged: Merged, tokenizer: Path) -> None:
    """Any architecture that transformers loads is written."""


def _write_shard(
    path: Path, tensors: Merged, names: list[str], precision: str, progress: Callable[[int], None] | None
) -> None:
    kind, width, _ = DTYPES[precision]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        shape = tensors.shape(name)
        end = offset + width * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            for start, stop in tensors.ranges(name):
                data = encode(tensors.rows(name, start, stop), precision, name)
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
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    write_text(path, json.dumps(config, indent=2) + "\n")
