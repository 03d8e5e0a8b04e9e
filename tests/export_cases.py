"""A tune run on a tiny random model, as `unshot tune` would have left it, for the export tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unshot.case import TuneSettings
from unshot.contracts.manifest import Manifest
from unshot.contracts.task import Task
from unshot.data.rows import write_jsonl
from unshot.models import resolve

TEXTS = [
    "The supplier is not liable.",
    "Fees are due in 30 days.",
    "Either party may end it.",
    "Notice is sixty days.",
]


def add_lora(base: Path, adapter: Path, *, seed: int = 1, **settings: Any) -> None:
    """Save a random LoRA adapter (both halves random, so that it changes the answers)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
                value.normal_(0, 0.08)
            elif "magnitude" in name:
                value.mul_(1 + 0.1 * torch.rand_like(value))
            elif value.requires_grad:
                value.add_(0.05 * torch.randn_like(value))
    model.save_pretrained(str(adapter), safe_serialization=True)


def make_run(base: Path, folder: Path, **settings: Any) -> Path:
    """A run directory with manifest, adapter, splits and task."""
    add_lora(base, folder / "adapter", **settings)
    for path in folder.glob("adapter/README.md"):
        path.unlink()
    rows = [
        {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": a}]}
        for t, a in zip(TEXTS * 2, ["low", "high"] * 4, strict=True)
    ]
    for name in ("train", "validation", "test"):
        write_jsonl(folder / "splits" / f"{name}.jsonl", rows)
    task = Task(name="risk", instruction="Say low or high.", labels=["low", "high"], metric="accuracy")
    task.max_answer_tokens = 8
    (folder / "task.json").write_text(task.to_json())
    (folder / "metrics.json").write_text(json.dumps({"task": "risk"}))
    source = resolve(base)
    Manifest("tune", base=source.fingerprint(), task=task, tune=TuneSettings()).finish(folder)
    return folder
