"""What the waiting formulas leave out, fitted to the simulation: `python -m planner.waiting_fit --out FILE`.

Loads are drawn at random (model, device, precision, lengths and their spread, arrivals, utilisation), simulated, and
the logarithm of simulated over forecast latency is fitted by robust ridge regression on the `signs` of
`planner.queueing` and their products. No load, model or device has a number of its own. Judge it on loads of
another seed only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from planner import queueing
from planner.capacity import Load, setup
from planner.simulate import simulate
from planner.waiting import products
from unshot.errors import InputError

MODELS = (
    "llama-2-7b", "llama-2-13b", "llama-3.1-8b", "mistral-7b", "mistral-nemo-12b", "qwen2.5-7b", "qwen2.5-14b",
    "qwen3-8b", "gemma-2-9b", "phi-4", "smollm2-135m",
)  # fmt: skip
GPUS = (
    "t4",
    "l4",
    "a10g",
    "l40s",
    "rtx-3090",
    "rtx-4090",
    "a40",
    "a100-sxm-80",
    "h100-sxm",
    "h200",
    "m2-max",
)
FIGURES = tuple(f"{measure}_{name}" for measure in ("ttft", "e2e") for name in ("mean", "p50", "p95", "p99"))
SEED, LOADS, RIDGE, ROBUST = 20_000, 700, 1.5, 0.05


@dataclass(frozen=True)
class Drawn:
    """One random load on one device; `load.rate` is a placeholder until `at` sets it by utilisation."""

    model: str
    gpu: str
    precision: str
    load: Load

    def at(self, utilisation: float) -> Load:
        """The load at a share of the capacity."""
        one = setup(self.model, self.gpu, self.precision, self.load)
        return replace(self.load, rate=utilisation * float(queueing.capacity(one.cost, one.shape(self.load))))


def draw(seed: int, *, bursty: bool = False) -> Iterator[Drawn]:
    """Endless random loads that fit their device: prompts of 100 to 8,000 tokens, answers of 1 to 500 (log-uniform)."""
    rng = np.random.default_rng(seed)
    while True:
        model, gpu = MODELS[rng.integers(len(MODELS))], GPUS[rng.integers(len(GPUS))]
        precision = "q4_k_m" if gpu == "m2-max" else ("fp16", "fp8", "int4")[rng.integers(3)]
        load = Load(
            1.0,
            float(int(np.exp(rng.uniform(np.log(100), np.log(8000))))),
            float(int(np.exp(rng.uniform(0.0, np.log(500))))),
            prompt_cv=(0.0, 0.3, 0.6)[rng.integers(3)],
            output_cv=(0.0, 0.5, 0.9)[rng.integers(3)],
            arrival_cv=(1.0, 1.0, 1.0, 1.5, 2.2)[rng.integers(5)] if bursty else 1.0,
        )
        try:
            one = setup(model, gpu, precision, load)
        except InputError:
            continue
        if one.max_batch >= 1:
            yield Drawn(model, gpu, precision, load)


def observe(seed: int) -> list[tuple[list[float], list[float]]]:
    """Signs and log(simulated / forecast) of one load at four utilisations."""
    drawn = next(draw(seed, bursty=True))
    rng = np.random.default_rng([seed, 1])
    shares = [(rng.uniform(0.1, 0.5), 15_000), (rng.uniform(0.5, 0.75), 20_000)]
    shares += [(rng.uniform(0.75, 0.86), 60_000), (rng.uniform(0.82, 0.92), 80_000)]
    found = []
    for share, requests in shares:
        load = drawn.at(share)
        one = setup(drawn.model, drawn.gpu, drawn.precision, load)
        answer = queueing.respond(one.cost, one.shape(load), load.rate, correct=False)
        run = simulate(one, load, requests=requests, seed=seed)
        left = []
        for measure in ("ttft", "e2e"):
            seen = run.quantiles(measure)
            at = getattr(answer, measure)
            guess = (getattr(answer, f"{measure}_mean"), at[50.0], at[95.0], at[99.0])
            left += [
                float(np.log(s / g))
                for s, g in zip((seen.mean, seen.p50, seen.p95, seen.p99), guess, strict=True)
            ]
        found.append(([float(v) for v in answer.signs], left))
    return found


def fit(rows: list[tuple[list[float], list[float]]]) -> dict[str, object]:
    """Ridge regression of the logarithms on the products of the normalised signs."""
    signs, left = (np.array([row[i] for row in rows]) for i in (0, 1))
    good = np.isfinite(signs).all(1) & np.isfinite(left).all(1) & (np.abs(left) < 3.0).all(1)
    signs, left = signs[good], np.clip(left[good], -1.2, 1.2)
    centre, width = signs.mean(0), signs.std(0) + 1e-9
    table = products(np.clip((signs - centre) / width, -3.0, 3.0).T).T
    pull = RIDGE * np.diag(np.r_[1e-3, np.ones(table.shape[1] - 1)])
    found = np.stack([_robust(table, column, pull) for column in left.T], axis=1)

    def short(values: np.ndarray) -> list[float]:
        return [float(f"{v:.5g}") for v in values]

    return {
        "what": "log(simulated / closed form) by signs; written by `python -m planner.waiting_fit`, do not edit",
        "rows": len(signs),
        "centre": short(centre),
        "width": short(width),
        "weights": {name: short(found[:, i]) for i, name in enumerate(FIGURES)},
    }


def _robust(table: np.ndarray, wanted: np.ndarray, pull: np.ndarray) -> np.ndarray:
    """Ridge regression with pseudo-Huber weights: loads that no sign explains do not bend the others' fit."""
    weight = np.ones(len(wanted))
    found = np.zeros(table.shape[1])
    for _ in range(8):
        found = np.linalg.solve((table.T * weight) @ table + pull, table.T @ (weight * wanted))
        weight = 1.0 / np.sqrt(1.0 + ((wanted - table @ found) / ROBUST) ** 2)
    return found


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
        out.write_text(json.dumps(fit(rows)) + "\n", encoding="utf-8")

    run()


if __name__ == "__main__":
    main()
