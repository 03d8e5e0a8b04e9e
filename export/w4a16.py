"""`hf:w4a16`: 4-bit weights in compressed-tensors' form for vLLM, rounded by llm-compressor's GPTQ on training rows.

llm-compressor holds transformers to a range of its own: it is taken from this environment, or from the one whose
interpreter `UNSHOT_COMPRESSOR_PYTHON` names. Nothing here runs what it writes as vLLM does, so such a file is never
called equal: its tensors are compared with the model's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from export.families import Config
from export.merge import Merged
from export.packages import last_line
from export.safetensors_dir import copy_tokenizer, set_ends
from unshot.data.files import write_text
from unshot.errors import InputError, OutsideError

PYTHON = "UNSHOT_COMPRESSOR_PYTHON"
PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
GROUP = 128  # inputs that share a scale


def refuse(merged: Merged) -> None:
    """`OutsideError` without llm-compressor, `InputError` for rows that its groups do not fit."""
    if PYTHON not in os.environ and importlib.util.find_spec("llmcompressor") is None:
        raise OutsideError(
            "hf:w4a16 is written by llm-compressor, which is not installed here; give it an environment of its own "
            f"(pip install llmcompressor) and name that one's interpreter in {PYTHON}, or use --to hf:fp8"
        )
    widths = [merged.config["hidden_size"], merged.config.get("intermediate_size") or GROUP]
    odd = [width for width in widths if width % GROUP]
    if odd:
        raise InputError(
            f"hf:w4a16 shares a scale between {GROUP} inputs, and this model has layers of {odd[0]}; use --to hf:fp8"
        )


def write(
    folder: Path, tokenizer: Path, source: Path, rows: list[list[int]], ends: list[int], config: Config
) -> None:
    """Write the directory; `source` holds the merged safetensors, `rows` the token ids that it is calibrated on.

    `config` is the base's own, which a newer transformers would write in another form.
    """
    ids = source / "calibration.json"
    ids.write_text(json.dumps(rows), encoding="utf-8")
    interpreter = os.environ.get(PYTHON) or sys.executable
    child = Path(__file__).with_name("compressor_child.py")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    try:
        done = subprocess.run(
            [interpreter, "-P", str(child), str(source), str(folder), str(ids)], capture_output=True,
            env=environment, cwd=source, check=False,
        )  # fmt: skip
    except OSError as error:
        raise OutsideError(
            f"{PYTHON}={interpreter}: cannot be run ({error.strerror}); give a Python interpreter"
        ) from None
    ids.unlink()
    if done.returncode:
        raise OutsideError(f"llm-compressor could not write hf:w4a16 ({last_line(done.stderr)})")
    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = theirs["quantization_config"]
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    for stale in ("recipe.yaml", "chat_template.jinja"):
        (folder / stale).unlink(missing_ok=True)
    copy_tokenizer(tokenizer, folder)
    set_ends(folder, ends)


def values(packed: Any, scale: Any, shape: list[int]) -> Any:
    """fp32 weights of a layer: eight numbers less 8 in an int32, lowest bits first, one scale for `GROUP` inputs."""
    import torch

    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    numbers = ((packed.unsqueeze(-1) >> shifts) & 15).flatten(1)[:, : shape[1]].float() - 8
    scales = scale.float().repeat_interleave(shape[1] // scale.shape[1], dim=1)
    return numbers * scales
