"""Which options a table shows, and in what order: one list for the terminal, the page and the charts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from msgspec import Struct

from planner.plan import Plan
from unshot.contracts.plan import LatencyMs, Percentiles, PlanFile, PlannedOption
from unshot.report.formats import milliseconds

Wanted = Callable[[PlannedOption], bool]


class Row(Struct, frozen=True):
    """One line of a table: an option, its role if it has one, and how many others have the same figures."""

    option: PlannedOption
    role: str = ""
    also: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The option's name, its role before it and what is equal to it behind."""
        same = f" (the same: {', '.join(self.also)})" if self.also else ""
        return f"{self.role}: {self.option.name}{same}" if self.role else f"{self.option.name}{same}"


def main_rows(plan: Plan, file: PlanFile) -> list[Row]:
    """The rows that matter, at most six: today, today cached, cheapest sibling, base with prefix cache, best tuned,
    tuned API."""
    options = file.options
    tuned = plan.tuned.key if plan.tuned else None
    roles: tuple[tuple[str, Wanted], ...] = (
        ("today", lambda o: o.baseline and o.mode == "plain"),
        ("today, cached", lambda o: o.baseline and o.mode in ("cached", "prefix cache")),
        (
            "cheaper sibling",
            lambda o: o.kind == "api" and not o.baseline and not o.tuned and o.mode == "cached",
        ),
        (
            "base model",
            lambda o: o.kind == "hosted" and not o.tuned and not o.baseline and o.mode == "prefix cache",
        ),
        ("tuned", lambda o: o.key == tuned if tuned else o.kind == "hosted" and o.tuned),
        ("tuned API", lambda o: o.kind == "api" and o.tuned),
    )
    rows = []
    for role, wanted in roles:
        fitting = [o for o in options if wanted(o)]
        if fitting:
            best = min(fitting, key=lambda o: (not o.usable, o.per_month or 0.0))
            rows.append(Row(best, role))
    return rows


def all_rows(file: PlanFile) -> list[Row]:
    """Every option; those of equal money and latency are one row."""
    groups: dict[object, list[PlannedOption]] = {}
    for option in file.options:
        latency = option.latency_ms
        alike = (
            (option.kind, option.model, option.tuned, round(option.per_month or 0.0, 2), option.one_off_total,
             option.replicas, latency and latency.to_json())
            if option.usable
            else option.key
        )  # fmt: skip
        groups.setdefault(alike, []).append(option)
    return [Row(first, also=tuple(_short(o) for o in others)) for first, *others in groups.values()]


def _short(option: PlannedOption) -> str:
    return option.mode if option.kind == "api" else f"{option.precision}, {option.mode}"


def quantiles(value: Percentiles) -> str:
    """`p50 / p95 / p99`; a provider's median alone is marked as typical."""
    known = [milliseconds(v) for v in (value.p50, value.p95, value.p99) if v is not None]
    return " / ".join(known) if len(known) > 1 else f"typically {known[0]}"


def with_latency(rows: Iterable[Row]) -> list[tuple[Row, LatencyMs]]:
    """The rows whose latency is known."""
    return [(row, row.option.latency_ms) for row in rows if row.option.latency_ms is not None]


def slo_text(file: PlanFile) -> str:
    """The targets every option is held to and where they come from; empty if there are none."""
    slo = file.slo
    named = (("TTFT", slo.ttft_ms), ("TPOT", slo.tpot_ms), ("end to end", slo.e2e_ms))
    parts = [f"{name} {milliseconds(value)}" for name, value in named if value is not None]
    return f"SLO: p{slo.percentile:g} {', '.join(parts)}; {file.slo_source}" if parts else ""
