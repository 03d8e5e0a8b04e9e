"""Loss and scores to TensorBoard, MLflow or Weights & Biases, through transformers' own callbacks."""

from __future__ import annotations

import os
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from unshot.errors import InputError, OutsideError, nearest

# name -> (transformers' callback, modules of which one must be there, what to install)
SYSTEMS = {
    "tensorboard": ("TensorBoardCallback", ("tensorboard", "tensorboardX"), "tensorboard"),
    "mlflow": ("MLflowCallback", ("mlflow",), "mlflow"),
    "wandb": ("WandbCallback", ("wandb",), "wandb"),
}


def wanted(text: str | None) -> list[str]:
    """The systems in a comma-separated list; `InputError` for an unknown one, `OutsideError` for a missing library."""
    names = [name.strip().lower() for name in (text or "").split(",") if name.strip()]
    for name in names:
        if name not in SYSTEMS:
            raise InputError(f"--report-to: no system '{name}'; {nearest(name, SYSTEMS)}")
        _, modules, package = SYSTEMS[name]
        if not any(find_spec(module) for module in modules):
            raise OutsideError(f"--report-to {name} needs its library; run `pip install {package}`")
    return names


class Reporter:
    """Hands figures to the callbacks; `folder` is where files go (TensorBoard's events)."""

    def __init__(self, names: list[str], folder: Path, run_name: str, settings: dict[str, Any]) -> None:
        self.callbacks: list[Any] = []
        if not names:
            return
        from transformers import TrainerControl, TrainerState, TrainingArguments, integrations

        options: dict[str, Any] = {"output_dir": str(folder), "report_to": [], "run_name": run_name}
        if any(f.name == "logging_dir" for f in fields(TrainingArguments)):
            options["logging_dir"] = str(folder)
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder))  # transformers 5 has no logging_dir
        for key in ("learning_rate", "seed"):
            options[key] = settings[key]
        options["num_train_epochs"] = settings["epochs"]
        self.arguments = TrainingArguments(**options)
        self.state, self.control = TrainerState(), TrainerControl()
        self.state.is_world_process_zero = True
        self.callbacks = [getattr(integrations, SYSTEMS[name][0])() for name in names]

    def begin(self, net: Any) -> None:
        """Open the run."""
        for callback in self.callbacks:
            callback.on_train_begin(self.arguments, self.state, self.control, model=net)

    def log(self, figures: dict[str, float], step: int, epoch: float) -> None:
        """One set of scalars at an optimiser step; `eval_...` names land under `eval/`."""
        if not self.callbacks:
            return
        self.state.global_step, self.state.epoch = step, epoch
        for callback in self.callbacks:
            callback.on_log(self.arguments, self.state, self.control, logs=dict(figures), model=None)

    def end(self) -> None:
        """Close the run."""
        for callback in self.callbacks:
            callback.on_train_end(self.arguments, self.state, self.control)
