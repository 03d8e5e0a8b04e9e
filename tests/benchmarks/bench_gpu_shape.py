"""Long few-shot prompt against short prompt on a model of a given shape, for a GPU (or a CPU at 135M).

Run: python -m tests.benchmarks.bench_gpu_shape --shape 7b --prompt-tokens 2000 [--requests 40] [--engines torch,onnx]
The weights are random: speed does not depend on them, and none are downloaded. The quality gate is meaningless here
and its verdict is not printed. First `unshot bench` at batch 1, then static batches of 1, 2, 4, ... to saturation. A
directory with the model (14 GB at 7b, and 28 GB for its ONNX graph) is made and removed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from bench.records import SIDES
from bench.resources import memory_words, power_words
from bench.summary import ratio, time
from tests.benchmarks.batched import Onnx, Torch, to_saturation
from unshot import embedded
from unshot.contracts.report import BenchReport

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


def write_case(folder: Path, prompt_tokens: int) -> None:
    """Rows, and examples of about so many tokens."""
    rows = [f"Clause {i}: the tenant pays the rent on day {i} of every month." for i in range(10)]
    lines = [json.dumps({"prompt": r, "completion": "yes"}) + "\n" for r in rows]
    (folder / "data.jsonl").write_text("".join(lines))
    shot = {"prompt": "The tenant pays the rent on the first day of every month. " * 8, "completion": "yes"}
    (folder / "shots.jsonl").write_text((json.dumps(shot) + "\n") * max(1, prompt_tokens // 105))


def spec_of(engine: str, folder: Path) -> str:
    """The model in the form of an engine: exported for ONNX Runtime, served by vLLM."""
    path = folder / "model"
    if engine == "vllm":
        return f"serve:vllm:{path}"
    if engine == "onnx":
        # Random weights have near-ties everywhere: the gate's verdict is of no interest here.
        subprocess.run(
            [
                sys.executable, "-m", "unshot", "export", str(path), "--to", "onnx:fp32", "--allow-drift",
                "--check-rows", "1", "--out", str(folder / "exported"), "-q",
            ],
            stdout=subprocess.DEVNULL,
            check=True,
        )  # fmt: skip
        path = folder / "exported" / "onnx-fp32"
    return f"{engine}:{path}"


def table_row(report: BenchReport) -> str:
    """The figures of a report as lines of a table."""
    system = report.systems["candidate"]
    lines = []
    for mode, facts in report.modes.items():
        times = " | ".join(f"{time(facts.side(s).ttft_ms)} | {time(facts.side(s).e2e_ms)}" for s in SIDES)
        lines.append(f"| {system.library} | {report.gpu} | {mode} | {ratio(facts.claim.speed)} | {times} |\n")
    return "".join(lines)


def compare(engine: str, folder: Path, options: argparse.Namespace) -> BenchReport:
    """`unshot bench` of one engine, long prompt against short; print the ratios."""
    spec, out = spec_of(engine, folder), folder / f"report-{engine}"
    done = subprocess.run(
        [
            sys.executable, "-m", "unshot", "bench", "--baseline", spec, "--candidate", spec,
            "--data", str(folder / "data.jsonl"), "--baseline-prompt", str(folder / "shots.jsonl"),
            "--instruction", "Answer.", "--requests", str(options.requests),
            "--cold-requests", str(options.cold_requests), "--max-tokens", str(options.output_tokens),
            "--out", str(out), "--json", "-q",
            *(["--threads", str(options.threads)] if options.threads else []),
        ],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode not in (0, 1):
        raise SystemExit(done.returncode)
    report = BenchReport.read(out)
    system = report.systems["candidate"]
    print(f"{system.library}, {system.model} on {system.device}, batch 1")
    for mode, facts in report.modes.items():
        sides = ", ".join(
            f"{s} {facts.side(s).tokens.prompt:.0f} prompt tokens, TTFT p50 {time(facts.side(s).ttft_ms)}, end to end "
            f"p50 {time(facts.side(s).e2e_ms)}"
            for s in SIDES
        )
        print(f"  {mode}: {ratio(facts.claim.speed)} faster; {sides}", flush=True)
    print(f"  memory: {memory_words(report.resources)}; power: {power_words(report.resources)}")
    return report


def saturate(system: Torch | Onnx, options: argparse.Namespace) -> None:
    """Requests a second by batch, long and short prompt, with the shared beginning cached and not."""
    long, short, own = options.prompt_tokens, 60, 30
    most = options.most or (256 if system.device == "cuda" else 4)
    print(f"{system.name} on {system.device}, static batches, {options.output_tokens} answer tokens")
    ids = np.random.default_rng(0).integers(100, 49000, size=long).tolist()
    for cached in (True, False):
        best = {}
        for name, size in (("long", long), ("short", short)):
            points = to_saturation(
                system, ids[:size], size - own if cached else 0, options.output_tokens, most
            )
            best[name] = max((rate for _, rate in points), default=float("nan"))
            words = ", ".join(f"{batch}: {rate:.3g}/s" for batch, rate in points)
            print(
                f"  cache {'on' if cached else 'off'}, {name} prompt of {size} tokens, by batch {words}",
                flush=True,
            )
        print(
            f"  cache {'on' if cached else 'off'}: {best['short'] / best['long']:.2f}x the throughput at saturation"
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=list(SHAPES), default="135m")
    parser.add_argument("--engines", default="torch,onnx", help="of torch, onnx, vllm")
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--cold-requests", type=int, default=5)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves the choice to bench")
    parser.add_argument("--most", type=int, default=0, help="largest batch; default 256 on a GPU, 4 on a CPU")
    return parser.parse_args(arguments)


def main() -> None:
    """Print the ratios with the prefix cache on and off, at batch 1 and at saturation."""
    options = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", options.shape)
        write_case(folder, options.prompt_tokens)
        for engine in options.engines.split(","):
            compare(engine, folder, options)
            if engine == "vllm":
                continue
            path = folder / "exported" / "onnx-fp32" if engine == "onnx" else folder / "model"
            system = Onnx(path) if engine == "onnx" else Torch(path)
            saturate(system, options)
            system.close()


if __name__ == "__main__":
    main()
