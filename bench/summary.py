"""The A/B report on the terminal, and the words that terminal, page and pull request share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import RenderableType

from bench.records import SIDES
from bench.resources import memory_words, power_words
from unshot.contracts.figures import Distribution, Figures
from unshot.contracts.report import BenchReport, Judged, Mode, ModeClaim, RatioInterval

# What a row says that has no figure.
ONE_COUNT, NO_SLO, UNREADABLE = "one count only", "no SLO", "not readable"
NOTHING = {"-", ONE_COUNT, NO_SLO, UNREADABLE}
STYLE = {"met": "bold green", "not met": "bold red", "inconclusive": "bold yellow"}
Rows = Mapping[str, Callable[[Figures], str]]


def time(facts: Distribution, name: str = "p50") -> str:
    """A percentile of a distribution in milliseconds as text; `-` where nothing was counted."""
    found = getattr(facts, name)
    if found is None:
        return "-"
    return f"{found.value / 1000:.2f} s" if found.value >= 1000 else f"{found.value:.1f} ms"


def number(value: float | None, form: str) -> str:
    """A figure as text; `-` where it is not known."""
    return "-" if value is None else format(value, form)


def errors(facts: Figures) -> str:
    """Failed requests by kind, and their share."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in facts.errors.items())
    return f"{kinds} ({facts.error_rate:.1%})" if kinds else "none"


def cached_words(facts: Figures) -> str:
    """The cached prompt tokens and their share, as the server reports them."""
    tokens = facts.tokens
    if tokens.cached is None:
        return "-"
    share = f" ({tokens.cached_share:.0%})" if tokens.cached_share is not None else ""
    return f"{tokens.cached:.0f}{share}"


def token_words(facts: Figures) -> str:
    """How the server's count of output tokens differs from ours."""
    d = facts.server_minus_our_tokens
    if d is None:
        return ONE_COUNT
    return f"{d.mean:+.1f} on average, {d.differ} of {d.requests} differ" if d.differ else "the same"


def goodput_words(facts: Figures) -> str:
    """Requests per second that met the SLO, and their share."""
    g = facts.goodput
    return f"{number(g.requests_per_second, '.2f')}/s ({number(g.share, '.1%')})" if g else NO_SLO


def in_flight_words(facts: Figures) -> str:
    """Requests in flight by the timestamps, beside what was asked for."""
    f = facts.in_flight
    return f"{f.mean:.1f} of {f.asked}, {f.peak} at most" if f and f.asked > 1 else "-"


def server_words(facts: Figures) -> str:
    """What the server counted itself meanwhile."""
    s = facts.server
    if s is None:
        return "-"
    share = s.cached_tokens / s.prompt_tokens if s.cached_tokens is not None and s.prompt_tokens else None
    parts = {
        "TTFT": s.ttft_ms and f"{s.ttft_ms:.1f} ms",
        "TPOT": s.tpot_ms and f"{s.tpot_ms:.2f} ms",
        "queue": s.queue_ms is not None and f"{s.queue_ms:.1f} ms",
        "cached": share is not None and f"{share:.0%}",
        "a step": (s.tokens_a_step and f"{s.tokens_a_step:.1f} tokens")
        or (s.requests_a_step and f"{s.requests_a_step:.1f} requests"),
    }
    return ", ".join(f"{name} {words}" for name, words in parts.items() if words) or "-"


def joules(facts: Figures) -> str:
    """Energy of one answered request."""
    return f"{facts.energy.joules:.3g} J" if facts.energy else UNREADABLE


def answer_time(facts: Figures) -> str:
    """Time to the first token of the answer, where reasoning came before it."""
    if not facts.ttft_answer_ms.p50 or not facts.tokens.reasoning:
        return "-"
    return time(facts.ttft_answer_ms)


ROWS: Rows = {
    "requests": lambda f: str(f.requests),
    "errors": errors,
    "in flight": in_flight_words,
    "prompt tokens": lambda f: number(f.tokens.prompt, ".0f"),
    "cached prompt tokens": cached_words,
    "output tokens": lambda f: number(f.tokens.output, ".1f"),
    "reasoning tokens": lambda f: number(f.tokens.reasoning, ".1f"),
    "TTFT p50": lambda f: time(f.ttft_ms),
    "first answer token p50": answer_time,
    "TPOT p50": lambda f: time(f.tpot_ms),
    "end to end p50": lambda f: time(f.e2e_ms),
    "end to end p95": lambda f: time(f.e2e_ms, "p95"),
    "requests/s": lambda f: number(f.requests_per_second, ".2f"),
    "server's own (mean)": server_words,
    "$ per 1,000": lambda f: number(f.cost.per_1000_requests if f.cost else None, ".4f"),
    "$ per 1,000 correct": lambda f: number(f.cost.per_1000_correct if f.cost else None, ".4f"),
}


def ratio(facts: RatioInterval | None) -> str:
    """`5.21x [4.90, 5.60]`; an interval without bounds is said in words."""
    if facts is None:
        return "-"
    if facts.high is None:
        bounds = f"at least {_times(facts.low)}" if facts.low > 0 else "no bounds"
        return f"{_times(facts.value)}x [{bounds}]"
    return f"{_times(facts.value)}x [{_times(facts.low)}, {_times(facts.high)}]"


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def both(claim: ModeClaim) -> str:
    """Speed and cost ratio in words; said once where they are the same number, as on one machine."""
    speed, cost = ratio(claim.speed), ratio(claim.cost)
    if claim.cost is None:
        return f"{speed} faster, no cost verdict"
    return f"{speed} faster and cheaper" if speed == cost else f"{speed} faster, {cost} cheaper"


def settle_words(claim: ModeClaim) -> str:
    """What would settle an interval that holds the claim; empty where nothing is open."""
    open_ratio = any(r is not None and r.verdict == "inconclusive" for r in (claim.speed, claim.cost))
    if not open_ratio:
        return ""
    if claim.pairs_to_settle is None:
        return "no number of pairs can be named that would settle it"
    return f"about {claim.pairs_to_settle:,} pairs would settle it (80% chance)"


def table_rows(rows: Rows, columns: Sequence[Figures]) -> list[list[str]]:
    """Table rows of the figures that at least one column has."""
    table = [[name, *(show(facts) for facts in columns)] for name, show in rows.items()]
    return [row for row in table if not set(row[1:]) <= NOTHING]


def split_words(facts: Mode) -> str:
    """The speed ratio in its parts."""
    known = [f"{f.name} {f.value:.2f}x" for f in facts.split if f.value is not None]
    unknown = [f.name for f in facts.split if f.value is None]
    return ", ".join(known) + (f"; not measured apart: {', '.join(unknown)}" if unknown else "")


def summary(report: BenchReport, final: Path) -> list[RenderableType]:
    """Verdict, warnings, one table over sides and modes, and where the report is."""
    from rich.table import Table
    from rich.text import Text

    low, high = report.claim.low, report.claim.high
    lines: list[RenderableType] = [
        Text(f"{low:g}-{high:g}x faster and cheaper: {report.verdict.upper()}", style=STYLE[report.verdict]),
        Text(report.reason),
        *(Text(f"warning: {w}", style="yellow") for w in report.warnings),
    ]
    table = Table(title=report.conditions.load, title_justify="left")
    table.add_column("")
    columns = [(mode, side) for mode in report.modes for side in SIDES]
    for mode, side in columns:
        table.add_column(f"{mode}\n{side}", justify="right")
    for row in table_rows(ROWS, [report.modes[mode].side(side) for mode, side in columns]):
        table.add_row(*row)
    lines.append(table)
    for mode, facts in report.modes.items():
        settle = settle_words(facts.claim)
        line = f"{mode}: {both(facts.claim)}: {facts.claim.verdict}"
        lines.append(Text(line + (f" ({settle})" if settle else "")))
        lines.append(Text(f"  of the speed: {split_words(facts)}"))
        if facts.spoilt_blocks:
            lines.append(
                f"  {facts.spoilt_blocks} blocks that the client itself was late in were dropped and measured again"
            )
    q = report.quality
    sides = ", ".join(
        f"{side} {q.side(side).score:.3f} [{q.side(side).low:.3f}, {q.side(side).high:.3f}]" for side in SIDES
    )
    d = q.difference
    lines.append(
        Text(
            f"{q.metric} on {q.rows} rows: {sides}; difference {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}], "
            f"gate {q.gate} (margin {q.margin:g})"
        )
    )
    lines.append(Text(f"peak memory: {memory_words(report.resources)}"))
    lines.append(Text(f"power: {power_words(report.resources)}"))
    for mode, facts in report.modes.items():
        old, new = facts.baseline.energy, facts.candidate.energy
        if old and new:
            lines.append(f"{mode}: {old.joules:.3g} J per request against {new.joules:.3g} J")
    lines.append(Text(f"written to {final}"))
    return lines


def judged_words(name: str, judged: Judged | None) -> str:
    """`faster 5.21x [4.90, 5.60]: met`."""
    return f"{name} {ratio(judged)}: {judged.verdict}" if judged else f"{name}: no verdict"
