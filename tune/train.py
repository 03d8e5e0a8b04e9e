"""The training loop: packed rows, loss on the answer only, checkpoints from which a killed run goes on exactly.

An own loop instead of transformers' Trainer for three things that change the time: logits are computed at answer
tokens only, rows of one step are packed without padding, and checkpoints hold the trained parameters alone.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tune.batches import Pack, batches
from tune.loss import Step, core
from tune.model import rate_factor
from tune.processes import World, deal, like, share, total, whole, wrap
from unshot.errors import InputError
from unshot.text.chat import Encoded

CHECKPOINT = "checkpoint"
# Parameters before the first step: the last good state of a run that diverges before its first checkpoint.
START = "start.safetensors"
# A loss diverges where the mean of the last so many steps is above the first ones' by this factor, and by a nat.
WINDOW, FACTOR = 8, 2.0
DIVERGED = "lower the learning rate, now"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


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
class TrainConfig:
    """The numbers that define a training; a checkpoint of another one is not resumed."""

    epochs: int
    patience: int
    batch_rows: int
    capacity: int
    learning_rate: float
    seed: int
    rows: int
    fingerprint: str
    target: float | None = None
    schedule: str = "cosine"


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Trainer:
    """Runs a training; every method leaves a state from which a new process goes on to the same result."""

    def __init__(
        self,
        model: Any,
        rows: Sequence[Encoded],
        config: TrainConfig,
        work: Path,
        device: str,
        *,
        bf16: bool = False,
        world: World | None = None,
    ) -> None:
        self.model = model
        self.rows = rows
        self.config = config
        self.work = work
        self.device = device
        self.world = world or World()
        self.state = State()
        self.module = wrap(Step(model, device, bf16=bf16), core(model), self.world, bf16=bf16)
        self.parameters = trainable(model)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.steps_per_epoch = -(-len(rows) // config.batch_rows)
        # The rows of an epoch where they change from one to the next; as many as `rows`, and the same after a resume.
        self.refresh: Callable[[int], Sequence[Encoded]] | None = None

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
        `save_seconds` (less often where writing one takes long) and after each epoch.
        """
        state, config = self.state, self.config
        if not (self.work / "best.safetensors").is_file():
            self.keep(self.work / START)
        saved, every, diverged = time.perf_counter(), save_seconds, ""
        while state.epoch < config.epochs and not state.stopped:
            steps = batches(
                self.refresh(state.epoch) if self.refresh else self.rows,
                batch_rows=config.batch_rows,
                capacity=config.capacity,
                seed=config.seed,
                epoch=state.epoch,
            )
            for number, packs in enumerate(steps):
                if number < state.step:
                    continue
                start = time.perf_counter()
                loss = self._step(packs)
                state.step = number + 1
                if not math.isfinite(loss):
                    diverged = f"the loss is not a number at step {len(state.losses) + 1}"
                    break
                state.losses.append(loss)
                state.tokens += sum(len(p.ids) for p in packs)
                state.seconds += time.perf_counter() - start
                report(state, state.tokens / state.seconds)
                if diverged := self._rising():
                    break
                if share(time.perf_counter() - saved > every, self.world):
                    began = time.perf_counter()
                    self.save()
                    saved = time.perf_counter()
                    # A large model's state takes its time: at most a twentieth of the run goes there.
                    every = max(save_seconds, 20 * (saved - began)) if save_seconds else 0.0
            if diverged:
                self.load_last_good()
            figures = evaluate(self.model)
            self._close_epoch(figures)
            if diverged:
                state.stopped = f"{diverged}; {DIVERGED} {config.learning_rate:g}"
            self.save()
            saved = time.perf_counter()
        return state

    def _step(self, packs: list[Pack]) -> float:
        done = self.state.epoch * self.steps_per_epoch + self.state.step
        factor = rate_factor(done, self.config.epochs * self.steps_per_epoch, self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        self.model.train()
        if self.world.size > 1:  # dropout: apart in each process, the same again after a crash
            torch.manual_seed(self.config.seed * 1_000_003 + done * self.world.size + self.world.rank)
        count = sum(len(p.targets) for p in packs)
        summed = 0.0
        mine = deal(packs, self.world)
        for number, item in enumerate(mine):
            with self._synchronised(number == len(mine) - 1):
                loss = self.module(item or packs[0]) / count
                # Processes average their gradients, of which the sum is wanted; one without a pack adds nothing.
                (loss * (self.world.size if item else 0)).backward()
            summed += float(loss.detach()) if item else 0.0
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
        mean = total([summed], self.world)[0]
        if math.isfinite(mean):  # a step along gradients that are no numbers would leave none in the weights
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return mean

    def _rising(self) -> str:
        """How the loss has risen beyond where it began, in words; empty where it has not."""
        losses = self.state.losses
        if len(losses) < 2 * WINDOW:
            return ""
        before, after = sum(losses[:WINDOW]) / WINDOW, sum(losses[-WINDOW:]) / WINDOW
        if after <= max(FACTOR * before, before + 1.0):
            return ""
        return f"the loss rises from {before:.2f} at the start to {after:.2f} at step {len(losses)}"

    def load_last_good(self) -> None:
        """Put back the best epoch's parameters, else those before the first step; the optimiser's moments go."""
        best = self.work / "best.safetensors"
        found = share(best.is_file(), self.world)
        self.restart(best if found else self.work / START)
        self.optimizer.state.clear()

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients meet once a step, with its last pack."""
        if self.world.fsdp:
            core(self.model).set_requires_gradient_sync(last)
        elif self.world.size > 1 and not last:
            held: AbstractContextManager[Any] = self.module.no_sync()
            return held
        return nullcontext()

    def epoch_loss(self) -> float:
        """Mean training loss of the last epoch's steps."""
        steps = self.state.losses[-self.steps_per_epoch :]
        return sum(steps) / max(1, len(steps))

    def _close_epoch(self, figures: dict[str, Any]) -> None:
        """Keep the best epoch (score first, then loss) and decide whether to stop."""
        state, config = self.state, self.config
        state.history.append({"epoch": state.epoch + 1, "train_loss": self.epoch_loss(), **figures})
        key = [figures["score"], -figures["loss"]]
        if state.best_key is None or key > state.best_key:
            state.best_key, state.best_epoch = key, state.epoch
            self._write(self.work / "best.safetensors", self.parameters)
        if config.target is not None and figures["score"] >= config.target:
            state.stopped = f"target {config.target:g} met on validation"
        elif state.epoch - state.best_epoch >= config.patience:
            state.stopped = f"no better validation score for {config.patience} epochs"
        elif state.epoch + 1 == config.epochs:
            state.stopped = f"{config.epochs} epochs done"
        state.epoch, state.step = state.epoch + 1, 0

    def load_best(self) -> None:
        """Put the best epoch's parameters back into the model."""
        self.restart(self.work / "best.safetensors")

    def save(self) -> None:
        """Write a checkpoint and put it in the place of the last one."""
        fresh = self.work / f"{CHECKPOINT}.new"
        if self.world.first:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
        tensors = {f"parameter.{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        tensors["random_state"] = torch.get_rng_state()
        self._write(fresh / "state.safetensors", tensors)
        if not self.world.first:
            return
        facts = {"config": asdict(self.config), "state": asdict(self.state)}
        (fresh / "state.json").write_text(json.dumps(facts), encoding="utf-8")
        old = self.work / CHECKPOINT
        if old.exists():
            old.rename(self.work / f"{CHECKPOINT}.old")
        fresh.rename(old)
        shutil.rmtree(self.work / f"{CHECKPOINT}.old", ignore_errors=True)

    def resume(self) -> bool:
        """Load the last checkpoint of this training; False where there is none."""
        facts, tensors = self._checkpoint() if self.world.first else (None, {})
        facts = share(facts, self.world)
        if facts is None:
            return False
        if self.world.first:
            torch.set_rng_state(tensors.pop("random_state"))
        self._spread({k[10:]: v for k, v in tensors.items() if k.startswith("parameter.")})
        if share(any(k.startswith("exp_avg.") for k in tensors), self.world):
            for name, parameter in self.parameters.items():
                self.optimizer.state[parameter] = {
                    key: self._received(
                        tensors.get(f"{key}.{name}"), torch.zeros(()) if key == "step" else parameter
                    )
                    for key in MOMENTS
                }
        self.state = State(**facts["state"])
        return True

    def keep(self, path: Path) -> None:
        """Write the parameters as they are now, unless an earlier process of this run did."""
        if not share(path.exists(), self.world):
            self._write(path, self.parameters)

    def restart(self, path: Path) -> None:
        """Begin again from the parameters in a file of `keep`."""
        self._spread(load_file(path) if self.world.first else {})

    def _checkpoint(self) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor]]:
        for name in (CHECKPOINT, f"{CHECKPOINT}.old"):
            folder = self.work / name
            try:
                facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if facts["config"] == asdict(self.config):
                return facts, load_file(folder / "state.safetensors")
        return None, {}

    def _write(self, path: Path, tensors: dict[str, Any]) -> None:
        """Write tensors in the first process; with FSDP every process gives its share."""
        values = {name: whole(value.detach()) for name, value in tensors.items()}
        if self.world.first:
            save_tensors(path, values)

    def _spread(self, values: dict[str, torch.Tensor]) -> None:
        """Put the first process's values into the parameters of all."""
        if self.world.first and self.parameters.keys() != values.keys():
            raise InputError(
                "the checkpoint is of another model; remove the .partial directory and run again"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self._received(values.get(name), parameter))

    def _received(self, value: torch.Tensor | None, target: torch.Tensor) -> torch.Tensor:
        """The first process's `value` in every process, placed and cut like `target`."""
        if self.world.size > 1:
            if value is None:
                value = torch.empty(target.shape, dtype=target.dtype)
            torch.distributed.broadcast(value, src=0)
        assert value is not None
        return like(value.to(target.device), target)


def save_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """Write tensors as safetensors, by way of a temporary name."""
    temporary = path.with_name(path.name + ".tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary)
    temporary.replace(path)
