"""Peak memory against the plan-time estimate, training tokens a second, and MFU.

    python tests/benchmarks/bench_tune_memory.py                     # 7B-shaped on a GPU, else the 135M on the CPU
    python tests/benchmarks/bench_tune_memory.py --shape 135m --method full --tokens 384 --steps 4

The 7B has Llama 2's shape and random weights. Rows are random ids of `--row` tokens, 1 in 8 carrying loss, packed
as in a run. Measured on a GPU: `torch.cuda.max_memory_allocated`; on a CPU: the peak of the resident set (VmHWM, reset
once the model is loaded) less the resident set before the model was loaded, with freed blocks going back to the system
as in a run whose memory is short (`--keep-freed` measures without).

MFU is the model's floating-point operations a second over the device's peak. LoRA needs 4 a weight and token (forward
2, backward through the frozen weights 2; Chowdhery et al. 2022, arXiv 2204.02311, app. B, has 6 for full training,
where the weights' gradients are 2 more), the head only at answer tokens, and 12 x layers x hidden x (row / 2) for
attention. Peaks: H100 SXM 989.4e12, H200 the same (NVIDIA's data sheets, dense bf16); a CPU's is what a square fp32
product reaches.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from unshot.case import TuneSettings

PEAKS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12, "L4": 121e12}
LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def source(shape: str, folder: Path) -> Any:
    """The embedded model, or a directory with the 7B's configuration alone."""
    from unshot.models import Source, resolve

    if shape == "135m":
        return resolve("smollm2-135m")
    from transformers import LlamaConfig

    LlamaConfig(**LLAMA_7B, dtype="bfloat16").save_pretrained(folder)
    return Source("llama-7b-shaped", folder)


def network(shape: str, base: Any, method: str, device: str) -> Any:
    """Weights of the embedded model, or random ones."""
    import torch

    from tune.model import load_base, uses_bf16

    if shape == "135m":
        return load_base(base, device, bf16=uses_bf16(TuneSettings(), device), method=method)
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(str(base.path)), dtype=torch.bfloat16
        )


def device_peak(device: str) -> float:
    """Floating-point operations a second that the device can do."""
    import torch

    if device != "cpu":
        name = torch.cuda.get_device_name(0)
        return next((v for k, v in PEAKS.items() if k in name), float("nan"))
    a = torch.randn(2048, 2048)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def flops_per_token(net: Any, row: int, answer_share: float, method: str) -> float:
    """Operations a token of training needs (see the module's text)."""
    import torch

    from tune.loss import core

    inner = core(net)
    head = inner.get_output_embeddings()
    config = inner.config
    factor = 6 if method == "full" else 4
    linear = adapters = 0
    for name, module in inner.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            if "lora_" in name:
                adapters += module.weight.numel()
            else:
                linear += module.weight.numel()
    attention = 12 * config.num_hidden_layers * config.hidden_size * row / 2
    return factor * (linear + answer_share * head.weight.numel()) + 6 * adapters + attention


def main() -> None:
    """Measure one run and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("7b", "135m"))
    parser.add_argument("--method", default="lora")
    parser.add_argument("--tokens", type=int, help="Tokens of a pack; default as in a run.")
    parser.add_argument("--row", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8, help="Rows a step.")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--keep-freed", action="store_true", help="glibc's own way with freed blocks (CPU).")
    parser.add_argument("--answering", action="store_true", help="Measure answering a batch too.")
    args = parser.parse_args()

    import numpy as np
    import peft  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM  # noqa: F401 (its import is not the model's memory)

    from tune.base import inspect_base
    from tune.defaults import pack_capacity
    from tune.generate import _greedy
    from tune.memory import Load, estimate, lean_malloc
    from tune.model import checkpoint_layers, pick_device, prepare_model, uses_bf16
    from tune.train import TrainConfig, Trainer
    from unshot.text.chat import Chat, Encoded, load_tokenizer

    if not args.keep_freed:
        lean_malloc()
    device = pick_device()
    shape = args.shape or ("7b" if device != "cpu" else "135m")
    if shape == "7b" and device == "cpu":
        parser.error("the 7B shape needs a GPU")
    capacity = args.tokens or pack_capacity(2048 if shape == "135m" else 4096, device)
    settings = TuneSettings(method=args.method, gradient_checkpointing=args.checkpointing)
    draw = np.random.default_rng(0)
    answer = args.row // 8
    rows = [
        Encoded(draw.integers(0, 30000, args.row).tolist(), args.row - answer)
        for _ in range(args.batch * args.steps)
    ]
    peak_flops = device_peak(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = source(shape, folder)
        before = status("VmRSS")
        net = prepare_model(network(shape, base, args.method, device), settings)
        if args.checkpointing:
            checkpoint_layers(net)
        plan = TrainConfig(1, 1, args.batch, capacity, 1e-5, 0, len(rows), "bench")
        trainer = Trainer(net, rows, plan, folder, device, bf16=uses_bf16(settings, device))
        seconds: list[float] = []
        if device == "cpu":
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        else:
            torch.cuda.reset_peak_memory_stats()

        def report(state: Any, _: float) -> None:
            if device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter())

        peaks = {}

        def evaluate(_: Any) -> dict[str, float]:
            peaks["train"] = (
                status("VmHWM") - before if device == "cpu" else torch.cuda.max_memory_allocated()
            )
            if args.answering and shape == "135m":
                chat = Chat(load_tokenizer(base.path))
                _greedy(net.eval(), chat, [r.ids for r in rows[:48]], 16, synced=False)
                peaks["answering"] = status("VmHWM") - before
            return {"score": 0.0, "loss": 0.0}

        trainer.run(evaluate, report, save_seconds=1e9)
        per_step = sum(len(r.ids) for r in rows) / args.steps
        rate = per_step * (len(seconds) - 1) / (seconds[-1] - seconds[0])
        packs = -(-args.batch // max(1, capacity // args.row))
        in_pack = min(args.batch, max(1, capacity // args.row))
        load = Load(in_pack * args.row, in_pack * answer, packs, args.row + 16, 48)
        shape = inspect_base(base, settings.method)
        guess = estimate(base, shape, settings, load, device, checkpointing=args.checkpointing)
        flops = flops_per_token(net, args.row, answer / args.row, args.method)
    print(
        json.dumps(
            {
                "shape": shape,
                "method": args.method,
                "device": torch.cuda.get_device_name(0) if device != "cpu" else "cpu",
                "pack_tokens": load.tokens,
                "checkpointing": args.checkpointing,
                "measured_gb": peaks["train"] / 1e9,
                "estimated_gb": guess.training / 1e9,
                "estimated / measured": round(guess.training / peaks["train"], 3),
                "answering_measured_gb": peaks.get("answering", 0) / 1e9,
                "answering_estimated_gb": guess.answering / 1e9,
                "tokens_per_second": round(rate, 1),
                "mfu": round(rate * flops / peak_flops, 3),
                "peak_tflops": round(peak_flops / 1e12, 3),
                "terms_gb": {name: round(value, 3) for name, value, _ in guess.lines()},
            }
        )
    )


if __name__ == "__main__":
    main()
