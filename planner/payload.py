"""The plan as `plan.json` holds it (`unshot.contracts.plan`); docs/planner.md explains the fields."""

from __future__ import annotations

from msgspec import convert, to_builtins

from planner.build import replica_rate
from planner.options import SECONDS_PER_MONTH, Option
from planner.plan import Plan
from planner.prices import ApiPrice
from planner.usage import Usage
from unshot.contracts import plan as contract

MTOK = 1e6


def payload(plan: Plan) -> contract.PlanFile:
    """The whole plan; infinite and missing figures are None."""
    economics = plan.economics
    found = plan.uncertainty
    return contract.PlanFile(
        case=plan.case,
        rate=plan.rate,
        verdict=plan.verdict,
        compared=contract.Compared(
            keep=plan.keep.key if plan.keep else None,
            tuned=plan.tuned.key if plan.tuned else None,
            break_even_rate=economics.break_even if economics else None,
            payback_months=economics.payback_months if economics else None,
            saving_per_month=economics.saving if economics else None,
            saving_over_horizon=economics.net if economics else None,
        ),
        slo=plan.slo,
        slo_source=plan.slo_source,
        price_per_hour=plan.machine.dollars_per_hour if plan.machine else None,
        prices=contract.Prices(api=_api(plan.price) if plan.price else None, machine=plan.machine),
        tokens={key: _tokens(usage) for key, usage in plan.usages.items()},
        options=[planned(plan, option) for option in plan.options],
        uncertainty=contract.Uncertainty(
            monthly={key: convert(to_builtins(band), contract.Interval) for key, band in found.monthly.items()},
            **{
                name: None if band is None else convert(to_builtins(band), contract.Interval)
                for name, band in (
                    ("saving", found.saving), ("break_even", found.break_even), ("payback", found.payback),
                )
            },
            never=found.never,
            cheaper=found.cheaper,
            tornado=[convert(to_builtins(swing), contract.Swing) for swing in found.tornado],
        ),
        assumptions=list(plan.assumptions),
        warnings=list(plan.warnings),
    )  # fmt: skip


def _api(price: ApiPrice) -> contract.ApiTokenPrice:
    cached = price.cached if price.cached is not None else price.input
    return contract.ApiTokenPrice(
        model=price.model,
        input_per_token=price.input / MTOK,
        cached_input_per_token=cached / MTOK,
        cache_write_per_token=(price.write if price.write is not None else price.input) / MTOK,
        output_per_token=price.output / MTOK,
        source=price.source,
        date=price.date,
    )


def _tokens(usage: Usage) -> contract.Tokens:
    return contract.Tokens(
        counter=usage.counter,
        error=usage.error,
        prefix=usage.prefix,
        varying=usage.varying,
        input=convert(to_builtins(usage.input), contract.TokenSpread),
        output=convert(to_builtins(usage.output), contract.TokenSpread),
        examples=[contract.ExampleTokens(e.number, e.tokens, e.text) for e in usage.examples],
        reasoning=usage.reasoning,
    )


def planned(plan: Plan, option: Option) -> contract.PlannedOption:
    """One option: tokens, dollars, latency (milliseconds), replicas, break-even and payback."""
    rate, found = plan.rate, plan.comparisons.get(option.key)
    mode = option.mode if option.kind == "api" else ("prefix cache" if option.prefix_cache else "plain")
    row = contract.PlannedOption(
        key=option.key,
        name=option.name,
        kind=option.kind,
        model=option.model,
        prompt=option.prompt,
        tuned=option.tuned,
        baseline=option.baseline,
        mode=mode,
        usable=option.usable,
        notes=list(option.notes),
        input_tokens=option.usage.input.mean,
        prefix_tokens=option.usage.prefix,
        output_tokens=option.usage.output.mean + option.usage.reasoning,
        one_off=option.costs.once,
        one_off_total=option.costs.total_once,
        retraining=option.costs.retraining,
        gpu=option.gpu,
        precision=option.precision,
        engine=option.serving.one.engine.name if option.serving else None,
        break_even_rate=found.break_even if found else None,
        payback_months=found.payback_months if found else None,
    )
    if not option.usable:
        return row
    monthly = float(option.monthly(rate))
    band = plan.uncertainty.monthly.get(option.key)
    row.latency_ms = _simulated(plan, option) if option.serving else _typical(option)
    row.parts_per_month = {k: float(v) for k, v in option.parts(rate).items()}
    row.per_month = monthly
    row.per_month_interval = (band.p5, band.p95) if band else None
    row.per_request = monthly / (rate * SECONDS_PER_MONTH)
    row.total_over_horizon = monthly * plan.case.plan.horizon_months + option.costs.total_once
    row.cache_hit_rate = float(option.hit(rate)) if option.kind == "api" else None
    if option.serving is not None:
        serving = option.serving
        row.replicas = float(option.replicas(rate))
        row.utilisation = option.utilisation(rate)
        row.capacity_per_replica = serving.capacity
        row.gpus_per_replica = serving.gpus_per_replica
        row.gpu_hour = serving.machine.dollars_per_hour
        row.gpu_price_source = ", ".join(filter(None, (serving.machine.source, serving.machine.date)))
        row.per_month_if_scaled_by_hour = option.scaled_by_hour(rate) if option.shared_by == 1 else None
    return row


def _simulated(plan: Plan, option: Option) -> contract.LatencyMs:
    assert option.serving is not None
    found = option.serving.latency(replica_rate(option, plan.rate))

    def measure(name: str) -> contract.Percentiles:
        one = found[name]
        low, high = one.p95_interval
        p50, p95, p99 = (one.at[p] * 1e3 for p in (50.0, 95.0, 99.0))
        return contract.Percentiles(p50, p95, p99, (low * 1e3, None if high is None else high * 1e3))

    return contract.LatencyMs("simulation", measure("ttft"), measure("tpot"), measure("e2e"))


def _typical(option: Option) -> contract.LatencyMs | None:
    """A provider's typical median TTFT, TPOT and end-to-end in milliseconds; None if nothing is known."""
    if option.price is None or option.price.latency is None or option.mode == "batch":
        return None
    known = option.price.latency
    first = known.ttft_ms + known.tpot_ms * option.usage.reasoning
    whole = first + known.tpot_ms * max(option.usage.output.mean - 1, 0)
    ttft, tpot, e2e = (contract.Percentiles(value) for value in (first, known.tpot_ms, whole))
    return contract.LatencyMs("typical", ttft, tpot, e2e, within_factor=known.factor, source=known.source)
