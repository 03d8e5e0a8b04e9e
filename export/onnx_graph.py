"""ONNX through optimum: the standard decoder graph with KV cache, as a folder any ONNX runtime can load.

optimum runs in a child process: in this environment where it fits; else with its own pinned transformers beside the
packages here, installed into the cache on first use, since it holds transformers below 4.58; or in the environment
whose interpreter `UNSHOT_OPTIMUM_PYTHON` names.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from export.merge import Merged
from export.packages import folder_of, last_line
from export.safetensors_dir import copy_tokenizer, set_ends
from unshot.catalog.formats import Target
from unshot.errors import InputError, OutsideError

PYTHON = "UNSHOT_OPTIMUM_PYTHON"
# Written and checked in tests/test_export_onnx.py; for others optimum is asked, which takes seconds to import.
# What optimum-onnx 0.1 was tried with; the rest (torch, onnx, numpy) is what lies here.
PINNED = (
    "optimum-onnx==0.1.0", "optimum==2.1.0", "transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2",
)  # fmt: skip
KNOWN = {"llama", "mistral", "qwen2", "qwen3"}


def optimum(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run `export.optimum_child`; `OutsideError` where there is no optimum."""
    interpreter = os.environ.get(PYTHON) or sys.executable
    child = Path(__file__).with_name("optimum_child.py")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    if PYTHON not in os.environ and not installed():
        folder = folder_of(
            "optimum-onnx-0.1.0", PINNED, "optimum/exporters/onnx",
            "ONNX is written by optimum, which needs an older transformers than the one here",
            f"give it an environment of its own and name that one's interpreter in {PYTHON}, or use --to genai:fp32",
        )  # fmt: skip
        environment["PYTHONPATH"] = str(folder)
    try:
        done = subprocess.run(
            [interpreter, "-P", str(child), *arguments], capture_output=True, env=environment, check=False
        )
    except OSError as error:
        raise OutsideError(
            f"{PYTHON}={interpreter}: cannot be run ({error.strerror}); give a Python interpreter"
        ) from None
    if done.returncode == 3:
        raise OutsideError(
            f"onnx:fp32 is written by optimum-onnx, which {interpreter} does not have ({last_line(done.stderr)}); run "
            "`pip install 'unshot[onnx]'` (it holds transformers below 4.58), or give it an environment of its own "
            f"and name that one's interpreter in {PYTHON}, or use --to genai:fp32"
        )
    return done


def installed() -> bool:
    """Whether optimum's ONNX exporter is in this environment, and transformers as old as it needs."""
    try:
        importlib.metadata.version("optimum-onnx")
        major, minor, *_ = importlib.metadata.version("transformers").split(".")
    except importlib.metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) < (4, 58)


def supported(model_type: str) -> None:
    """`OutsideError` without optimum, `InputError` for an architecture that it does not know."""
    if model_type in KNOWN and PYTHON not in os.environ and installed():
        return
    if optimum("supports", model_type).returncode:
        raise InputError(
            f"model type {model_type} has no ONNX graph with KV cache in optimum; export gguf or hf:bf16 instead"
        )


def refuse(target: Target, merged: Merged, tokenizer: Path) -> None:
    """See `supported`."""
    supported(str(merged.config.get("model_type")))


def write_onnx(folder: Path, tokenizer: Path, source: Path, ends: list[int]) -> None:
    """Write `model.onnx` (external data over 2 GB), config, tokenizer and generation config into `folder`.

    `source` holds the merged safetensors. `ends` are the tokens at which generation stops.
    """
    done = optimum("export", str(source), str(folder))
    if done.returncode:
        raise OutsideError(f"optimum could not write the graph: {last_line(done.stderr)}")
    for stale in folder.glob("chat_template*"):
        stale.unlink()
    copy_tokenizer(tokenizer, folder)
    set_ends(folder, ends)
