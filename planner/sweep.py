"""Many capacity questions at once: the outer product of models, devices, precisions, rates and prompts, in arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from planner import queueing
from planner.replica import Load, setup
from planner.roofline import StepCost, columns
from unshot import catalog
from unshot.errors import InputError


class Sweep(Struct, frozen=True):
    """Answers on a grid. Every array has shape (models, gpus, precisions, prompts, rates).

    Latencies are seconds at `percentile`, infinite where unstable or where the model does not fit (`max_batch` 0);
    `capacity` is requests/s of one replica, `utilisation` rate over capacity, `gpus` the devices that keep it below
    `max_utilisation`.
    """

    models: tuple[str, ...]
    gpu_names: tuple[str, ...]
    precisions: tuple[str, ...]
    prompts: tuple[float, ...]
    rates: tuple[float, ...]
    percentile: float
    ttft: np.ndarray
    tpot: np.ndarray
    e2e: np.ndarray
    capacity: np.ndarray
    utilisation: np.ndarray
    max_batch: np.ndarray
    gpus: np.ndarray


def sweep(
    models: Sequence[str],
    gpus: Sequence[str],
    precisions: Sequence[str],
    prompts: Sequence[float],
    rates: Sequence[float],
    *,
    output_tokens: float,
    cached_tokens: float = 0.0,
    percentile: float = 95.0,
    max_utilisation: float = 0.85,
    engine: str | None = None,
    block: int = 8192,
) -> Sweep:
    """The same formulas as `planner.capacity.forecast`, for every combination, `block` points at a time."""
    if not (models and gpus and precisions and prompts and rates):
        raise InputError("sweep: every list needs at least one value")
    setups = []
    # Names are looked up once, not at every point.
    for model in map(catalog.model, models):
        for gpu in map(catalog.gpu, gpus):
            for form in map(catalog.precision, precisions):
                for prompt in prompts:
                    load = Load(1.0, prompt, output_tokens, cached_tokens=min(cached_tokens, prompt - 1))
                    one = setup(model, gpu, form, load, engine=engine)
                    setups.append((one, one.shape(load)))
    # One column per setup, repeated for every rate.
    cost_table, shape_table = columns([one.cost for one, _ in setups]), columns([s for _, s in setups])
    count = len(setups) * len(rates)
    rate_column = np.tile(np.asarray(rates, dtype=float), len(setups))
    index = np.repeat(np.arange(len(setups)), len(rates))
    out = {n: np.empty(count) for n in ("ttft", "tpot", "e2e", "capacity", "utilisation")}
    for start in range(0, count, block):
        part = slice(start, min(start + block, count))
        at = index[part]
        cost = StepCost(**{n: column[at] for n, column in cost_table.items()})
        shape = queueing.Shape(**{n: column[at] for n, column in shape_table.items()})
        answer = queueing.respond(cost, shape, rate_column[part], (percentile,))
        out["ttft"][part] = answer.ttft[percentile]
        out["tpot"][part] = answer.tpot[percentile]
        out["e2e"][part] = answer.e2e[percentile]
        out["capacity"][part] = answer.capacity
        out["utilisation"][part] = answer.utilisation
    size = (len(models), len(gpus), len(precisions), len(prompts), len(rates))
    grid = {n: a.reshape(size) for n, a in out.items()}
    batch = np.repeat([one.max_batch for one, _ in setups], len(rates)).reshape(size)
    with np.errstate(invalid="ignore"):
        needed = np.where(batch > 0, np.maximum(1.0, np.ceil(grid["utilisation"] / max_utilisation)), np.inf)
    return Sweep(
        tuple(models), tuple(gpus), tuple(precisions), tuple(prompts), tuple(rates), percentile,
        grid["ttft"], grid["tpot"], grid["e2e"], grid["capacity"], grid["utilisation"], batch, needed,
    )  # fmt: skip
