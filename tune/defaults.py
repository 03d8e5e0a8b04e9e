"""Settings by method, model and data size where the user gave none, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from tune.base import Shape
from unshot.case import TuneSettings
from unshot.methods import METHODS


@dataclass(frozen=True)
class Defaults:
    """The chosen settings, with the reason for each."""

    learning_rate: float
    batch_rows: int
    reasons: dict[str, str]


def choose_defaults(settings: TuneSettings, shape: Shape, rows: int) -> Defaults:
    """Learning rate and batch size for a base and a number of training rows."""
    reasons = {}
    if settings.learning_rate is not None:
        rate = settings.learning_rate
        reasons["learning_rate"] = "given"
    else:
        rate, reasons["learning_rate"] = learning_rate(settings.method, shape.hidden, shape.family)
    batch = 8 if rows < 1000 else 16 if rows < 10000 else 32
    reasons["batch_rows"] = (
        f"{batch} rows a step for {rows} rows: small sets need steps more than smooth gradients"
    )
    reasons["trained"] = trained(settings, shape)
    return Defaults(rate, batch, reasons)


# How the best rate falls with width, fitted by family: Tinker's documentation, "Supervised learning hyperparameters"
# (Thinking Machines Lab), read 2026-11-26 in copies of `tinker_cookbook/hyperparam_utils.py`.
EXPONENTS = {"llama": 0.781, "qwen": 0.0775}


def learning_rate(method: str, hidden: int, family: str = "llama") -> tuple[float, str]:
    """The peak rate of a method on a model of a family (`model_type`) and of width `hidden`, and why.

    Full fine-tuning's best rate falls with width, 5e-5 * (2000 / hidden)^exponent, and LoRA's is 10 times that
    (Schulman et al., "LoRA Without Regret", Thinking Machines Lab, 2025-09). A family without an exponent of its own
    gets Llama's. A soft prompt has no weights to spoil and is trained with 3e-2 (peft's own prompt tuning guide for
    causal models).
    """
    known = METHODS[method]
    if known.rate is not None:
        return (
            known.rate,
            f"{known.rate:g}, as in peft's prompt tuning guide: only the vectors before the row move",
        )
    fitted = next((name for name in EXPONENTS if family.startswith(name)), None)
    exponent = EXPONENTS[fitted or "llama"]
    rate = float(f"{5e-5 * known.rate_factor * (2000 / hidden) ** exponent:.2g}")
    times = "" if known.rate_factor == 1 else f" x {known.rate_factor:g} (LoRA)"
    whose = "" if fitted else f"; none is known for {family}"
    return rate, (
        f"5e-5{times} x (2000 / hidden {hidden})^{exponent:g}, the exponent that was fitted to "
        f"{(fitted or 'llama').capitalize()} models{whose}; Thinking Machines Lab 2025-09"
    )


def trained(settings: TuneSettings, shape: Shape) -> str:
    """What the method trains, in words."""
    layers, known = shape.layers, METHODS[settings.method]
    where = f"the top {settings.layers} of {layers} layers" if settings.layers else f"all {layers} layers"
    facts = {
        "rank": settings.rank,
        "virtual_tokens": settings.virtual_tokens,
        "hidden": shape.hidden,
    }
    return f"{known.trains.format(where=where, **facts)}: {known.reason}"


def pack_capacity(batch_tokens: int, device: str, *, apart: bool = True) -> int:
    """Tokens of one packed sequence.

    A CPU attends within each row by itself (`tune.attention`), and its matrix products gain little from more rows
    than 1,024, while the memory of activations grows with them. Where rows are not `apart` a masked square over
    the pack costs more than longer products gain: 384.
    """
    return min(batch_tokens, 1024 if apart else 384) if device == "cpu" else batch_tokens
