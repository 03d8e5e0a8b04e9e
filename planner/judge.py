"""The answer of a plan: what keeping costs, what tuning costs, when one beats the other, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from planner import prices
from planner.assumptions import cost_notes, spreads
from planner.breakeven import exact_break_even, payback
from planner.options import Option
from planner.plan import Comparison, Plan
from planner.serving import machine
from planner.triage import Economics, triage
from planner.uncertainty import analyse
from unshot import catalog

if TYPE_CHECKING:
    from planner.build import Planner


def judge(planner: Planner, price: prices.ApiPrice | None) -> Plan:
    """Compare the planner's options, with error bars, and answer whether to tune."""
    case, rate, usages = planner.case, planner.case.traffic.rate, planner.counts.usages
    keep = _cheapest(planner, [o for o in planner.options if o.baseline])
    tuned = _cheapest(
        planner, [o for o in planner.options if o.tuned and o.kind == "hosted" and o.shared_by == 1]
    )
    comparisons = {}
    for option in planner.options:
        if keep is None or option.key == keep.key or (option.serving and not option.serving.fits):
            continue
        months = payback(option, keep, rate)
        comparisons[option.key] = Comparison(
            exact_break_even(option, keep), months if months != float("inf") else None
        )
    usable = [o for o in planner.options if o.serving is None or o.serving.fits]
    uncertainty = analyse(
        usable,
        spreads(case, tuple(usages.values()), tuned),
        rate,
        tuned=tuned,
        keep=keep,
        draws=planner.settings.draws,
        seed=planner.settings.seed,
    )
    economics = _economics(planner, keep, tuned, comparisons)
    shots = len(planner.counts.prompts["long"].examples or next(iter(usages.values())).examples)
    misfits = [o.notes[0] for o in planner.options if o.tuned and o.serving and not o.serving.fits]
    unfit = misfits[0] if tuned is None and misfits else ""
    judged = triage(case.task, shots=shots, economics=economics, unfit=unfit)
    if uncertainty.cheaper is not None and 0.2 < uncertainty.cheaper < 0.8:
        planner.warnings.append(
            f"the cost answer is uncertain: tuning is cheaper in {uncertainty.cheaper:.0%} of the draws"
        )
    first = catalog.gpu(case.candidate.gpu[0]).name
    return Plan(
        case=case,
        rate=rate,
        options=tuple(planner.options),
        keep=keep,
        tuned=tuned,
        comparisons=comparisons,
        uncertainty=uncertainty,
        triage=judged,
        economics=economics,
        usages=usages,
        assumptions=tuple(dict.fromkeys([*planner.notes, *cost_notes(case)])),
        warnings=tuple(dict.fromkeys(planner.warnings)),
        machine=machine(catalog.gpu(first), planner.gpu_price(first)),
        price=price,
    )


def _cheapest(planner: Planner, options: Sequence[Option]) -> Option | None:
    """The cheapest usable option at the case's rate; batch only for offline work.

    Equal costs (whole GPUs make them common) go to the precision asked for, then to the prefix cache.
    """
    good = [
        o
        for o in options
        if (o.serving is None or o.serving.fits) and (o.mode != "batch" or planner.case.traffic.offline)
    ]
    asked = catalog.precision(planner.case.candidate.precision).name

    def order(option: Option) -> tuple[float, bool, bool]:
        cost = round(float(option.monthly(planner.case.traffic.rate)), 2)
        return cost, option.precision != asked, not option.prefix_cache

    return min(good, key=order) if good else None


def _economics(
    planner: Planner, keep: Option | None, tuned: Option | None, comparisons: Mapping[str, Comparison]
) -> Economics | None:
    if keep is None or tuned is None:
        return None
    rate = planner.case.traffic.rate
    found = comparisons[tuned.key]
    slo = planner.case.traffic.slo
    asked = any(v is not None for v in (slo.ttft_ms, slo.tpot_ms, slo.e2e_ms))
    long_hosted = [o.serving.fits for o in planner.options if not o.tuned and o.serving is not None]
    return Economics(
        rate=rate,
        keep=keep.name,
        keep_monthly=float(keep.monthly(rate)),
        tuned=tuned.name,
        tuned_monthly=float(tuned.monthly(rate)),
        break_even=found.break_even,
        payback_months=found.payback_months,
        horizon_months=planner.case.plan.horizon_months,
        latency_met=True if asked else None,
        # An API's latency is not forecast, so only a self-hosted long prompt can be said to miss the SLO.
        prompt_latency_met=any(long_hosted) if asked and keep.kind == "hosted" else None,
        untuned=_cheaper(planner, tuned, lambda o: not o.tuned and not o.baseline),
        cheaper_tuned=_cheaper(planner, tuned, lambda o: o.tuned and o.kind == "api"),
    )


def _cheaper(
    planner: Planner, than: Option, wanted: Callable[[Option], bool]
) -> tuple[tuple[str, float], ...]:
    """Usable options that cost less than `than` at the case's rate, cheapest first."""
    rate = planner.case.traffic.rate
    found = [
        (o.name, float(o.monthly(rate)))
        for o in planner.options
        if wanted(o)
        and (o.serving is None or o.serving.fits)
        and (o.mode != "batch" or planner.case.traffic.offline)
        and o.monthly(rate) < than.monthly(rate)
    ]
    return tuple(sorted(found, key=lambda pair: pair[1]))
