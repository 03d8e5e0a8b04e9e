"""Prefill and decode tokens/s of one model in every engine, one table, one run.

Run: python tests/benchmarks/bench_engines.py FOLDER [--model smollm2-135m] [--rounds 3] [--prompt 256] [--tokens 64]

Exports the model to FOLDER/artifacts where that is not there yet (optimum's fp32 graph, GenAI in fp32, int8 and int4,
GGUF), then times each file and the torch model in a process of its own, in rounds that go back and forth. On a GPU
machine the torch, onnx and genai-cuda engines use the GPU: add genai-cuda:int4 with --to.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TARGETS = ("onnx:fp32", "genai:fp32", "genai:int8", "genai:int4", "gguf:f16", "gguf:q8_0", "gguf:q4_k_m")
TEXT = (
    "The supplier shall indemnify the customer against all claims that arise from a breach of this agreement, "
    "limited to the fees paid in the twelve months before the claim. Either party may end the agreement on sixty "
    "days' written notice; fees already paid are not returned. "
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--to", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prepare", action="store_true", help="only export")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from export.speed import measure_speed
    from export.write import size_of
    from unshot.catalog.formats import parse_targets
    from unshot.child import environment
    from unshot.contracts.manifest import hardware
    from unshot.models import resolve
    from unshot.text.chat import load_tokenizer

    folder = options.folder.resolve()
    artifacts = folder / "artifacts"
    targets = parse_targets([*TARGETS, *options.to])
    if not artifacts.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        chosen = [x for t in targets for x in ("--to", str(t))]
        command = [sys.executable, "-m", "unshot", "export", options.model, *chosen, "--allow-drift"]
        subprocess.run(
            [*command, "--out", str(artifacts), "--check-rows", "6"], check=True, env=environment()
        )
    if options.prepare:
        return
    drift = {r["target"]: r for r in json.loads((artifacts / "parity.json").read_text())["reports"]}
    tokenizer = load_tokenizer(resolve(options.model).path)
    ids = tokenizer.ids(TEXT * (options.prompt // 20))
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps([ids[i : i + options.prompt] for i in range(3)]))
    specs = {str(t): f"{t.engine}:{artifacts / t.name}" for t in targets}
    specs["torch fp32"] = f"torch:{options.model}"
    found: dict[str, list[object]] = {name: [] for name in specs}
    for turn in range(options.rounds):
        for name in list(specs) if turn % 2 == 0 else list(reversed(specs)):
            found[name].append(measure_speed(specs[name], prompts, tokens=options.tokens, repeats=3))
    machine = hardware()
    print(
        f"{options.model}, {machine['cpu']}, {machine['cores']} cores, prompt {options.prompt} tokens, answer "
        f"{options.tokens}, medians of {options.rounds} rounds (range)\n"
    )
    print(
        "| engine and format | MB | prefill tokens/s | decode tokens/s | peak MB | KL, nats |"
        "\n|---|---|---|---|---|---|"
    )
    for name, rounds in found.items():
        size = next((size_of(artifacts / t.name) / 1e6 for t in targets if str(t) == name), float("nan"))
        figures = drift[name]["figures"].get("logits") if name in drift else None
        cells = [name, f"{size:.0f}"]
        for what in ("prefill", "decode"):
            values = [getattr(r, what) for r in rounds]
            cells.append(f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})")
        cells.append(f"{max(r.memory for r in rounds) / 1e6:.0f}")  # type: ignore[attr-defined]
        cells.append(f"{figures['kl']:.2g}" if figures else "")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
