"""Terminal and HTML views of `unshot bench load` and `unshot bench sweep`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich.console import RenderableType

from bench.html import ms
from bench.records import RequestRecord
from bench.resources import memory_words, power_words
from bench.summary import (
    Rows,
    answer_time,
    cached_words,
    errors,
    goodput_words,
    in_flight_words,
    joules,
    number,
    server_words,
    table_rows,
    token_words,
)
from unshot.contracts.figures import Client, Distribution, Figures, Resources
from unshot.contracts.report import Knee, LoadReport, SloKnee, SweepReport
from unshot.report import charts, page

# Distributions in the order of a request's life; each is shown by its percentiles.
TIMES: dict[str, Callable[[Figures], Distribution]] = {
    "TTFT": lambda f: f.ttft_ms,
    "TPOT": lambda f: f.tpot_ms,
    "ITL": lambda f: f.itl_ms,
    "end to end": lambda f: f.e2e_ms,
    "queued in the client": lambda f: f.queue_ms,
    "connecting, TLS included": lambda f: f.connect_ms,
}
# A look-up that is worth a word, seconds.
SLOW_DNS = 0.01
SHOWN = ("p50", "p90", "p95", "p99")
COUNTS: Rows = {
    "requests": lambda f: str(f.requests),
    "answered": lambda f: str(f.answered),
    "errors": errors,
    "in flight": in_flight_words,
    "requests/s": lambda f: number(f.requests_per_second, ".2f"),
    "input tokens/s": lambda f: number(f.input_tokens_per_second, ",.1f"),
    "output tokens/s": lambda f: number(f.output_tokens_per_second, ",.1f"),
    "prompt tokens per request": lambda f: number(f.tokens.prompt, ".1f"),
    "cached prompt tokens": cached_words,
    "output tokens per request": lambda f: number(f.tokens.output, ".1f"),
    "reasoning tokens per request": lambda f: number(f.tokens.reasoning, ".1f"),
    "first answer token p50": answer_time,
    "server's tokens minus ours": token_words,
    "goodput": goodput_words,
    "joules per request": joules,
    "server's own (mean)": server_words,
}


def _figures() -> Rows:
    rows = dict(COUNTS)
    for label, find in TIMES.items():
        for p in SHOWN if label in ("TTFT", "TPOT", "ITL", "end to end") else ("p99",):
            rows[f"{label} {p}"] = lambda f, find=find, p=p: ms(find(f), p)  # type: ignore[misc]
    return rows


FIGURES = _figures()
# What is shown of each turn of a conversation.
OF_A_TURN = {
    name: FIGURES[name]
    for name in ("requests", "answered", "errors", "prompt tokens per request", "cached prompt tokens",
                 "output tokens per request", "TTFT p50", "TTFT p99", "TPOT p50", "end to end p50")
}  # fmt: skip


def load_summary(report: LoadReport) -> list[RenderableType]:
    """One column of figures."""
    return [
        *(f"warning: {w}" for w in report.warnings),
        _table(f"{report.url}, {report.load}", [("", report.figures)]),
        *([_table("by turn", _turns(report), OF_A_TURN)] if report.turns else []),
        *(f"{name}: {text}" for name, text in _client(report.client, report.resources).items()),
    ]


def sweep_summary(report: SweepReport) -> list[RenderableType]:
    """A column of figures per step, and the knee."""
    columns = [(p.label, p.figures) for p in report.points]
    return [
        *(f"warning: {w}" for w in report.warnings),
        _table(f"{report.url}, by load", columns),
        knee_words(report),
    ]


def _turns(report: LoadReport) -> list[tuple[str, Figures]]:
    return [(f"turn {i}", facts) for i, facts in enumerate(report.turns, start=1)]


def _table(title: str, columns: Sequence[tuple[str, Figures]], rows: Rows = FIGURES) -> RenderableType:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=len(columns) > 1)
    table.add_column("")
    for name, _ in columns:
        table.add_column(name, justify="right")
    for row in table_rows(rows, [f for _, f in columns]):
        table.add_row(*row)
    return table


def _client(client: Client, resources: Resources | None) -> dict[str, str]:
    """What the client did and whether it kept up, and what the run took of this machine."""
    words = f"{number(client.cpu_seconds_per_1000, '.3f')} CPU s per 1,000 requests"
    words += f", {client.connections} connections opened on the way"
    late, lag = client.send_lateness, client.loop_lag
    if late:
        words += f", sent late by {late.p50_ms:.2f} ms at p50, {late.p99_ms:.2f} ms at p99"
    if lag:
        words += f", its loop late by {lag.p99_ms:.2f} ms in 1% of the time"
    if (client.dns_seconds or 0) > SLOW_DNS:
        words += f", host name looked up in {charts.milliseconds((client.dns_seconds or 0) * 1000)}"
    facts = {"client": words + ("" if client.valid else f"; INVALID: {'; '.join(client.reasons)}")}
    if client.machines:
        facts["clients"] = (
            f"{client.clients} on Ray, on {', '.join(client.machines)}; lateness of the worst one"
        )
    if resources:
        facts |= {"peak memory": memory_words(resources), "power of this machine": power_words(resources)}
    return facts


def knee_words(report: SweepReport) -> str:
    """The knee of throughput against latency, or the greatest rate within the SLO."""
    return _knee(report.knee) if report.slo_knee is None else slo_words(report.slo_knee)


def slo_words(found: SloKnee) -> str:
    """The greatest rate within the SLO, and what is known of the next."""
    after = ""
    if found.next_rate is not None:
        share = "the client itself was late" if found.next_share is None else f"it is {found.next_share:.1%}"
        after = f"; at {found.next_rate:g}/s {share}"
    if found.rate is None:
        return f"No rate had {found.share:.0%} of its requests within the SLO{after}"
    return (
        f"Up to {found.rate:g} requests/s {found.share:.0%} are within the SLO "
        f"(goodput {number(found.goodput, '.2f')}/s){after or '; go higher with --rates'}"
    )


def _knee(knee: Knee | None) -> str:
    if knee is None:
        return "Too few steps for a knee; three that count are needed"
    if not knee.saturated:
        return (
            f"No knee up to concurrency {knee.concurrency}: throughput still rises as fast as latency "
            f"({knee.requests_per_second:.2f} requests/s); go higher with --most or --concurrencies"
        )
    return (
        f"Knee at concurrency {knee.concurrency}: {knee.requests_per_second:.2f} requests/s "
        f"({knee.share_of_most:.0%} of the most, {knee.most_requests_per_second:.2f}), e2e p50 "
        f"{charts.milliseconds(knee.e2e_p50_ms)}"
    )


def render(report: LoadReport | SweepReport, records: Sequence[RequestRecord]) -> str:
    """The HTML page of either kind."""
    parts = _sweep_parts(report) if isinstance(report, SweepReport) else _load_parts(report, records)
    head, table, figures, modes, conditions = parts
    good = [r for r in records if r.ok]
    for label, name in (("End to end", "seconds"), ("Time to first token", "ttft")):
        samples = {k: [getattr(r, name) * 1000 for r in good if r.mode == m] for k, m in modes.items()}
        figures.append(charts.cdf(label, samples, x_label="milliseconds (log)", log_x=True))
    if report.warnings:
        head = page.verdict("Read this first", report.warnings, kind="warn") + head
    if report.partial:
        head = page.verdict("Partial: the run was stopped before its end", kind="warn") + head
    counts = [p.figures for p in report.points] if isinstance(report, SweepReport) else [report.figures]
    sample = len(records) < sum(f.requests for f in counts)
    conditions |= {k.replace("_", " "): _value(v) for k, v in report.conditions.plain().items()}
    note = [page.text(f"Drawn from a sample of {len(records):,} requests.", small=True)] if sample else []
    return page.page(
        f"{report.kind.capitalize()} of {report.url if report.model == 'default' else report.model}",
        head,
        page.section("Figures", table),
        page.section("Plots", *note, page.charts(*figures)),
        page.section("Conditions", page.facts(conditions)),
        subtitle=f"{report.url}, {report.conditions.date}",
        footer="Latency counts from the scheduled time of a request. Definitions: docs/bench.md.",
    )


Parts = tuple[str, str, list[str], dict[str, str], dict[str, str]]


def _sweep_parts(report: SweepReport) -> Parts:
    """`(head, table, figures, modes by their label, conditions)`."""
    points = report.points
    saturated = report.knee is not None and report.knee.saturated
    held = report.slo_knee is not None and report.slo_knee.rate is not None
    good = "good" if saturated or held else "warn"
    rows = table_rows(FIGURES, [p.figures for p in points])
    throughput = [p.figures.requests_per_second or 0.0 for p in points]
    series = []
    for name in ("p50", "p95"):
        found = [getattr(p.figures.e2e_ms, name) for p in points]
        series.append(
            charts.Series(name, throughput, [f.value if f else math.nan for f in found], points=True)
        )
    figure = charts.line(
        "Throughput against latency",
        series,
        x_label="requests a second",
        y_label="end to end, ms",
        log_y=True,
    )
    modes = {p.label: p.load for p in points}
    table = page.table(["", *(p.label for p in points)], rows)
    return page.verdict(knee_words(report), kind=good), table, [figure], modes, {}


def _load_parts(report: LoadReport, records: Sequence[RequestRecord]) -> Parts:
    """`(head, table, figures, modes by their label, conditions)`."""
    client, facts = report.client, report.figures
    kind = "bad" if report.failure or not client.valid else "warn" if facts.errors else "good"
    head = page.verdict(
        f"{number(facts.requests_per_second, '.2f')} requests/s at {report.load}, {facts.answered:,} of "
        f"{facts.requests:,} answered" + ("" if client.valid else ": INVALID, the client was the bottleneck"),
        [*client.reasons, *([report.failure] if report.failure else [])],
        kind=kind,
    )
    table = page.table(["", ""], table_rows(COUNTS, [facts])) + page.table(
        ["", *SHOWN],
        [
            [label, *(_interval(find(facts), p) for p in SHOWN)]
            for label, find in TIMES.items()
            if find(facts).count
        ],
        caption="Percentiles with their 95% intervals",
    )
    if report.turns:
        table += page.table(
            ["", *(name for name, _ in _turns(report))],
            table_rows(OF_A_TURN, report.turns),
            caption="Turns of a conversation",
        )
    good = [r for r in records if r.ok]
    timeline = charts.Series(
        "end to end", [r.scheduled for r in good], [r.seconds * 1000 for r in good], points=True, joined=False
    )
    figure = charts.line(
        "Timeline", [timeline], x_label="scheduled, seconds since the start", y_label="ms", log_y=True
    )
    conditions = _client(client, report.resources)
    return head + page.cards(_cards(facts)), table, [figure], {report.load: report.load}, conditions


def _cards(facts: Figures) -> list[tuple[str, str, str]]:
    cards = [
        (label, ms(find(facts), "p50"), f"p99 {ms(find(facts), 'p99')}")
        for label, find in TIMES.items()
        if label in ("TTFT", "TPOT", "end to end")
    ]
    failed = facts.requests - facts.answered
    cards.append(("Answered", f"{facts.answered:,}", f"{failed:,} failed" if failed else "none failed"))
    if facts.goodput:
        bounds = ", ".join(f"{k} {v:g} ms" for k, v in facts.goodput.slo_ms.items())
        cards.append(("Within the SLO", number(facts.goodput.share, ".1%"), bounds))
    return cards


def _interval(facts: Distribution, name: str) -> str:
    """The percentile with its interval; a bound that the sample is too small for is a question mark."""
    found = getattr(facts, name)
    if found is None:
        return "-"
    low, high = (charts.number(v) if v is not None else "?" for v in (found.low, found.high))
    return f"{ms(facts, name)} [{low}, {high}]"


def _value(value: object) -> str:
    """A condition in words."""
    if isinstance(value, dict):
        return ", ".join(f"{k.replace('_', ' ')} {_value(v)}" for k, v in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
