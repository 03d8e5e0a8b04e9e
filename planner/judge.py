"""The answer of a plan: what keeping costs, what tuning costs, when one beats the other, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from planner.assumptions import cost_notes, spreads
from planner.breakeven import exact_break_even, payback
from planner.build import Builder
from planner.count import Counts
from planner.options import Option
from planner.plan import Comparison, Plan
from planner.serving import machine
from planner.settings import Settings
from planner.uncertainty import Uncertainty, analyse
from planner.verdict import Absent, Economics, Rival, judge_case
from unshot import catalog
from unshot.case import Case


def make_plan(case: Case, settings: Settings, counts: Counts | None = None) -> Plan:
    """The plan of a case. Raises `InputError` for what the case lacks, `OutsideError` for tokenizers or packages."""
    builder = Builder(case, settings, counts)
    builder.build()
    return judge(builder)


def judge(builder: Builder) -> Plan:
    """Compare the options, with error bars, and answer whether to tune."""
    case, rate, usages = builder.case, builder.case.traffic.rate, builder.counts.usages
    keep = _cheapest(builder, [o for o in builder.options if o.baseline])
    tuned = _cheapest(
        builder, [o for o in builder.options if o.tuned and o.kind == "hosted" and o.shared_by == 1]
    )
    comparisons = {}
    for option in builder.options:
        if keep is None or option.key == keep.key or not option.usable:
            continue
        months = payback(option, keep, rate)
        even = exact_break_even(option, keep)
        comparisons[option.key] = Comparison(even, months if months != float("inf") else None)
    uncertainty = analyse(
        [o for o in builder.options if o.usable],
        spreads(case, tuple(usages.values()), tuned, keep),
        rate,
        tuned=tuned,
        keep=keep,
        draws=builder.settings.draws,
        seed=builder.settings.seed,
    )
    economics = _economics(builder, keep, tuned, comparisons, uncertainty)
    shots = len(builder.counts.prompts["long"].examples or next(iter(usages.values())).examples)
    unfit = [o.notes[0] for o in builder.options if o.tuned and o.kind == "hosted" and not o.usable]
    verdict = judge_case(
        case.task,
        shots=shots,
        economics=economics,
        unfit=unfit[0] if unfit and not tuned else "",
        absent=_absent(builder, tuned) if keep is None and tuned is not None else None,
    )
    if uncertainty.cheaper is not None and 0.2 < uncertainty.cheaper < 0.8:
        builder.warnings.append(
            f"the cost answer is uncertain: tuning is cheaper in {uncertainty.cheaper:.0%} of the draws"
        )
    first = builder.devices[catalog.gpu(case.candidate.gpu[0]).name]
    return Plan(
        case=case,
        rate=rate,
        slo=builder.slo,
        slo_source=builder.slo_source,
        options=tuple(builder.options),
        keep=keep,
        tuned=tuned,
        comparisons=comparisons,
        uncertainty=uncertainty,
        verdict=verdict,
        economics=economics,
        usages=usages,
        assumptions=tuple(dict.fromkeys([*builder.notes, *cost_notes(case)])),
        warnings=tuple(
            dict.fromkeys(
                [*builder.alarms, *builder.warnings, *builder.unconfirmed(), *builder.counts.doubts()]
            )
        ),
        machine=machine(first, builder.gpu_price(first.name), case.candidate.price_factor),
        price=builder.price,
    )


def _cheapest(builder: Builder, options: Sequence[Option]) -> Option | None:
    """The cheapest usable option at the case's rate; batch only for offline work.

    Equal costs (whole GPUs make them common) go to the precision asked for, then to the prefix cache.
    """
    asked = catalog.precision(builder.case.candidate.precision).name

    def order(option: Option) -> tuple[float, bool, bool]:
        cost = round(float(option.monthly(builder.case.traffic.rate)), 2)
        return cost, option.precision != asked, not option.prefix_cache

    return min((o for o in options if _competes(builder, o)), key=order, default=None)


def _competes(builder: Builder, option: Option) -> bool:
    return option.usable and (option.mode != "batch" or builder.case.traffic.offline)


def _economics(
    builder: Builder,
    keep: Option | None,
    tuned: Option | None,
    comparisons: Mapping[str, Comparison],
    uncertainty: Uncertainty,
) -> Economics | None:
    if keep is None or tuned is None:
        return None
    rate = builder.case.traffic.rate
    found = comparisons[tuned.key]
    asked = any(v is not None for v in (builder.slo.ttft_ms, builder.slo.tpot_ms, builder.slo.e2e_ms))
    long_hosted = [o.usable for o in builder.options if not o.tuned and o.kind == "hosted"]
    below = min(float(keep.monthly(rate)), float(tuned.monthly(rate)))
    # A model whose reasoning tokens are not known cannot be said to be cheaper.
    unknown = builder.counts.uncounted
    untuned = _cheaper(builder, below, lambda o: not o.tuned and not o.baseline and o.model not in unknown)
    least = min((below, *(r.monthly for r in untuned)))
    return Economics(
        rate=rate,
        keep=keep.name,
        keep_monthly=float(keep.monthly(rate)),
        tuned=tuned.name,
        tuned_monthly=float(tuned.monthly(rate)),
        once=float(tuned.once()) - float(keep.once()),
        break_even=found.break_even,
        payback_months=found.payback_months,
        horizon_months=builder.case.plan.horizon_months,
        cheaper=uncertainty.cheaper,
        latency_met=True if asked else None,
        # An API's latency is not forecast, so only a self-hosted long prompt can be said to miss the SLO.
        prompt_latency_met=any(long_hosted) if asked and keep.kind == "hosted" else None,
        untuned=untuned,
        keep_counted=keep.model not in unknown,
        uncounted=_cheaper(builder, least, lambda o: not o.tuned and not o.baseline and o.model in unknown),
        cheaper_tuned=_cheaper(
            builder, float(tuned.monthly(rate)), lambda o: o.tuned and (o.kind == "api" or o.shared_by > 1)
        ),
    )


def _absent(builder: Builder, tuned: Option) -> Absent:
    """What can be said where no option with today's model and prompt is usable."""
    today = next(o for o in builder.options if o.baseline)
    rate = builder.case.traffic.rate
    return Absent(
        today=today.name,
        why=today.notes[0],
        slow=today.serving is not None and today.serving.slow,
        tuned=tuned.name,
        monthly=float(tuned.monthly(rate)),
        once=float(tuned.once()),
        untuned=_cheaper(builder, float("inf"), lambda o: not o.tuned and not o.baseline),
    )


def _cheaper(builder: Builder, than: float, wanted: Callable[[Option], bool]) -> tuple[Rival, ...]:
    """Usable options that cost less than `than` dollars a month at the case's rate, cheapest first."""
    rate = builder.case.traffic.rate
    fitting = [o for o in builder.options if wanted(o) and _competes(builder, o)]
    # Of equal costs (whole GPUs make them common) the one with a prefix cache is the faster.
    fitting.sort(key=lambda o: (round(float(o.monthly(rate)), 2), not o.prefix_cache))
    found = [Rival(o.name, float(o.monthly(rate))) for o in fitting]
    return tuple(r for r in found if r.monthly < than)
