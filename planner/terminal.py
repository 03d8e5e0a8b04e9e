"""The plan on a terminal: the verdict, what each option costs and how fast it is, and everything it rests on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unshot.report.formats import dollars, milliseconds, number

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from planner.plan import Plan


def months(value: float | None) -> str:
    """A payback time."""
    if value is None:
        return "never"
    return "at once" if value < 0.05 else f"{value:.1f} months" if value < 100 else "over 8 years"


def per_second(value: float | None, beside: float | None = None) -> str:
    """A break-even rate: requests per second, or per hour where that (or the figure it stands `beside`) is small."""
    if value is None:
        return "never"
    if value == 0:
        return "always"
    return f"{number(value)}/s" if (beside or value) >= 0.1 else f"{number(value * 3600)}/h"


def share(value: float | None) -> str:
    """A utilisation; empty where there is none."""
    if value is None:
        return ""
    return "under 1%" if value < 0.01 else f"{value:.0%}"


def interval(low: float | None, high: float | None, form: Any = dollars) -> str:
    """`low to high`; an open end where a bound is not finite."""
    return f"{form(low) if low is not None else '–'} to {form(high) if high is not None else 'never'}"


def summary(plan: Plan, data: dict[str, Any]) -> list[RenderableType]:
    """What `unshot plan` prints."""
    return [
        *_verdict(plan, data),
        _cost_table(plan, data),
        _latency_table(plan, data),
        _tokens(plan),
        *_matters(plan),
        *_assumptions(plan),
    ]


def _verdict(plan: Plan, data: dict[str, Any]) -> list[RenderableType]:
    from rich.text import Text

    style = "bold green" if plan.triage.answer == "yes" else "bold yellow"
    lines: list[RenderableType] = [Text(plan.triage.headline, style=style)]
    lines += [Text(f"  - {reason}") for reason in plan.triage.reasons]
    lines += [Text(f"  would change it: {change}", style="dim") for change in plan.triage.would_change]
    found = plan.uncertainty
    if plan.economics is not None and found.break_even is not None and found.saving is not None:
        band, saving, middle = found.break_even, found.saving, plan.economics.break_even
        lines.append(
            Text(
                f"  break-even {per_second(middle)} (90%: {per_second(band.p5, middle)} to "
                f"{per_second(band.p95, middle)}), payback {months(plan.economics.payback_months)}, saving "
                f"{dollars(data['compared']['saving_per_month'])} a month (90%: {interval(saving.p5, saving.p95)}); "
                f"cheaper in {found.cheaper:.0%} of the draws"
            )
        )
    for warning in plan.warnings:
        lines.append(Text(f"  note: {warning}", style="yellow"))
    return lines


def table_of(title: str, first: str, *others: str) -> Table:
    """An empty table whose first column is text and whose others are figures."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold", min_width=16)
    for name in others:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _cost_table(plan: Plan, data: dict[str, Any]) -> Table:
    table = table_of(
        f"Cost at {plan.rate:g} requests/s: $ per 1,000 requests, per month (90% interval), break-even rate",
        *("option", "$/1,000", "$/month", "GPUs", "used", "even at", "payback"),
    )
    for row in data["options"]:
        marked = {plan.keep.key if plan.keep else "", plan.tuned.key if plan.tuned else ""}
        style = "bold" if row["key"] in marked else "" if row["usable"] else "dim"
        if not row["usable"]:
            table.add_row(f"{row['name']}: {row['notes'][0]}", *[""] * 6, style=style)
            continue
        low, high = row["per_month_interval"] or (None, None)
        compared = row["key"] in plan.comparisons
        name = row["name"] + (f" ({row['notes'][0]})" if row["notes"] else "")
        table.add_row(
            name,
            dollars(row["per_request"] * 1000),
            f"{dollars(row['per_month'])}\n{interval(low, high)}",
            "" if row["replicas"] is None else number(row["replicas"] * row["gpus_per_replica"]),
            share(row["utilisation"]),
            per_second(row["break_even_rate"]) if compared and row["tuned"] else "",
            months(row["payback_months"]) if compared and row["tuned"] else "",
            style=style,
        )
    return table


def _latency_table(plan: Plan, data: dict[str, Any]) -> Table:
    peak = plan.rate * plan.case.traffic.peak_factor
    title = f"Latency at the busiest hour, {peak:g} requests/s (p50 / p95 / p99)"
    table = table_of(title, "option", "TTFT", "TPOT", "end to end")
    for row in data["options"]:
        found = row["latency_ms"]
        if found is None:
            continue
        cells = [quantiles(found[k], forecast=found["forecast"]) for k in ("ttft", "tpot", "e2e")]
        table.add_row(row["name"], *cells)
    return table


def quantiles(values: dict[str, float | None], *, forecast: bool) -> str:
    """`p50 / p95 / p99`; a provider's median alone is marked as typical."""
    shown = [milliseconds(v) for v in (values["p50"], values["p95"], values["p99"]) if v is not None]
    return " / ".join(shown) if forecast else f"typically {shown[0]}"


def _tokens(plan: Plan) -> Table:
    table = table_of(
        "Tokens per request",
        *("model and prompt", "static prefix", "varying", "input p5/p50/p95", "output p5/p50/p95"),
        "dearest examples",
    )
    for key, usage in plan.usages.items():
        top = sorted(usage.examples, key=lambda e: -e.tokens)[:3]
        table.add_row(
            key,
            f"{usage.prefix:,}",
            f"{usage.varying:,.0f}",
            f"{usage.input.p5:,.0f}/{usage.input.p50:,.0f}/{usage.input.p95:,.0f}",
            f"{usage.output.p5:,.0f}/{usage.output.p50:,.0f}/{usage.output.p95:,.0f}",
            ", ".join(f"#{e.number}: {e.tokens}" for e in top),
        )
    return table


def _matters(plan: Plan) -> list[Table]:
    if not plan.uncertainty.tornado:
        return []
    title = "What matters most: the saving a month"
    table = table_of(title, "assumption", "at its low end", "at its high end")
    for swing in plan.uncertainty.tornado[:5]:
        table.add_row(
            swing.label,
            f"{swing.low_factor:.2f}x: {dollars(swing.low)}",
            f"{swing.high_factor:.2f}x: {dollars(swing.high)}",
        )
    return [table]


def _assumptions(plan: Plan) -> list[RenderableType]:
    from rich.text import Text

    lines: list[RenderableType] = [Text("Assumptions", style="bold")]
    lines += [Text(f"  - {line}", style="dim") for line in plan.assumptions]
    if plan.triage.unknown:
        lines.append(Text("Not said (the verdict would be sharper)", style="bold"))
        lines += [Text(f"  - {line}", style="dim") for line in plan.triage.unknown]
    return lines
