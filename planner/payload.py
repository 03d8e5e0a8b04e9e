"""The plan as data: what `--json` prints and `plan.json` holds. docs/planner.md documents the keys."""

from __future__ import annotations

from typing import Any

from planner.options import Option
from planner.plan import Plan
from planner.serving import latencies

FORMAT = 1
MTOK = 1e6


def payload(plan: Plan) -> dict[str, Any]:
    """The whole plan with JSON types only (infinite and missing figures are null)."""
    economics = plan.economics
    return {
        "format": FORMAT,
        "case": plan.case.plain(),
        "rate": plan.rate,
        "verdict": {
            "answer": plan.triage.answer,
            "headline": plan.triage.headline,
            "reasons": list(plan.triage.reasons),
            "would_change": list(plan.triage.would_change),
            "unknown": list(plan.triage.unknown),
        },
        "compared": {
            "keep": plan.keep.key if plan.keep else None,
            "tuned": plan.tuned.key if plan.tuned else None,
            "break_even_rate": economics.break_even if economics else None,
            "payback_months": economics.payback_months if economics else None,
            "saving_per_month": economics.keep_monthly - economics.tuned_monthly if economics else None,
        },
        "price_per_hour": plan.machine["dollars_per_hour"] if plan.machine else None,
        "prices": prices(plan),
        "tokens": {key: usage.as_dict() for key, usage in plan.usages.items()},
        "options": option_rows(plan),
        "uncertainty": plan.uncertainty.as_dict(),
        "assumptions": list(plan.assumptions),
        "warnings": list(plan.warnings),
    }


def prices(plan: Plan) -> dict[str, Any]:
    """What a later stage needs to turn measured tokens and seconds into dollars.

    `api`: the baseline API's $ per token (null without one). `machine`: $ per hour of the candidate's first GPU or CPU.
    """
    api = None
    if plan.price is not None:
        price = plan.price
        cached = price.cached if price.cached is not None else price.input
        api = {
            "model": price.model,
            "input_per_token": price.input / MTOK,
            "cached_input_per_token": cached / MTOK,
            "cache_write_per_token": (price.write if price.write is not None else price.input) / MTOK,
            "output_per_token": price.output / MTOK,
            "source": price.source,
            "date": price.date,
        }
    return {"api": api, "machine": plan.machine}


def option_rows(plan: Plan) -> list[dict[str, Any]]:
    """Every option as `option_row`; the forecasts of latency are made together, which is several times faster."""
    hosted = {o.key: (o.serving, replica_rate(o, plan)) for o in plan.options if o.serving and o.serving.fits}
    found = dict(zip(hosted, latencies(list(hosted.values())), strict=True))
    rows = []
    for option in plan.options:
        forecast = found.get(option.key)
        rows.append(option_row(plan, option, {"forecast": True, **forecast} if forecast else typical(option)))
    return rows


def option_row(plan: Plan, option: Option, latency: dict[str, Any] | None) -> dict[str, Any]:
    """One option: tokens, dollars, latency (milliseconds), replicas, break-even and payback."""
    usable = option.serving is None or option.serving.fits
    rate = plan.rate
    found = plan.comparisons.get(option.key)
    row: dict[str, Any] = {
        "key": option.key,
        "name": option.name,
        "kind": option.kind,
        "model": option.model,
        "prompt": option.prompt,
        "tuned": option.tuned,
        "baseline": option.baseline,
        "mode": option.mode if option.kind == "api" else ("prefix cache" if option.prefix_cache else "plain"),
        "gpu": option.gpu,
        "precision": option.precision,
        "usable": usable,
        "notes": list(option.notes),
        "input_tokens": option.usage.input.mean,
        "prefix_tokens": option.usage.prefix,
        "output_tokens": option.usage.output.mean,
        "one_off": option.costs.once,
        "one_off_total": option.costs.total_once,
        "retraining": option.costs.retraining,
        "break_even_rate": found.break_even if found else None,
        "payback_months": found.payback_months if found else None,
        "latency_ms": latency,
    }
    if not usable:
        return row
    monthly = float(option.monthly(rate))
    band = plan.uncertainty.monthly.get(option.key)
    requests = rate * 8760 / 12 * 3600
    row |= {
        "parts_per_month": {k: float(v) for k, v in option.parts(rate).items()},
        "per_month": monthly,
        "per_month_interval": [band.p5, band.p95] if band else None,
        "per_request": monthly / requests,
        "cache_hit_rate": float(option.hit(rate)) if option.kind == "api" else None,
        "replicas": float(option.replicas(rate)) if option.serving else None,
        "utilisation": option.utilisation(rate),
    }
    if option.serving is not None:
        serving = option.serving
        row |= {
            "capacity_per_replica": serving.capacity,
            "gpus_per_replica": serving.gpus_per_replica,
            "gpu_hour": serving.price_hour,
            "gpu_price_source": f"{serving.price_source}, {serving.price_date}",
            "per_month_if_scaled_by_hour": option.scaled_by_hour(rate) if option.shared_by == 1 else None,
        }
    return row


def replica_rate(option: Option, plan: Plan) -> float:
    """Requests/s of one replica at the busiest hour."""
    rate = plan.rate * option.shape.peak / float(max(option.replicas(plan.rate), 1e-9))
    if option.shared_by > 1 and option.serving is not None:
        rate = min(rate, option.serving.capacity)
    return rate


def typical(option: Option) -> dict[str, Any] | None:
    """A provider's typical median TTFT, TPOT and end-to-end in milliseconds; None where nothing is known."""
    if option.price is None or option.price.latency is None or option.mode == "batch":
        return None
    known = option.price.latency
    whole = known.ttft_ms + known.tpot_ms * max(option.usage.output.mean - 1, 0)
    return {
        "forecast": False,
        "ttft": {"p50": known.ttft_ms, "p95": None, "p99": None},
        "tpot": {"p50": known.tpot_ms, "p95": None, "p99": None},
        "e2e": {"p50": whole, "p95": None, "p99": None},
        "within_factor": known.factor,
        "source": known.source,
    }
