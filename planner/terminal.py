"""The plan on a terminal: the verdict, what each option costs and how fast it is, and everything it rests on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.rows import Row, all_rows, main_rows, quantiles, slo_text, with_latency
from unshot.contracts.plan import PlanFile
from unshot.report.formats import dollars, interval, months, number, per_second, share

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from planner.plan import Plan

STYLES = {"tune": "bold green"}


def summary(plan: Plan, file: PlanFile, *, everything: bool = False) -> list[RenderableType]:
    """What `unshot plan` prints; `everything` shows all options instead of the six that matter."""
    rows = all_rows(file) if everything else main_rows(plan, file)
    hidden = len(file.options) - len(rows)
    return [
        *_verdict(plan, file),
        _cost_table(plan, file, rows, hidden if not everything else 0),
        _latency_table(plan, file, rows),
        _tokens(file),
        *_matters(file),
        *_assumptions(file),
    ]


def _verdict(plan: Plan, file: PlanFile) -> list[RenderableType]:
    from rich.text import Text

    verdict = file.verdict
    lines: list[RenderableType] = [Text(verdict.summary, style=STYLES.get(verdict.answer, "bold yellow"))]
    lines += [Text(f"  warning: {warning}", style="yellow") for warning in file.warnings]
    lines += [Text(f"  - {reason}") for reason in verdict.reasons]
    lines += [Text(f"  would change it: {change}", style="dim") for change in verdict.would_change]
    found = file.uncertainty
    if plan.economics is not None and found.break_even is not None and found.saving is not None:
        band, saving, middle = found.break_even, found.saving, plan.economics.break_even
        lines.append(
            Text(
                f"  tuning against keeping: break-even {per_second(middle)} (90%: {per_second(band.p5, middle)} to "
                f"{per_second(band.p95, middle)}), payback {months(plan.economics.payback_months)}, saving "
                f"{dollars(plan.economics.saving)} a month (90%: {interval(saving.p5, saving.p95)})"
            )
        )
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


def _cost_table(plan: Plan, file: PlanFile, rows: list[Row], hidden: int) -> Table:
    horizon = plan.case.plan.horizon_months
    more = f"; {hidden} more with --all" if hidden > 0 else ""
    table = table_of(
        f"Cost at {plan.rate:g} requests/s (90% interval){more}",
        *("option", "$/month", f"$/{horizon:g} months", "GPUs", "break-even", "payback"),
    )
    marked = {plan.keep.key if plan.keep else "", plan.tuned.key if plan.tuned else ""}
    for row in rows:
        option = row.option
        if not option.usable or option.per_month is None:
            table.add_row(f"{row.name}: not usable, {option.notes[0]}", *[""] * 5, style="dim")
            continue
        low, high = option.per_month_interval or (None, None)
        busy = f"\n{share(option.utilisation)} busy".replace("under ", "<") if option.utilisation else ""
        gpus = (
            "" if option.replicas is None else number(option.replicas * (option.gpus_per_replica or 1)) + busy
        )
        table.add_row(
            row.name + (f" ({'; '.join(option.notes)})" if option.notes else ""),
            f"{dollars(option.per_month)}\n{interval(low, high)}",
            dollars(option.total_over_horizon or 0.0),
            gpus,
            per_second(option.break_even_rate) if option.tuned and plan.keep else "",
            months(option.payback_months) if option.tuned and plan.keep else "",
            style="bold" if option.key in marked else "",
        )
    return table


def _latency_table(plan: Plan, file: PlanFile, rows: list[Row]) -> Table:
    peak = plan.rate * plan.case.traffic.peak_factor
    slo = slo_text(file)
    title = f"Latency at the busiest hour, {peak:g} requests/s (p50 / p95 / p99)" + (
        f"\n{slo}" if slo else ""
    )
    table = table_of(title, "option", "TTFT", "TPOT", "end to end")
    for row, found in with_latency(rows):
        table.add_row(row.name, *(quantiles(value) for value in (found.ttft, found.tpot, found.e2e)))
    return table


def _tokens(file: PlanFile) -> Table:
    table = table_of(
        "Tokens per request (p5/p50/p95)",
        *("model and prompt", "static prefix", "varying", "input", "output", "longest examples"),
    )
    for key, tokens in file.tokens.items():
        top = sorted(tokens.examples, key=lambda e: -e.tokens)[:3]
        table.add_row(
            key,
            f"{tokens.prefix:,}",
            f"{tokens.varying:,.0f}",
            f"{tokens.input.p5:,.0f}/{tokens.input.p50:,.0f}/{tokens.input.p95:,.0f}",
            f"{tokens.output.p5:,.0f}/{tokens.output.p50:,.0f}/{tokens.output.p95:,.0f}",
            ", ".join(f"#{e.number}: {e.tokens}" for e in top),
        )
    return table


def _matters(file: PlanFile) -> list[Table]:
    if not file.uncertainty.tornado:
        return []
    table = table_of(
        "What moves the saving per month most", "assumption", "at its low end", "at its high end"
    )
    for swing in file.uncertainty.tornado[:5]:
        table.add_row(
            swing.label,
            f"{swing.low_factor:.2f}x: {dollars(swing.low)}",
            f"{swing.high_factor:.2f}x: {dollars(swing.high)}",
        )
    return [table]


def _assumptions(file: PlanFile) -> list[RenderableType]:
    from rich.text import Text

    lines: list[RenderableType] = [Text("Assumptions", style="bold")]
    lines += [Text(f"  - {line}", style="dim") for line in file.assumptions]
    if file.verdict.unknown:
        lines.append(Text("Not given (the verdict would be surer)", style="bold"))
        lines += [Text(f"  - {line}", style="dim") for line in file.verdict.unknown]
    return lines
