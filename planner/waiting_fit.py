"""What the waiting formulas leave out, fitted to the simulation: `python -m planner.waiting_fit --out FILE`.

Loads are drawn at random (model, device, precision, lengths and their spread, cached prefix, arrivals, utilisation),
simulated, and the logarithm of simulated over forecast latency is fitted by a few small networks (two layers of tanh,
Huber loss, weight decay, mean of the members) on `planner.signs`. No load, model or device has a number of its own.
Judge it on loads of another seed only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from planner import queueing
from planner.replica import Load, setup
from planner.simulate import simulate
from planner.waiting import FIGURES, MEASURES, unit
from unshot import catalog
from unshot.errors import InputError

MODELS = (
    "llama-2-7b", "llama-2-13b", "llama-3.1-8b", "mistral-7b", "mistral-nemo-12b", "qwen2.5-7b", "qwen2.5-14b",
    "qwen3-8b", "gemma-2-9b", "phi-4",
)  # fmt: skip
GPUS = (
    "t4",
    "l4",
    "a10g",
    "l40s",
    "rtx-3090",
    "rtx-4090",
    "a40",
    "a100-sxm-40",
    "a100-sxm-80",
    "h100-sxm",
    "h200",
)
SEED, LOADS = 1_000_000, 6000
HIDDEN, MEMBERS, EPOCHS, DECAY, PLAIN = 64, 2, 400, 1e-2, 3.0
# Utilisations of one load (drawn between) and requests of each simulation.
SHARES = (
    (0.02, 0.3, 20_000), (0.25, 0.5, 25_000), (0.45, 0.7, 30_000), (0.65, 0.82, 50_000), (0.8, 0.9, 90_000),
    (0.86, 0.95, 100_000),
)  # fmt: skip


class Drawn(Struct, frozen=True):
    """One random load on one device; `load.rate` is a placeholder until `at` sets it by utilisation."""

    model: str
    gpu: str
    precision: str
    load: Load
    slots: int | None = None

    def at(self, utilisation: float) -> Load:
        """The load at a share of the capacity."""
        one = self.setup()
        return replace(self.load, rate=utilisation * float(queueing.capacity(one.cost, one.shape(self.load))))

    def setup(self) -> Any:
        """The replica."""
        return setup(self.model, self.gpu, self.precision, self.load, max_batch=self.slots)


def draw(seed: int, *, bursty: bool = False, wide: bool = False) -> Iterator[Drawn]:
    """Endless random loads that fit their device: prompts of 100 to 8,000 tokens, answers of 1 to 500 (log-uniform).

    A third of the long prompts have a cached prefix. `bursty` adds arrivals that are not Poisson, `wide` every model
    and device of the catalog, and smaller limits on sequences, for one load in three.
    """
    rng = np.random.default_rng(seed)
    every_model, every_gpu = list(catalog.models()), list(catalog.gpus())
    while True:
        broad = wide and rng.random() < 0.35
        models, gpus = (every_model, every_gpu) if broad else (MODELS, GPUS)
        model, gpu = models[rng.integers(len(models))], gpus[rng.integers(len(gpus))]
        llamacpp = catalog.gpu(gpu).engine == "llamacpp"
        forms = ("fp16", "q8_0", "q4_k_m") if llamacpp else ("fp16", "fp8", "int8", "int4")
        precision = forms[rng.integers(len(forms))]
        prompt = float(int(np.exp(rng.uniform(np.log(100), np.log(8000)))))
        output = float(int(np.exp(rng.uniform(0.0, np.log(500)))))
        varied = (0.0, 0.3, 0.6)[rng.integers(3)]
        answers = (0.0, 0.5, 0.9)[rng.integers(3)]
        new = prompt
        if rng.random() < 0.35 and prompt > 300:
            new = float(max(20, int(prompt * np.exp(rng.uniform(np.log(0.02), np.log(0.7))))))
        arrival_cv = (1.0, 1.0, 1.0, 1.5, 2.2)[rng.integers(5)] if bursty else 1.0
        slots = (8, 32, 128, 256)[rng.integers(4)] if broad and rng.random() < 0.5 else None
        load = Load(
            1.0, prompt, output, cached_tokens=prompt - new, arrival_cv=arrival_cv,
            prompt_cv=varied * new / prompt, output_cv=answers if output > 2 else 0.0,
        )  # fmt: skip
        drawn = Drawn(model, gpu, precision, load, slots)
        try:
            one = drawn.setup()
        except InputError:
            continue
        if one.max_batch >= 1:
            yield drawn


def observe(seed: int) -> list[tuple[list[float], list[float], float]]:
    """Signs, log(simulated / forecast) by `FIGURES`, and weight of one load at the utilisations of `SHARES`."""
    drawn = next(draw(seed, bursty=True, wide=True))
    rng = np.random.default_rng([seed, 1])
    found = []
    one = drawn.setup()
    for low, high, requests in SHARES:
        load = drawn.at(rng.uniform(low, high))
        answer = queueing.respond(one.cost, one.shape(load), load.rate, correct=False)
        run = simulate(one, load, requests=requests, seed=seed)
        left = []
        for measure in MEASURES:
            seen = run.quantiles(measure)
            at = getattr(answer, measure)
            guess = (getattr(answer, f"{measure}_mean"), at[50.0], at[95.0], at[99.0])
            real = (seen.mean, seen.p50, seen.p95, seen.p99)
            # Answers of one token have no time per token: nothing to fit there.
            left += [float(np.log(s / g)) if s > 0 else math.nan for s, g in zip(real, guess, strict=True)]
        found.append(([float(v) for v in answer.signs], left, weigh(load)))
    return found


def weigh(load: Load) -> float:
    """Weight in the fit: more for one prompt length and Poisson arrivals, where plans start and latency jumps."""
    return PLAIN if load.prompt_cv == 0.0 and load.arrival_cv == 1.0 else 1.0


def fit(
    signs: np.ndarray, left: np.ndarray, weight: np.ndarray, *, epochs: int = EPOCHS, members: int = MEMBERS
) -> dict[str, Any]:
    """Train the networks on signs (points, k) and logarithms (points, figures); what `waiting.json` holds.

    A logarithm that is NaN has no part in the fit.
    """
    good = np.isfinite(signs).all(1) & ~np.isinf(left).any(1)
    signs, left, weight = signs[good], np.clip(left[good], -1.5, 1.5), weight[good] / weight[good].mean()
    centre, width = signs.mean(0), signs.std(0) + 1e-3
    scaled = unit(signs.T, centre, width).T
    nets = [_train(scaled, left, weight, epochs, seed) for seed in range(members)]
    return {
        "what": "log(simulated / closed form) by signs; written by `python -m planner.waiting_fit`, do not edit",
        "rows": len(signs),
        "centre": _short(centre),
        "width": _short(width),
        **{name: _short(np.stack([net[name] for net in nets])) for name in nets[0]},
    }


def _train(
    scaled: np.ndarray, left: np.ndarray, weight: np.ndarray, epochs: int, seed: int
) -> dict[str, np.ndarray]:
    import torch

    torch.manual_seed(seed)
    x, y = (torch.tensor(a, dtype=torch.float32) for a in (scaled, np.nan_to_num(left)))
    known = torch.tensor(~np.isnan(left) * weight[:, None], dtype=torch.float32)
    net = torch.nn.Sequential(
        torch.nn.Linear(x.shape[1], HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.Tanh(),
        torch.nn.Linear(HIDDEN, y.shape[1]),
    )  # fmt: skip
    # p95 of the time to first token is what an SLO is about: it weighs most.
    figures = torch.tensor([3.0 if name == "ttft_p95" else 1.0 for name in FIGURES])
    optimiser = torch.optim.AdamW(net.parameters(), lr=8e-3, weight_decay=DECAY)
    batch = 1024
    plan = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=1.2e-2, total_steps=epochs * -(-len(x) // batch)
    )
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch):
            loss = torch.nn.functional.huber_loss(net(x[rows]), y[rows], reduction="none", delta=0.05)
            optimiser.zero_grad()
            (loss * figures * known[rows]).mean().backward()
            optimiser.step()
            plan.step()
    return {
        f"{kind}{i}": getattr(net[at], name).detach().numpy()
        for i, at in ((1, 0), (2, 2), (3, 4))
        for kind, name in (("w", "weight"), ("b", "bias"))
    }


def _short(values: Any) -> Any:
    """Nested lists of four significant digits."""
    return [_short(v) for v in values] if np.ndim(values) else float(f"{float(values):.4g}")


def main() -> None:
    """Command line of the refit."""
    import click

    @click.command()
    @click.option("--out", required=True, type=click.Path(path_type=Path), help="waiting.json to write.")
    @click.option("--loads", default=LOADS, show_default=True, help="Random loads to simulate.")
    @click.option("--workers", default=2, show_default=True, help="Processes.")
    def run(out: Path, loads: int, workers: int) -> None:
        """Simulate random loads and fit what the waiting formulas leave out."""
        with ProcessPoolExecutor(workers) as pool:
            rows = [row for found in pool.map(observe, range(SEED, SEED + loads)) for row in found]
        found = fit(*(np.array([row[i] for row in rows]) for i in (0, 1, 2)))
        out.write_text(json.dumps(found) + "\n", encoding="utf-8")

    run()


if __name__ == "__main__":
    main()
