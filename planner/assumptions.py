"""What a plan takes for granted: in words for the report, as intervals for the uncertainty analysis."""

from __future__ import annotations

from collections.abc import Sequence

from planner import oneoff
from planner.options import Option
from planner.uncertainty import Assumption
from planner.usage import Usage
from unshot.case import Case
from unshot.catalog.tables import table

# 90% interval of the mean rate against what a team forecasts.
RATE_LOW, RATE_HIGH = 0.6, 1.6


def spreads(
    case: Case, usages: Sequence[Usage], tuned: Option | None, keep: Option | None
) -> list[Assumption]:
    """What may be off and by how much: 5th and 95th percentile as factors round the forecast."""
    costs = table("costs")
    label, mfu = costs["example"][case.plan.labels_by], costs["mfu"][oneoff.mfu_key(case.tune.method)]
    found = [
        Assumption("rate", "request rate", RATE_LOW, RATE_HIGH, "forecasts of traffic miss by as much"),
        Assumption("api_price", "API price", 0.6, 1.05, "list prices have mostly fallen; contracts differ"),
        *_lengths(usages),
        Assumption(
            "people",
            "people and data",
            label["low"] / label["value"],
            label["high"] / label["value"],
            "days and cost per example differ widely between teams",
        ),
        Assumption(
            "training",
            "training efficiency",
            mfu["value"] / mfu["high"],
            mfu["value"] / mfu["low"],
            "MFU reached in training",
        ),
    ]
    if case.plan.adapters > 1:
        low, high = (costs["adapters"][end] / costs["adapters"]["overhead"] for end in ("low", "high"))
        why = "published multi-LoRA throughputs"
        found.append(Assumption("adapters", "many-adapter loss", low, high, why))
    if keep is not None and keep.mode == "cached" and keep.caches():
        why = "requests spread over the provider's machines may miss a cache that is alive"
        found.append(Assumption("hit", "cache-hit share", 0.7, 1.0, why))
    return found + (_serving(case, tuned) if tuned is not None and tuned.serving is not None else [])


def _lengths(usages: Sequence[Usage]) -> list[Assumption]:
    """Sampling errors of the lengths, the counting error, and reasoning tokens."""
    usage = usages[0]
    rows = max(usage.input.rows, 1)
    wide = (usage.input.p95 - usage.input.p5) / 3.29 / rows**0.5
    varying = min(max(2 * wide / max(usage.varying, 1.0), 0.02), 0.9)
    spread_out = (usage.output.p95 - usage.output.p5) / 3.29 / max(usage.output.rows, 1) ** 0.5
    answer = 0.3 if usage.output.rows == 1 else min(max(2 * spread_out / usage.output.mean, 0.05), 0.9)
    sample = f"sample of {usage.output.rows} answers"
    found = [
        Assumption("varying", "input length", 1 - varying, 1 + varying, f"sample of {rows} inputs"),
        Assumption("answer", "answer length", 1 - answer, 1 + answer, sample),
    ]
    if any(u.reasoning for u in usages):
        why = "they vary with the task and effort"
        found.append(Assumption("reasoning", "reasoning tokens", 0.5, 2.0, why))
    counting = max((u.error for u in usages), default=0.0)
    if counting:
        why = "approximate tokenizer"
        found.append(Assumption("length", "token counts", 1 - counting, 1 + counting, why))
    return found


def _serving(case: Case, tuned: Option) -> list[Assumption]:
    """What may be off about own GPUs."""
    assert tuned.serving is not None
    low, high = tuned.serving.capacity_interval
    found = [
        Assumption("gpu_price", "GPU price", *tuned.serving.price_interval, "spread between providers"),
        Assumption("capacity", "engine efficiency", low, high, "error of the engine's forecasts"),
    ]
    least = case.plan.min_replicas
    if least > 1:
        why = "your choice of availability"
        ends = (1 / least, (least + 1) / least)
        found.append(Assumption("replicas", "replicas kept at least", *ends, why, chosen=True))
    return found


def cost_notes(case: Case) -> list[str]:
    """The assumptions about load, data, people, training and replicas, in words."""
    plan, costs = case.plan, table("costs")
    example = oneoff.example_cost(plan)
    source = "your figure" if plan.example_cost is not None else costs["example"][plan.labels_by]["source"]
    return [
        f"load: {case.traffic.rate:g} requests/s on average, {case.traffic.peak_factor:g} times that at "
        f"the busiest hour of a smooth day, gaps between requests with a coefficient of variation of "
        f"{case.traffic.arrival_cv:g}; 730 hours a month",
        f"data: {plan.examples} examples, {case.task.examples_at_hand or 0} at hand, ${example:g} each "
        f"({source})",
        f"people: {plan.engineering_days:g} engineering days at ${plan.engineer_day:g} to deploy, "
        f"{plan.operations_days:g} a month to operate own GPUs, {plan.evaluation_answers} judged answers at "
        f"${costs['evaluation_answer']['value']:g}, {plan.retrain_per_year:g} retrainings a year",
        f"training: {case.tune.method}, {case.tune.epochs} epochs, {costs['training']['runs']} runs; "
        f"MFU {costs['mfu'][oneoff.mfu_key(case.tune.method)]['source']}",
        f"replicas: at least {plan.min_replicas} of a self-hosted model, for availability",
        "quality is not forecast: an option counts only once `unshot bench` shows that it answers as well",
    ]
