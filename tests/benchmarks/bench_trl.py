"""Training tokens a second against TRL's SFTTrainer: same rows, same token ids, same LoRA, same schedule.

    python tests/benchmarks/bench_trl.py --trl-python VENV/bin/python [--rounds 2] [--rows 192]

TRL lives in an environment of its own (`pip install trl==1.16.0 datasets==4.8.5` beside this package's). Each system
runs in a process of its own, in turn, so that a machine that slows down does so for all. All get: the demo's clauses
as token ids with loss on the answer alone, one LoRA adapter from one seed, 8 rows a step in one order, AdamW with the
same betas and schedule, gradients clipped at 1. TRL's packing decides itself which rows share a step, so that its
order differs there. Tokens are those of the rows, padding not counted; time runs from the end of the first step to the
end of the last. The loss is measured afterwards on the same held-out rows by the same code.

- `ours`: tune.train.Trainer
- `trl-default`: SFTConfig's defaults (padded batches, gradient checkpointing) with bf16 off where the CPU has none
- `trl-unpadded`: gradient checkpointing off, `padding_free`
- `trl-packed`: gradient checkpointing off, `packing` ("bfd") into sequences as long as ours
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from unshot.case import TuneSettings

ROOT = Path(__file__).parent.parent.parent
SYSTEMS = ("ours", "trl-default", "trl-unpadded", "trl-packed")
BATCH = 8
HELD = 24
SEED = 0


def rows(count: int) -> tuple[list[Any], list[Any]]:
    """Encoded training and held-out rows of the demo."""
    from tune.job import encode_rows
    from unshot import embedded
    from unshot.contracts.task import Task
    from unshot.data.rows import read_examples
    from unshot.text.chat import Chat, load_tokenizer

    examples = read_examples(ROOT / "unshot" / "demo" / "data.jsonl")
    chat = Chat(load_tokenizer(embedded.ensure()))
    task = Task(instruction="Classify the risk of the contract clause.")
    encoded = encode_rows(examples, task, chat, 2048)
    return encoded[:count], encoded[-HELD:]


def network() -> Any:
    """The embedded model with a fresh LoRA adapter, rank 16 on all linear layers."""
    from tune.model import load_base, pick_device, prepare_model, uses_bf16
    from unshot.models import resolve

    settings, device = TuneSettings(seed=SEED), pick_device()
    base = load_base(resolve("smollm2-135m"), device, bf16=uses_bf16(settings, device))
    return prepare_model(base, settings)


def rate() -> float:
    """The learning rate of `unshot tune` for this model."""
    from tune.defaults import learning_rate

    return learning_rate("lora", 576)[0]


def run_ours(train: list[Any], net: Any, work: Path) -> tuple[float, float, int]:
    """Seconds, CPU seconds and tokens of all steps but the first."""
    from tune.defaults import pack_capacity
    from tune.model import pick_device, uses_bf16
    from tune.train import TrainConfig, Trainer

    device = pick_device()
    plan = TrainConfig(1, 1, BATCH, pack_capacity(2048, device), rate(), SEED, len(train), "bench")
    trainer = Trainer(net, train, plan, work, device, bf16=uses_bf16(TuneSettings(), device))
    marks: list[tuple[float, float, int]] = []
    trainer.run(
        lambda _: {"score": 0.0, "loss": 0.0},
        lambda state, _: marks.append((time.perf_counter(), time.process_time(), state.tokens)),
        save_seconds=1e9,
    )
    first, last = marks[0], marks[-1]
    return last[0] - first[0], last[1] - first[1], last[2] - first[2]


def run_trl(train: list[Any], net: Any, work: Path, system: str) -> tuple[float, float, int]:
    """The same through SFTTrainer."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from tune.batches import epoch_order
    from tune.defaults import pack_capacity
    from tune.model import pick_device, rate_factor, uses_bf16
    from unshot import embedded

    device = pick_device()
    ordered = [train[i] for i in epoch_order(len(train), seed=SEED, epoch=0)]
    data = Dataset.from_list(
        [
            {
                "input_ids": r.ids,
                "completion_mask": [0] * r.prompt_length + [1] * r.answer_length,
            }
            for r in ordered
        ]
    )
    settings: dict[str, Any] = {}
    if system != "trl-default":
        settings["gradient_checkpointing"] = False
    if system == "trl-unpadded":
        settings |= {"padding_free": True, "max_length": None}
    batch = BATCH
    if system == "trl-packed":
        capacity = pack_capacity(2048, device)
        mean = sum(len(r.ids) for r in ordered) / len(ordered)
        batch = max(1, round(BATCH * mean / capacity))
        settings |= {"packing": True, "max_length": capacity}
    config = SFTConfig(
        output_dir=str(work),
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        bf16=uses_bf16(TuneSettings(), device),
        use_cpu=device == "cpu",
        completion_only_loss=True,
        report_to=[],
        save_strategy="no",
        seed=SEED,
        disable_tqdm=True,
        **settings,
    )
    moving = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=rate(), betas=(0.9, 0.99), weight_decay=0.0)

    class InOrder(SFTTrainer):
        """The rows as they are, which is our shuffled order."""

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = InOrder(
        model=net,
        args=config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(str(embedded.ensure())),
        optimizers=(optimizer, None),
    )
    steps = -(-len(trainer.train_dataset) // batch)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: rate_factor(n, steps))
    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        """When each step ended."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append((time.perf_counter(), time.process_time()))

    trainer.add_callback(Clock())
    trainer.train()
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    first, last = marks[0], marks[-1]
    return last[0] - first[0], last[1] - first[1], sum(lengths[batch:])


def child(system: str, count: int) -> None:
    """Run one system and print its figures as JSON."""
    from tune.defaults import pack_capacity
    from tune.loss import mean_loss
    from tune.model import pick_device

    train, held = rows(count)
    device = pick_device()
    net = network()
    with tempfile.TemporaryDirectory() as folder:
        if system == "ours":
            seconds, cpu, tokens = run_ours(train, net, Path(folder))
        else:
            seconds, cpu, tokens = run_trl(train, net, Path(folder), system)
    figures = {
        "system": system,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "held_out_loss": round(mean_loss(net, held, pack_capacity(2048, device), device), 5),
    }
    print("RESULT " + json.dumps(figures))


def main() -> None:
    """Run the systems in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--trl-python", help="Python of an environment with trl; without it nothing is compared."
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.rows)
        return
    if not args.trl_python:
        sys.exit(
            "skipped: TRL is not installed here; make an environment with trl==1.16.0 and give --trl-python"
        )
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(args.rounds):
        names = args.systems.split(",")
        for system in names if number % 2 == 0 else names[::-1]:
            python = sys.executable if system == "ours" else args.trl_python
            done = subprocess.run(
                [python, __file__, "--child", system, "--rows", str(args.rows)],
                env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
            )
            line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
            if line is None:
                sys.exit(f"{system} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
            figures = json.loads(line[7:])
            found.setdefault(system, []).append(figures)
            print(json.dumps(figures), flush=True)
    speeds = {name: [f["tokens_per_second"] for f in runs] for name, runs in found.items()}
    for name, runs in found.items():
        ratios = [a / b for a, b in zip(speeds["ours"], speeds[name], strict=True)]
        print(
            f"{name:14} {statistics.mean(speeds[name]):8.1f} tok/s, held-out loss {runs[-1]['held_out_loss']:.4f}, "
            f"ours / it {', '.join(f'{r:.2f}' for r in ratios)}"
        )


if __name__ == "__main__":
    main()
