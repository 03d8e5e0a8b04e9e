"""Twelve cells of `docs/families.md` checked by code that the gate shares nothing with.

    python -m tests.benchmarks.check_export_cells [FAMILY:TARGET ...]

The command line writes the file (`--allow-drift`, so that the gate's word does not count); peft and transformers say
what the model answers; the file is run by its engine's own Python package. Prints the KL of each cell in nats.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.export_cases import make_run
from tests.tiny_models import make

CELLS = (
    "llama:gguf:f32", "llama3:gguf:q8_0", "mistral:gguf:f32", "gemma2:gguf:f32", "gemma3:gguf:f32", "phi3:gguf:f32",
    "granite:gguf:f32", "glm4:gguf:f32", "mixtral:gguf:f32", "cohere:hf:f32", "qwen2:onnx:fp32", "qwen3:genai:fp32",
)  # fmt: skip
IDS = [5, 9, 33, 70, 12, 8, 40, 41, 42, 43, 100, 7, 301, 222, 64, 90, 17, 250, 299, 30, 31, 32]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def peft_says(base: Path, adapter: Path) -> np.ndarray:
    """Logits of the unmerged model, shape `(len(IDS), vocab)`."""
    eager = "eager"  # the soft cap of Gemma 2 is only there
    net = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32, attn_implementation=eager)
    with torch.inference_mode():
        return np.asarray(
            PeftModel.from_pretrained(net, str(adapter)).eval()(torch.tensor([IDS])).logits[0].numpy()
        )


def file_says(path: Path) -> np.ndarray:
    """Logits of an exported file at the same positions, by its engine's package."""
    if path.suffix == ".gguf":
        import llama_cpp

        model = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, flash_attn=False)
        model.eval(IDS)
        return np.array(model.scores[: len(IDS)])
    if (path / "genai_config.json").is_file():
        import onnxruntime_genai as og

        genai = og.Model(str(path))
        parameters = og.GeneratorParams(genai)
        parameters.set_search_options(max_length=len(IDS) + 8)
        rows = []
        generator = og.Generator(genai, parameters)
        for token in IDS:
            generator.append_tokens([token])
            rows.append(np.array(generator.get_output("logits"))[0, -1])
        return np.stack(rows)
    if (path / "model.onnx").is_file():
        import onnxruntime as ort

        session = ort.InferenceSession(str(path / "model.onnx"), providers=["CPUExecutionProvider"])
        feed = {
            "input_ids": np.array([IDS]), "attention_mask": np.ones((1, len(IDS)), np.int64),
            "position_ids": np.arange(len(IDS))[None],
        }  # fmt: skip
        for one in session.get_inputs():
            if one.name.startswith("past"):
                shape = [1 if "batch" in str(d) else 0 if isinstance(d, str) else d for d in one.shape]
                feed[one.name] = np.zeros(shape, np.float32)
        names = {i.name for i in session.get_inputs()}
        return np.asarray(session.run(["logits"], {k: v for k, v in feed.items() if k in names})[0][0])
    net = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
    with torch.inference_mode():
        return np.asarray(net.eval()(torch.tensor([IDS])).logits[0].numpy())


def main() -> None:
    """See the module's text."""
    with tempfile.TemporaryDirectory(prefix="cells-") as scratch:
        for cell in sys.argv[1:] or CELLS:
            family, _, target = cell.partition(":")
            root = Path(scratch, cell.replace(":", "-"))
            adapter = {"target_modules": ["q_proj", "v_proj"]} if family == "mixtral" else {}
            run = make_run(make(family, root / "base"), root / "run", **adapter)
            command = [
                sys.executable,
                "-m",
                "unshot",
                "export",
                str(run),
                "--to",
                target,
                "--out",
                str(root / "art"),
            ]
            done = subprocess.run(
                [*command, "--allow-drift", "-q", "--check-rows", "2"],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                print(f"{cell}: not written: {done.stderr.strip().splitlines()[-1][:200]}", flush=True)
                continue
            (path,) = [p for p in (root / "art").iterdir() if p.suffix == ".gguf" or p.is_dir()]
            ours, theirs = (
                log_softmax(peft_says(root / "base", run / "adapter")),
                log_softmax(file_says(path)),
            )
            width = min(ours.shape[1], theirs.shape[1])
            kl = (np.exp(ours[:, :width]) * (ours[:, :width] - theirs[:, :width])).sum(axis=1)
            print(f"{cell}: mean KL {kl.mean():.2e}, largest {kl.max():.2e}", flush=True)


if __name__ == "__main__":
    main()
