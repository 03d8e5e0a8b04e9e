"""ONNX through optimum: the standard decoder graph with KV cache, as a folder any ONNX runtime can load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from export.merge import Merged
from unshot.errors import InputError, OutsideError
from unshot.manifest import write_text

TASK = "text-generation-with-past"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt",
)  # fmt: skip


def supported(model_type: str) -> None:
    """`OutsideError` without the packages, `InputError` for an architecture that the exporter does not know."""
    try:
        from optimum.exporters.onnx import main_export  # noqa: F401
        from optimum.exporters.tasks import TasksManager
    except ImportError as error:
        raise OutsideError(f"ONNX needs optimum-onnx ({error}); run `pip install 'unshot[export]'`") from None
    try:
        tasks = TasksManager.get_supported_tasks_for_model_type(
            model_type, "onnx", library_name="transformers"
        )
    except KeyError:
        tasks = {}
    if TASK not in tasks:
        raise InputError(
            f"model type {model_type} has no ONNX graph with KV cache in optimum; export GGUF instead"
        )


def write_merged(folder: Path, base: Path, tensors: Merged, *, shard_bytes: int = 2 * 1024**3) -> None:
    """Write the merged model as Hugging Face safetensors in fp32, shard by shard, with config and tokenizer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = [{}]
    index: dict[str, int] = {}
    size = total = 0
    for name in tensors.names():
        count = 4
        for length in tensors.shape(name):
            count *= length
        if size and size + count > shard_bytes:
            save_file(shards[-1], folder / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
            shards.append({})
            shards[-2] = {}
            size = 0
        shards[-1][name] = tensors.rows(name).contiguous()
        index[name], size, total = len(shards), size + count, total + count
    save_file(shards[-1], folder / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
    names = {n: f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)}
    if len(shards) == 1:
        names = {1: "model.safetensors"}
    for number, final in names.items():
        (folder / f"part-{number}.safetensors").rename(folder / final)
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": {k: names[v] for k, v in index.items()}}
        write_text(folder / "model.safetensors.index.json", json.dumps(content, indent=2) + "\n")
    config = {**tensors.config, "torch_dtype": "float32"}
    config.pop("dtype", None)
    config["tie_word_embeddings"] = tensors.tied and not tensors.untied
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    copy_tokenizer(base, folder)


def copy_tokenizer(base: Path, folder: Path) -> None:
    """Copy the tokenizer's files as they are: a tokenizer loaded and saved again may come out different."""
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def write_onnx(folder: Path, base: Path, tensors: Merged, scratch: Path, ends: list[int]) -> None:
    """Write `model.onnx` (external data over 2 GB), config, tokenizer and generation config into `folder`.

    `scratch` holds the merged safetensors meanwhile. `ends` are the tokens at which generation stops.
    """
    import contextlib
    import io
    import logging
    import warnings

    supported(str(tensors.config.get("model_type")))
    from optimum.exporters.onnx import main_export

    write_merged(scratch, base, tensors)
    noise = io.StringIO()
    logging.getLogger("optimum").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(noise):
        warnings.simplefilter("ignore")
        main_export(
            str(scratch),
            output=folder,
            task=TASK,
            device="cpu",
            dtype="fp32",
            do_validation=False,
            trust_remote_code=False,
            no_post_process=False,
        )
    shutil.rmtree(scratch, ignore_errors=True)
    for stale in folder.glob("chat_template*"):
        stale.unlink()
    copy_tokenizer(base, folder)
    path = folder / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    write_text(path, json.dumps(config, indent=2) + "\n")
