"""ONNX Runtime GenAI's model builder: fused GroupQueryAttention, 4- and 8-bit weights, CPU or CUDA.

The builder is a command of the `onnxruntime-genai` package and runs in a process of its own, on the merged model as a
local Hugging Face directory, without any hub.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from export.families import Config
from export.merge import Merged
from export.packages import last_line
from export.safetensors_dir import copy_tokenizer, set_ends
from unshot import child
from unshot.catalog.formats import Target
from unshot.data.files import write_text
from unshot.errors import InputError, OutsideError

# Those whose logits tests/test_export_onnx.py compares with transformers'; the builder knows more.
ARCHITECTURES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
)  # fmt: skip
WRONG = {
    "Gemma2ForCausalLM": "GenAI's builder (0.15) gives the sliding window to the odd layers, where Gemma 2 has it on "
    "the even ones, so that what lies past the window comes out wrong; use onnx:fp32 or gguf"
}
PROVIDERS = {"genai": "cpu", "genai-cuda": "cuda"}


def refuse(target: Target, merged: Merged, tokenizer: Path) -> None:
    """See `supported`."""
    supported(merged.config, target.kind)


def supported(config: Config, kind: str) -> None:
    """`OutsideError` without the package (or, for CUDA, the device), `InputError` for another architecture."""
    names = config.get("architectures") or ["(none)"]
    if names[0] in WRONG:
        raise InputError(f"{names[0]}: {WRONG[names[0]]}")
    if names[0] not in ARCHITECTURES:
        raise InputError(
            f"architecture {names[0]} is not written as GenAI here; supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise OutsideError(
            f"genai needs ONNX Runtime GenAI ({error}); run `pip install 'unshot[export]'`"
        ) from None
    if kind == "genai-cuda" and not (onnxruntime_genai.is_cuda_available() and has_driver()):
        raise OutsideError(
            "genai-cuda is checked on the device it is for, and there is no CUDA device here; "
            "export on a machine with one, or use genai:int4"
        )


def has_driver() -> bool:
    """Whether NVIDIA's driver is on this machine."""
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def write_genai(folder: Path, target: Target, tokenizer: Path, source: Path, ends: list[int]) -> None:
    """Write a GenAI directory: `model.onnx` with its data, `genai_config.json`, tokenizer.

    `source` holds the merged safetensors. `ends` are the tokens at which generation stops.
    """
    command = [
        *child.command("onnxruntime_genai.models.builder"), "-i", str(source), "-o", str(folder),
        "-p", target.precision, "-e", PROVIDERS[target.kind], "-c", str(source / "cache"),
    ]  # fmt: skip
    if target.precision == "int8":
        # Builder 0.15 looks for a tied 8-bit head under its 4-bit name, and writes a graph that nothing loads.
        command += ["--extra_options", "shared_embeddings=false"]
    done = subprocess.run(
        command, capture_output=True, env=child.environment(HF_HUB_OFFLINE="1"), check=False
    )
    if done.returncode or not (folder / "genai_config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        raise OutsideError(f"GenAI's model builder failed: {last_line(done.stderr)}")
    copy_tokenizer(tokenizer, folder)
    set_ends(folder, ends)
    path = folder / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["eos_token_id"] = ends
    write_text(path, json.dumps(config, indent=2) + "\n")
