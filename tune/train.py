"""The training loop: packed rows, loss on the answer only, checkpoints from which a killed run goes on exactly.

An own loop instead of transformers' Trainer for three things that change the time: logits are computed at answer
tokens only, rows of one step are packed without padding, and checkpoints hold the adapter's state alone.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tune.batches import Pack, batches
from tune.model import warmup_cosine
from unshot.chat import Encoded
from unshot.errors import InputError

CHECKPOINT = "checkpoint"


@dataclass
class State:
    """Where the run stands. `history` has an entry per finished epoch; `losses` per optimiser step."""

    epoch: int = 0
    step: int = 0  # within the epoch
    seconds: float = 0.0
    tokens: int = 0
    best_epoch: int = -1
    best_key: list[float] | None = None
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""


@dataclass(frozen=True)
class Plan:
    """The numbers that define a run; a checkpoint of another plan is not resumed."""

    epochs: int
    patience: int
    batch_rows: int
    capacity: int
    learning_rate: float
    seed: int
    rows: int
    fingerprint: str
    target: float | None = None


def pack_loss(model: Any, pack: Pack, device: str) -> torch.Tensor:
    """Summed cross-entropy over a pack's answer tokens (divide by their number for the mean).

    The mask between rows comes from the restarting positions; logits are computed at the answer tokens only.
    """
    ids = torch.from_numpy(pack.ids)[None].to(device)
    positions = torch.from_numpy(pack.positions)[None].to(device)
    predict = torch.from_numpy(pack.predict).to(device)
    targets = torch.from_numpy(pack.targets).to(device)
    logits = model(input_ids=ids, position_ids=positions, logits_to_keep=predict, use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def mean_loss(model: Any, rows: Sequence[Encoded], capacity: int, device: str) -> float:
    """Mean answer-token loss over rows, without gradients."""
    total, count = 0.0, 0
    model.eval()
    with torch.inference_mode():
        for packs in batches(rows, batch_rows=max(1, len(rows)), capacity=capacity, seed=0, epoch=0):
            for item in packs:
                total += float(pack_loss(model, item, device))
                count += len(item.targets)
    return total / max(1, count)


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Trainer:
    """Runs a plan; every method leaves a state from which a new process goes on to the same result."""

    def __init__(self, model: Any, rows: Sequence[Encoded], plan: Plan, work: Path, device: str) -> None:
        self.model = model
        self.rows = rows
        self.plan = plan
        self.work = work
        self.device = device
        self.state = State()
        self.parameters = trainable(model)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.steps_per_epoch = -(-len(rows) // plan.batch_rows)

    def run(
        self,
        evaluate: Callable[[Any], dict[str, Any]],
        report: Callable[[State, float], None],
        *,
        save_seconds: float = 30.0,
    ) -> State:
        """Train until the plateau, the target or the last epoch; return the final state.

        `evaluate(model)` returns the validation figures of an epoch, with `score` (higher is better) and `loss`.
        `report(state, tokens_per_second)` is called after each step. Checkpoints are written every
        `save_seconds` and after each epoch.
        """
        state, plan = self.state, self.plan
        saved = time.perf_counter()
        while state.epoch < plan.epochs and not state.stopped:
            steps = batches(
                self.rows,
                batch_rows=plan.batch_rows,
                capacity=plan.capacity,
                seed=plan.seed,
                epoch=state.epoch,
            )
            for number, packs in enumerate(steps):
                if number < state.step:
                    continue
                start = time.perf_counter()
                loss = self._step(packs)
                state.step = number + 1
                state.losses.append(loss)
                state.tokens += sum(len(p.ids) for p in packs)
                state.seconds += time.perf_counter() - start
                report(state, state.tokens / state.seconds)
                if time.perf_counter() - saved > save_seconds:
                    self.save()
                    saved = time.perf_counter()
            figures = evaluate(self.model)
            self._close_epoch(figures)
            self.save()
            saved = time.perf_counter()
        return state

    def _step(self, packs: list[Pack]) -> float:
        done = self.state.epoch * self.steps_per_epoch + self.state.step
        factor = warmup_cosine(done, self.plan.epochs * self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.learning_rate * factor
        self.model.train()
        count = sum(len(p.targets) for p in packs)
        total = 0.0
        for item in packs:
            loss = pack_loss(self.model, item, self.device) / count
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def epoch_loss(self) -> float:
        """Mean training loss of the last epoch's steps."""
        steps = self.state.losses[-self.steps_per_epoch :]
        return sum(steps) / len(steps)

    def _close_epoch(self, figures: dict[str, Any]) -> None:
        """Keep the best epoch (score first, then loss) and decide whether to stop."""
        state, plan = self.state, self.plan
        state.history.append({"epoch": state.epoch + 1, "train_loss": self.epoch_loss(), **figures})
        key = [figures["score"], -figures["loss"]]
        if state.best_key is None or key > state.best_key:
            state.best_key, state.best_epoch = key, state.epoch
            save_tensors(self.work / "best.safetensors", self.parameters)
        if plan.target is not None and figures["score"] >= plan.target:
            state.stopped = f"target {plan.target:g} met on validation"
        elif state.epoch - state.best_epoch >= plan.patience:
            state.stopped = f"no better validation score for {plan.patience} epochs"
        elif state.epoch + 1 == plan.epochs:
            state.stopped = f"{plan.epochs} epochs done"
        state.epoch, state.step = state.epoch + 1, 0

    def load_best(self) -> None:
        """Put the best epoch's adapter back into the model."""
        load_tensors(self.work / "best.safetensors", self.parameters)

    def save(self) -> None:
        """Write a checkpoint and put it in the place of the last one."""
        fresh = self.work / f"{CHECKPOINT}.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        tensors = {f"parameter.{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        tensors["random_state"] = torch.get_rng_state()
        save_tensors(fresh / "state.safetensors", tensors)
        facts = {"plan": asdict(self.plan), "state": asdict(self.state)}
        (fresh / "state.json").write_text(json.dumps(facts), encoding="utf-8")
        old = self.work / CHECKPOINT
        if old.exists():
            old.rename(self.work / f"{CHECKPOINT}.old")
        fresh.rename(old)
        shutil.rmtree(self.work / f"{CHECKPOINT}.old", ignore_errors=True)

    def resume(self) -> bool:
        """Load the last checkpoint of this plan; False where there is none."""
        for name in (CHECKPOINT, f"{CHECKPOINT}.old"):
            folder = self.work / name
            try:
                facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if facts["plan"] != asdict(self.plan):
                continue
            tensors = load_file(folder / "state.safetensors")
            torch.set_rng_state(tensors.pop("random_state"))
            load_into(self.parameters, {k[10:]: v for k, v in tensors.items() if k.startswith("parameter.")})
            for key, parameter in self.parameters.items():
                moments = {
                    k: tensors[f"{k}.{key}"].to(parameter.device if k != "step" else "cpu")
                    for k in ("step", "exp_avg", "exp_avg_sq")
                    if f"{k}.{key}" in tensors
                }
                if moments:
                    self.optimizer.state[parameter] = moments
            self.state = State(**facts["state"])
            return True
        return False


def save_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """Write tensors as safetensors, by way of a temporary name."""
    temporary = path.with_name(path.name + ".tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary)
    temporary.replace(path)


def load_tensors(path: Path, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Read a file of `save_tensors` into parameters."""
    load_into(parameters, load_file(path))


def load_into(parameters: dict[str, torch.nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    """Copy values into parameters of the same names; `InputError` where the names differ."""
    if parameters.keys() != values.keys():
        raise InputError("the checkpoint is of another adapter; remove the .partial directory and run again")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
