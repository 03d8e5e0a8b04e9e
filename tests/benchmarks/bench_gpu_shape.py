"""Long few-shot prompt against short prompt on a model of a given shape, for a GPU (or a CPU at 135M).

Run: python -m tests.benchmarks.bench_gpu_shape --shape 7b --prompt-tokens 2000 [--requests 40]
The weights are random: speed does not depend on them, and none are downloaded. The quality gate is meaningless here
and its verdict is not printed. A directory with the model (14 GB at 7b) is made and removed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.summary import ratio
from unshot import embedded

# hidden, layers, heads, kv heads, intermediate (Llama 2 7B; SmolLM2 135M)
SHAPES = {"7b": (4096, 32, 32, 32, 11008), "135m": (576, 30, 9, 3, 1536)}


def make_model(folder: Path, shape: str) -> None:
    """Random weights in bf16 of a llama-family shape, with the embedded model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, kv_heads, inner = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=2,
        bos_token_id=1,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded.ensure() / name, folder / name)


def main() -> None:
    """Print the ratios with the prefix cache on and off."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=list(SHAPES), default="135m")
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--cold-requests", type=int, default=5)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves the choice to bench")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", options.shape)
        rows = [f"Clause {i}: the tenant pays the rent on day {i} of every month." for i in range(10)]
        data = folder / "data.jsonl"
        data.write_text("".join(json.dumps({"prompt": r, "completion": "yes"}) + "\n" for r in rows))
        shots = folder / "shots.jsonl"
        shot = {
            "prompt": "The tenant pays the rent on the first day of every month. " * 8,
            "completion": "yes",
        }
        shots.write_text((json.dumps(shot) + "\n") * max(1, options.prompt_tokens // 105))
        spec = f"torch:{folder / 'model'}"
        done = subprocess.run(
            [
                sys.executable, "-m", "unshot", "bench", "--baseline", spec, "--candidate", spec, "--data", str(data),
                "--baseline-prompt", str(shots), "--instruction", "Answer.", "--requests", str(options.requests),
                "--cold-requests", str(options.cold_requests), "--max-tokens", str(options.output_tokens),
                "--out", str(folder / "report"), "--json",
                *(["--threads", str(options.threads)] if options.threads else []),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        if done.returncode not in (0, 1):
            raise SystemExit(done.returncode)
        report = json.loads((folder / "report" / "report.json").read_text())
    print(f"{report['systems']['candidate']['model']} on {report['systems']['candidate']['device']}, batch 1")
    for mode, facts in report["modes"].items():
        speed = facts["claim"]["speed"]
        sides = ", ".join(
            f"{s} {facts[s]['tokens']['prompt']:.0f} prompt tokens, TTFT p50 "
            f"{facts[s]['ttft_ms']['p50']['value']:.1f} ms, end to end p50 {facts[s]['e2e_ms']['p50']['value']:.1f} ms"
            for s in ("baseline", "candidate")
        )
        print(f"{mode}: {ratio(speed)} faster; {sides}")


if __name__ == "__main__":
    main()
