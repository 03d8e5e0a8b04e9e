"""The plan as one self-contained HTML page: verdict, options, charts, and everything it rests on."""

from __future__ import annotations

import math

from planner import live
from planner.options import HOURS_PER_MONTH, Option
from planner.plan import Plan
from planner.rows import all_rows, quantiles, slo_text, with_latency
from unshot import __version__
from unshot.contracts.plan import PlanFile
from unshot.report import page
from unshot.report.charts import (
    Bar,
    Mark,
    Series,
    Span,
    bars,
    cdf,
    dollars,
    line,
    milliseconds,
    number,
    tornado,
)
from unshot.report.formats import interval, months, per_second, share

SHOWN_EXAMPLES = 24
CURVE_POINTS = 121


def report(plan: Plan, file: PlanFile) -> str:
    """The page as HTML text."""
    case = plan.case
    title = "Should this prompt move into a tuned model?"
    name = "" if case.task.name == "case" else f"{case.task.name}: "
    subtitle = (
        f"{name}{plan.rate:g} requests/s on average, {case.traffic.peak_factor:g} times that at the busiest hour; "
        f"candidate {case.candidate.model} on {', '.join(case.candidate.gpu)}"
    )
    return page.page(
        title,
        _verdict(plan),
        _cards(plan, file),
        live.controls(plan),
        page.charts(*_charts(plan, file)),
        page.section("Options side by side", _options_table(plan, file), _latency_table(plan, file)),
        page.section("Tokens", _tokens_table(plan), page.charts(*_token_charts(plan))),
        page.section("One-off and recurring costs", _once_table(plan)),
        page.section("What matters most", _swings(plan)),
        page.section("What it rests on", page.bullets(plan.assumptions, linked=True)),
        subtitle=subtitle,
        script=live.script(plan, shown(plan)),
        footer=f"unshot {__version__}. Forecast, not a measurement: `unshot bench` measures speed, cost and quality.",
    )


def _verdict(plan: Plan) -> str:
    verdict = plan.verdict
    kind = "good" if verdict.answer == "tune" else "warn"
    reasons = [*verdict.reasons, *(f"Would change it: {text}" for text in verdict.would_change)]
    blocks = [page.verdict(verdict.summary, reasons, kind=kind)]
    if plan.warnings:
        blocks.append(page.verdict("Warnings", plan.warnings))
    if verdict.unknown:
        blocks.append(
            page.details("Answers that would make the verdict surer", page.bullets(verdict.unknown))
        )
    return "\n".join(blocks)


def _cards(plan: Plan, file: PlanFile) -> str:
    found, economics = plan.uncertainty, plan.economics
    if economics is None or found.saving is None or found.break_even is None or found.payback is None:
        return ""
    band, middle = found.break_even, economics.break_even
    once = plan.tuned.costs.total_once if plan.tuned else 0.0
    return page.cards(
        [
            (
                "Saving per month",
                dollars(economics.saving),
                f"90%: {interval(found.saving.p5, found.saving.p95)}",
            ),
            (
                "Break-even",
                per_second(middle),
                f"90%: {per_second(band.p5, middle)} to {per_second(band.p95, middle)}; now {plan.rate:g}/s",
            ),
            (
                "Payback",
                months(economics.payback_months),
                f"90%: {months(found.payback.p5)} to {months(found.payback.p95)}; one-off {dollars(once)}",
            ),
            ("Keep the prompt", dollars(economics.keep_monthly), f"per month: {economics.keep}"),
            ("Tune", dollars(economics.tuned_monthly), f"per month: {economics.tuned}"),
        ]
    )


def _charts(plan: Plan, file: PlanFile) -> list[str]:
    figures = [_cost_curve(plan), *_latency_curves(plan), _breakdown(plan, file)]
    swings = plan.uncertainty.tornado
    if swings and plan.economics is not None:
        figures.append(
            tornado(
                "Saving per month, one assumption off at a time",
                [
                    Span(
                        s.label,
                        0.0,
                        s.low,
                        s.high,
                        f", {s.low_factor:.2f}x to {s.high_factor:.2f}x",
                    )
                    for s in swings
                ],
                base=plan.economics.saving,
                x_label="$ saved per month",
                x_format=dollars,
                note="Ends are the 5th and 95th percentile of each assumption.",
            )
        )
    draws = plan.uncertainty.break_even_draws
    if len(draws) > 20 and max(draws) > min(draws):
        never = plan.uncertainty.never or 0.0
        figures.append(
            cdf(
                "Break-even rate over all assumptions",
                {"draws that break even": draws},
                x_label="requests per second",
                y_label="share of draws",
                log_x=True,
                x_marks=[Mark(plan.rate, f"now {plan.rate:g}/s")],
                note=f"{len(draws)} draws; in {never:.0%} of all draws the tuned model never breaks even.",
            )
        )
    return figures


def shown(plan: Plan) -> list[Option]:
    """The options a chart has room for: the two weighed, the plain baseline, and the cheapest of each other kind."""
    picked = [o for o in (plan.keep, plan.tuned) if o is not None]
    usable = [o for o in plan.options if o.usable]
    groups = (
        [o for o in usable if o.baseline and o.mode == "plain" and not o.prefix_cache],
        [o for o in usable if not o.baseline and not o.tuned and o.kind == "api" and o.mode == "cached"],
        [o for o in usable if not o.tuned and o.kind == "hosted"],
        [o for o in usable if o.tuned and o.kind == "api"],
        [o for o in usable if o.tuned and o.shared_by > 1],
    )
    for group in groups:
        if group:
            best = min(group, key=lambda o: float(o.monthly(plan.rate)))
            if best not in picked:
                picked.append(best)
    return picked


def _cost_curve(plan: Plan) -> str:
    at = [plan.rate]
    even = plan.economics.break_even if plan.economics else None
    if even:
        at.append(even)
    low, high = min(at) / 20, max(at) * 10
    rates = [low * (high / low) ** (i / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)]
    series = [Series(o.name, rates, [float(o.monthly(r)) for r in rates]) for o in shown(plan)]
    marks = [Mark(plan.rate, f"now {plan.rate:g}/s")]
    if even:
        marks.append(Mark(even, f"break-even {per_second(even)}"))
    return line(
        "Cost per month against request rate",
        series,
        x_label="mean requests per second",
        y_label="$ per month",
        log_x=True,
        log_y=True,
        x_marks=marks,
        y_format=dollars,
        height=300,
        note="Running cost: GPUs in whole numbers for the busiest hour, with retraining, without one-off costs.",
    )


def _latency_curves(plan: Plan) -> list[str]:
    hosted = [o for o in plan.options if o.serving is not None and o.usable and o.shared_by == 1]
    if not hosted:
        return []
    asked = plan.case.candidate.precision
    same = [o for o in hosted if o.precision == asked or o == plan.tuned]
    drawn = (same or hosted)[:6]
    slo = plan.slo
    wanted = [("ttft", "Time to first token", slo.ttft_ms), ("e2e", "End-to-end time", slo.e2e_ms)]
    if slo.tpot_ms is not None:
        wanted.insert(1, ("tpot", "Time per output token", slo.tpot_ms))
    return [_latency_curve(plan, drawn, name, title, target) for name, title, target in wanted]


def _latency_curve(plan: Plan, drawn: list[Option], name: str, title: str, target: float | None) -> str:
    from planner.latency.sizing import saturated

    percentile = plan.slo.percentile
    series, tops, values = [], [], []
    for option in drawn:
        serving = option.serving
        assert serving is not None
        top = saturated(serving.one, serving.load)
        # Even on the logarithmic axis, and dense near saturation, where the curve bends.
        rates = [top * 10 ** (-3 + 2.7 * i / 40) for i in range(40)]
        rates += [top * (1 - 0.5 * (1 - i / 40) ** 2) for i in range(40)]
        curve = serving.curve(rates, name, percentile)
        series.append(Series(option.name, rates, curve))
        tops.append(top)
        values += curve[:1]
    low = min(min(tops) / 100, plan.rate * 0.5)
    series = [
        Series(s.name, [x for x in s.x if x >= low], [y for x, y in zip(s.x, s.y, strict=True) if x >= low])
        for s in series
    ]
    ceiling = max(max(v for v in values if math.isfinite(v)) * 12, (target or 0) * 1.5)
    label = f"SLO {milliseconds(target)}" if target is not None else ""
    mark = plan.tuned or drawn[0]
    peak = plan.rate * plan.case.traffic.peak_factor / max(float(mark.replicas(plan.rate)), 1.0)
    return line(
        f"{title}, p{percentile:g}, of one replica",
        series,
        x_label="requests per second on one replica",
        y_label="milliseconds",
        log_x=True,
        log_y=True,
        x_marks=[Mark(peak, f"busiest hour {number(peak)}/s")],
        y_marks=[Mark(target, label)] if target is not None else [],
        y_max=ceiling,
        note="Curves: closed form. The figures in the table are simulated.",
    )


def _breakdown(plan: Plan, file: PlanFile) -> str:
    horizon = plan.case.plan.horizon_months
    names = {o.key for o in shown(plan)}
    rows = []
    for row in file.options:
        if not row.usable or row.key not in names or row.parts_per_month is None:
            continue
        per = 1000 / (plan.rate * HOURS_PER_MONTH * 3600)
        parts = {k: v * per for k, v in row.parts_per_month.items() if v > 0}
        if row.one_off_total:
            parts[f"one-off over {horizon:g} months"] = row.one_off_total / horizon * per
        rows.append(Bar(row.name, parts))
    return bars(
        "What 1,000 requests cost, and for what",
        rows,
        x_label="$ per 1,000 requests",
        x_format=dollars,
    )


def _options_table(plan: Plan, file: PlanFile) -> str:
    horizon = plan.case.plan.horizon_months
    headers = [
        "option", "tokens in / out", "$ / 1,000 requests", "$ / month", "90% interval", f"$ / {horizon:g} months",
        "GPUs", "utilisation", "one-off", "break-even", "payback",
    ]  # fmt: skip
    rows, strong, faint = [], [], []
    marked = {o.key for o in (plan.keep, plan.tuned) if o is not None}
    for index, row in enumerate(all_rows(file)):
        option = row.option
        if option.key in marked:
            strong.append(index)
        note = "; ".join(option.notes)
        tokens = f"{option.input_tokens:,.0f} / {option.output_tokens:,.0f}"
        if not option.usable or option.per_month is None or option.per_request is None:
            faint.append(index)
            rows.append([f"{row.name}: not usable, {note}", tokens, *["–"] * 9])
            continue
        compared = option.key in plan.comparisons and option.tuned
        scaled, gpu = option.per_month_if_scaled_by_hour, (option.parts_per_month or {}).get("GPU hours", 0.0)
        if scaled and scaled < 0.98 * gpu:
            by_hour = f"{dollars(gpu)} for GPUs would be {dollars(scaled)} if scaled by the hour"
            note = "; ".join([*option.notes, by_hour])
        rows.append(
            [
                f"{row.name} ({note})" if note else row.name,
                tokens,
                dollars(option.per_request * 1000),
                dollars(option.per_month),
                interval(*(option.per_month_interval or (None, None))),
                dollars(option.total_over_horizon or 0.0),
                "" if option.replicas is None else number(option.replicas * (option.gpus_per_replica or 1)),
                share(option.utilisation),
                dollars(option.one_off_total) if option.one_off_total else "",
                per_second(option.break_even_rate) if compared else "",
                months(option.payback_months) if compared else "",
            ]
        )
    return page.table(
        headers,
        rows,
        strong=strong,
        faint=faint,
        caption="Tokens in and out, dollars. Bold: the two that the verdict weighs. Break-even and payback are "
        "against the cheapest way to keep the prompt with today's model. Options with equal figures share a row.",
    )


def _latency_table(plan: Plan, file: PlanFile) -> str:
    rows = [
        [row.name, *(quantiles(value) for value in (found.ttft, found.tpot, found.e2e))]
        for row, found in with_latency(all_rows(file))
    ]
    peak = plan.rate * plan.case.traffic.peak_factor
    caption = f"Latency at the busiest hour, {peak:g} requests/s: p50 / p95 / p99. {slo_text(file)}"
    return page.table(["option", "TTFT", "TPOT", "end to end"], rows, caption=caption)


def _tokens_table(plan: Plan) -> str:
    rows = []
    for key, usage in plan.usages.items():
        rows.append(
            [
                key,
                f"{usage.prefix:,}",
                f"{usage.varying:,.0f}",
                f"{usage.input.mean:,.0f}",
                f"{usage.input.p5:,.0f} / {usage.input.p50:,.0f} / {usage.input.p95:,.0f}",
                f"{usage.output.mean:,.1f}",
                f"{usage.output.p5:,.0f} / {usage.output.p50:,.0f} / {usage.output.p95:,.0f}",
                usage.described(),
            ]
        )
    headers = [
        "model and prompt", "static prefix", "varying", "input", "p5 / p50 / p95", "output", "p5 / p50 / p95",
        "counted with",
    ]  # fmt: skip
    return page.table(headers, rows, left=(0, 7), caption="Tokens per request, chat overhead included")


def _token_charts(plan: Plan) -> list[str]:
    figures = [
        bars(
            "Tokens per request",
            [
                Bar(
                    key,
                    {"static prefix": float(u.prefix), "varying input": u.varying, "output": u.output.mean},
                )
                for key, u in plan.usages.items()
            ],
            x_label="tokens",
        )
    ]
    usage = next((u for u in plan.usages.values() if u.examples), None)
    if usage is not None:
        top = sorted(usage.examples, key=lambda e: -e.tokens)[:SHOWN_EXAMPLES]
        more = len(usage.examples) - len(top)
        figures.append(
            bars(
                "What each few-shot example adds to every request",
                [Bar(f"#{e.number} {e.text[:52]}", {"tokens": float(e.tokens)}) for e in top],
                x_label="tokens",
                note=f"{more} shorter ones are left out." if more > 0 else "",
            )
        )
    return figures


def _once_table(plan: Plan) -> str:
    rows = []
    for option in shown(plan):
        costs = option.costs
        if not costs.once:
            continue
        rows.append(
            [
                option.name,
                *(dollars(costs.once.get(k, 0.0)) for k in ("data", "training", "evaluation", "engineering")),
                dollars(costs.total_once),
                dollars(sum(costs.retraining.values())) if costs.retraining else "–",
                dollars(costs.total_monthly),
            ]
        )
    headers = [
        "option", "data", "training", "evaluation", "engineering", "one-off", "each retraining", "recurring per month",
    ]  # fmt: skip
    blocks = [page.table(headers, rows)]
    run = plan.tuned.costs.training if plan.tuned else None
    if run is not None and run.hours:
        blocks.append(
            page.text(
                f"One training run: {run.tokens:,.0f} tokens, {run.flops:.2e} operations, {run.hours * 60:,.1f} GPU "
                f"minutes at MFU {run.mfu:.0%}.",
                small=True,
            )
        )
    return "\n".join(blocks)


def _swings(plan: Plan) -> str:
    rows = [
        [s.label, f"{s.low_factor:.2f}x to {s.high_factor:.2f}x", dollars(s.low), dollars(s.high), s.why]
        for s in plan.uncertainty.tornado
    ]
    headers = ["assumption", "range", "saving at its low end", "at its high end", "why this range"]
    return page.table(headers, rows, left=(0, 4))
