"""Costs that do not scale with requests: data, training, evaluation, people; once, at each retraining, each month."""

from __future__ import annotations

from msgspec import Struct

from unshot.case import Method, PlanSettings
from unshot.catalog.tables import table
from unshot.methods import METHODS

MONTHS = 12


class Training(Struct, frozen=True):
    """Compute of one training run: tokens seen, floating-point operations, and GPU hours at the assumed MFU."""

    tokens: float
    flops: float
    mfu: float
    hours: float


class Costs(Struct, frozen=True):
    """Dollars. `once` by what they pay for; `retraining` is one retraining; `monthly` recurs each month."""

    once: dict[str, float]
    retraining: dict[str, float]
    monthly: dict[str, float]
    training: Training | None = None

    @property
    def total_once(self) -> float:
        """Dollars until the first deployment."""
        return sum(self.once.values())

    @property
    def total_monthly(self) -> float:
        """Dollars per month, retraining spread over the year included."""
        return sum(self.monthly.values())


def flops_per_token(params: float, method: Method) -> float:
    """Training operations per token of a model with `params` weights.

    Forward 2N, gradients of the activations 2N, gradients of the weights 2N (Kaplan et al. 2020, section 2.1). LoRA
    and QLoRA need no gradients of the frozen weights: 4N, plus adapters below 1%.
    """
    return (6.0 if METHODS[method].whole else 4.0) * params


def mfu_key(method: Method) -> str:
    """Which of the catalog's MFU entries holds for a method."""
    known = METHODS[method]
    return "full" if known.whole else "qlora" if known.four_bit else "lora"


def training_run(
    params: float, tokens: float, method: Method, peak_flops: float, *, mfu: float | None = None
) -> Training:
    """One run over `tokens` (epochs included) on a GPU of `peak_flops` dense bf16 operations per second."""
    reached = table("costs")["mfu"][mfu_key(method)]["value"] if mfu is None else mfu
    work = flops_per_token(params, method) * tokens
    return Training(tokens, work, reached, work / (peak_flops * reached) / 3600)


def example_cost(plan: PlanSettings) -> float:
    """Dollars for one labelled example."""
    if plan.example_cost is not None:
        return plan.example_cost
    return float(table("costs")["example"][plan.labels_by]["value"])


def _people(plan: PlanSettings, examples_at_hand: int) -> tuple[dict[str, float], dict[str, float]]:
    """`(once, per retraining)` of what tuning costs wherever it runs, compute aside."""
    missing = max(plan.examples - examples_at_hand, 0)
    judge = table("costs")["evaluation_answer"]["value"]
    once = {
        "data": missing * example_cost(plan),
        "evaluation": plan.evaluation_answers * judge,
        "engineering": plan.engineering_days * plan.engineer_day,
    }
    # A retraining adds a tenth of the data anew and a tenth of the engineering, and is judged again.
    again = {
        "data": 0.1 * plan.examples * example_cost(plan),
        "evaluation": plan.evaluation_answers * judge,
        "engineering": 0.1 * plan.engineering_days * plan.engineer_day,
    }
    return once, again


def self_hosted(
    plan: PlanSettings,
    *,
    examples_at_hand: int,
    tokens_per_example: float,
    epochs: int,
    method: Method,
    params: float,
    peak_flops: float,
    gpu_hour: float,
    tuned: bool = True,
) -> Costs:
    """Costs round a self-hosted model; `tuned` False leaves data, training and retraining out (base + long prompt).

    A base model still needs to be set up (half the engineering days) and evaluated once.
    """
    operations = plan.operations_days * plan.engineer_day
    if not tuned:
        once = {
            "evaluation": plan.evaluation_answers * table("costs")["evaluation_answer"]["value"],
            "engineering": 0.5 * plan.engineering_days * plan.engineer_day,
        }
        return Costs(once, {}, {"operations": operations})
    once, again = _people(plan, examples_at_hand)
    facts = table("costs")["training"]
    run = training_run(params, plan.examples * tokens_per_example * epochs, method, peak_flops)
    once["training"] = facts["runs"] * (run.hours + facts["hours_around"]) * gpu_hour
    again["training"] = (run.hours + facts["hours_around"]) * gpu_hour
    monthly = {"operations": operations, "retraining": plan.retrain_per_year / MONTHS * sum(again.values())}
    return Costs(once, again, monthly, run)


def fine_tuned_api(
    plan: PlanSettings, *, examples_at_hand: int, tokens_per_example: float, epochs: int, fee_per_mtok: float
) -> Costs:
    """Costs round a fine-tuned API model: the provider's fee per million training tokens replaces GPU hours.

    Serving and operations are the provider's; half the engineering days remain.
    """
    once, again = _people(plan, examples_at_hand)
    tokens = plan.examples * tokens_per_example * epochs
    fee = tokens * fee_per_mtok / 1e6
    once["engineering"] *= 0.5
    once["training"] = table("costs")["training"]["runs"] * fee
    again["training"] = fee
    monthly = {"retraining": plan.retrain_per_year / MONTHS * sum(again.values())}
    return Costs(once, again, monthly, Training(tokens, 0.0, 0.0, 0.0))
