"""`report.html`: the verdict, the two ratios, error rates and one line of conditions first, then the rest.

One file, no script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.records import SIDES, RequestRecord
from bench.resources import memory_words, power_words
from bench.summary import (
    ROWS,
    Rows,
    both,
    errors,
    goodput_words,
    joules,
    number,
    ratio,
    settle_words,
    table_rows,
    token_words,
)
from unshot.contracts.figures import Distribution
from unshot.contracts.report import BenchReport, RatioInterval, SidePrice, SystemFacts
from unshot.report import charts, page

# The ratio chart shows an interval up to so many times its value, and says the rest in words.
WIDEST = 8.0
# A baseline of so little correct answers makes every cost per correct answer look good.
FEW_CORRECT = 0.2
KIND = {"met": "good", "not met": "bad", "inconclusive": "warn"}
WORD = {"met": "MET", "not met": "NOT MET", "inconclusive": "INCONCLUSIVE"}


def render(report: BenchReport, records: Sequence[RequestRecord]) -> str:
    """The whole page."""
    title = f"{report.claim.low:g}-{report.claim.high:g}x faster and cheaper: {WORD[report.verdict]}"
    warnings = [page.verdict("Read this first", report.warnings, kind="warn")] if report.warnings else []
    return page.page(
        title,
        page.verdict(
            f"{WORD[report.verdict].capitalize()}: {report.claim.low:g}x faster and cheaper",
            [f"{reason[0].upper()}{reason[1:]}." for reason in report.reasons if reason],
            kind=KIND[report.verdict],
        ),
        *warnings,
        page.cards(_cards(report)),
        page.text(_condition_line(report), small=True),
        page.charts(_claimed(report), _quality_chart(report)),
        page.section("The intervals behind it", page.bullets(_reasons(report)), page.charts(_others(report))),
        page.section("Where the ratio comes from", _split(report)),
        page.section("Measured", _table(report), _definitions()),
        page.section("Latency", page.charts(*_latency(report, records))),
        page.section("Cost", _cost(report)),
        page.section("Quality", _quality(report)),
        *_forecast(report),
        page.section("Conditions", page.facts(_conditions(report))),
        subtitle=_subtitle(report),
        footer="Raw requests: records.jsonl. All figures: report.json. Versions and hashes: manifest.json.",
    )


def _subtitle(report: BenchReport) -> str:
    old, new = (report.systems[side] for side in SIDES)
    return (
        f"{_short(old)} with {old.examples_in_prompt or 'no'} examples in the prompt, against {_short(new)} with "
        f"{new.examples_in_prompt or 'no'} examples."
    )


def _condition_line(report: BenchReport) -> str:
    c, new = report.conditions, report.systems["candidate"]
    many = f"{c.concurrency} request{'s' if c.concurrency > 1 else ''} at a time"
    return (
        f"{new.engine} on {c.hardware.cpu or 'an unknown CPU'}, {_threads(new.threads)}{many}, {c.rows} rows, at most "
        f"{c.max_tokens} tokens an answer, {c.date}."
    )


def _short(system: SystemFacts) -> str:
    """The last two parts of a path: artifacts of different runs share their file name."""
    return "/".join(system.spec.rstrip("/").split("/")[-2:])


def _threads(count: int | None) -> str:
    return f"{count} thread{'s' if count != 1 else ''}, " if count else ""


def _reasons(report: BenchReport) -> list[str]:
    lines = []
    for mode, facts in report.modes.items():
        claim = facts.claim
        where = f"{claim.speed.pairs} pairs in {claim.speed.blocks} blocks on {claim.speed.rows} rows"
        text = f"Prefix {mode}: {both(claim)} ({where}): {claim.verdict}."
        if settle := settle_words(claim):
            text += f" {settle[0].upper()}{settle[1:]}."
        if claim.above_range:
            text += f" Above the claimed {report.claim.high:g}x."
        if claim.looks > 1:
            text += f" Looked at {claim.looks} times; the interval's level of {claim.speed.level:.1%} allows for that."
        if facts.spoilt_blocks:
            text += f" Blocks in which the client itself was late, measured again: {facts.spoilt_blocks}."
        lines.append(text)
    q, d = report.quality, report.quality.difference
    lines.append(
        f"Quality gate {q.gate}: {q.metric} {q.candidate.score:.3f} against {q.baseline.score:.3f} on {q.rows} rows, "
        f"difference {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]; at most {q.margin:g} worse is allowed "
        f"({q.why})."
    )
    for side, count in q.unanswered.items():
        if count:
            lines.append(f"The {side} left {count} of {q.rows} rows unanswered; they count as wrong.")
    return lines


def _cards(report: BenchReport) -> list[tuple[str, str, str]]:
    cards = []
    for mode, facts in report.modes.items():
        speed, cost = facts.claim.speed, facts.claim.cost
        cards.append((f"Faster, {mode}", f"{charts.number(speed.value)}x", _bounds(speed)))
        if cost is None:
            cards.append((f"Cheaper, {mode}", "no verdict", facts.claim.no_cost or ""))
        else:
            cards.append((f"Cheaper, {mode}", f"{charts.number(cost.value)}x", _bounds(cost)))
    worst = {side: max(m.side(side).error_rate for m in report.modes.values()) for side in SIDES}
    cards.append(
        (
            "Errors",
            f"{worst['candidate']:.1%}",
            f"baseline {worst['baseline']:.1%}, allowed {report.conditions.max_error_rate:.1%}",
        )
    )
    q = report.quality
    cards.append((q.metric, f"{q.candidate.score:.3f}", f"baseline {q.baseline.score:.3f}, gate {q.gate}"))
    return cards


def _bounds(interval: RatioInterval) -> str:
    return f"{interval.level:.0%} interval {ratio(interval).split('x ', 1)[-1]}"


def _claimed(report: BenchReport) -> str:
    """The two ratios that the claim is about."""
    found: dict[str, RatioInterval | None] = {}
    for mode, facts in report.modes.items():
        found[f"faster, {mode}"] = facts.claim.speed
        found[f"cheaper, {mode}"] = facts.claim.cost
    return _ratios("How many times faster and cheaper", report, found)


def _others(report: BenchReport) -> str:
    found: dict[str, RatioInterval | None] = {}
    for mode, facts in report.modes.items():
        r = facts.ratios
        found |= {
            f"TTFT, {mode}": r.ttft,
            f"TPOT, {mode}": r.tpot,
            f"end to end per token, {mode}": r.per_token,
        }
        found[f"cost per correct answer, {mode}"] = r.cost_per_correct
    return _ratios("Other figures, baseline over candidate", report, found)


def _ratios(title: str, report: BenchReport, found: Mapping[str, RatioInterval | None]) -> str:
    spans = [_span(name, r) for name, r in found.items() if r is not None]
    if not spans:
        return ""
    return charts.intervals(
        title,
        spans,
        x_label="times better (log scale)",
        log=True,
        x_format=lambda v: f"{charts.number(v)}x",
        marks=[charts.Mark(report.claim.low, f"claim {report.claim.low:g}x"), charts.Mark(1.0, "equal")],
    )


def _span(label: str, r: RatioInterval) -> charts.Span:
    """A ratio for the chart. A bound beyond the chart is None, which is drawn open, and its figure is said."""
    least, most = r.value / WIDEST, r.value * WIDEST
    low = r.low if r.low >= least else None
    high = r.high if r.high is not None and r.high <= most else None
    note = "" if low is not None and high is not None else f" {ratio(r).split('x ', 1)[-1]}"
    return charts.Span(label, r.value, low, high, note)


def _quality_chart(report: BenchReport) -> str:
    q = report.quality
    spans = [charts.Span(s, q.side(s).score, q.side(s).low, q.side(s).high) for s in SIDES]
    return charts.intervals(
        f"{q.metric} on the same {q.rows} rows, 95% interval",
        spans,
        x_label=q.metric,
        x_format=lambda v: f"{v:.2f}",
        note=f"Answers outside the labels: baseline {q.baseline.invalid:.0%}, candidate {q.candidate.invalid:.0%}.",
    )


def _split(report: BenchReport) -> str:
    modes = list(report.modes.values())
    rows = [
        [
            part.name,
            *("not measured" if (v := m.split[i].value) is None else f"{v:.2f}x" for m in modes),
        ]
        for i, part in enumerate(modes[0].split)
    ]
    rows.append(["the whole ratio", *(f"{m.claim.speed.value:.2f}x" for m in modes)])
    notes = dict.fromkeys(
        f"{mode}: {f.note}." for mode, m in report.modes.items() for f in m.split if f.value != 1
    )
    return page.table(["part of the speed ratio", *report.modes], rows) + page.bullets(notes)


def _table(report: BenchReport) -> str:
    """A table a mode, so that both sides fit a narrow screen."""
    tables = []
    for mode, facts in report.modes.items():
        rows = table_rows(FIGURES, [facts.side(side) for side in SIDES])
        tables.append(page.table(["", *SIDES], rows, caption=f"Prefix {mode}"))
    return page.charts(*tables)


FIGURES: Rows = {
    **ROWS,
    "end to end p99": lambda f: ms(f.e2e_ms, "p99"),
    "ITL p50": lambda f: ms(f.itl_ms, "p50"),
    "ITL p95": lambda f: ms(f.itl_ms, "p95"),
    "connecting p50": lambda f: ms(f.connect_ms, "p50"),
    "input tokens/s": lambda f: number(f.input_tokens_per_second, ",.0f"),
    "output tokens/s": lambda f: number(f.output_tokens_per_second, ",.1f"),
    "cut at the limit": lambda f: str(f.stopped_at_limit),
    "errors": errors,
    "server's tokens minus ours": token_words,
    "goodput under the SLO": goodput_words,
    "joules per request": joules,
}


def ms(facts: Distribution, name: str) -> str:
    """A percentile as text; `-` where nothing was counted."""
    found = getattr(facts, name)
    return charts.milliseconds(found.value) if found is not None else "-"


def _definitions() -> str:
    return page.text(
        "TTFT: from the messages to the first token, tokenizing included; reasoning and tool calls are tokens. TPOT: "
        "(last token - first token) / (tokens - 1), a server's stop token left out, which takes no time on the wire. "
        "ITL: time between neighbouring arrivals. Cache on: the shared prefix is in the KV cache; cache off: every "
        "request starts with an empty one. Faster: ratio of mean end-to-end times on the same requests. Cheaper: ratio "
        "of mean dollars; time of the machine is shared by the requests that it works on at once.",
        small=True,
    )


def _latency(report: BenchReport, records: Sequence[RequestRecord]) -> list[str]:
    figures = []
    for mode in report.modes:
        chosen = {s: [r for r in records if r.mode == mode and r.side == s and r.ok] for s in SIDES}
        for name, label in (("seconds", "End to end"), ("ttft", "Time to first token")):
            samples = {str(s): [getattr(r, name) * 1000 for r in chosen[s]] for s in SIDES}
            figures.append(
                charts.cdf(
                    f"{label}, {mode}",
                    samples,
                    x_label="milliseconds (log)",
                    log_x=True,
                    x_format=charts.number,
                )
            )
        figures.append(
            charts.line(
                f"Timeline, {mode}",
                [
                    charts.Series(
                        s, [r.start for r in chosen[s]], [r.seconds * 1000 for r in chosen[s]], points=True
                    )
                    for s in SIDES
                ],
                x_label="seconds since the start",
                y_label="end to end, ms",
                log_y=True,
            )
        )
    return figures


def _cost(report: BenchReport) -> str:
    rows = []
    for mode, facts in report.modes.items():
        for side in SIDES:
            cost = facts.side(side).cost
            thousand, right = (cost.per_1000_requests, cost.per_1000_correct) if cost else (None, None)
            seconds = cost.machine_seconds_per_request if cost else None
            rows.append(
                [
                    mode,
                    side,
                    charts.dollars(thousand) if thousand is not None else "no price",
                    charts.dollars(right) if right is not None else "-",
                    f"{seconds * 1000:,.1f} ms" if seconds is not None else "-",
                ]
            )
    headers = ["", "", "$ per 1,000 requests", "$ per 1,000 correct", "machine time per request"]
    return page.table(headers, rows, left=(0, 1)) + page.text(" ".join(_price_notes(report)), small=True)


def _price_notes(report: BenchReport) -> list[str]:
    notes = [f"The {side}: {_price_words(price)}." for side, price in report.price.items()]
    share = report.quality.correct_share.get("baseline", 1.0)
    if share < FEW_CORRECT:
        notes.append(
            f"Only {share:.0%} of the baseline's answers are right: its cost per correct answer is high because it is "
            "rarely right, not because it is slow."
        )
    return notes


def _price_words(price: SidePrice) -> str:
    if price.tokens is not None:
        t = price.tokens
        cached = f", ${t.cached:g} cached" if t.cached is not None else ", cached ones at the input price"
        return f"${t.input:g} in, ${t.output:g} out{cached} per million tokens ({t.source})"
    if price.per_hour is None:
        return price.source
    machines = f"{price.machines} machines at " if price.machines > 1 else ""
    return f"{machines}${price.per_hour:.4f} an hour ({price.source}) times its machine time"


def _quality(report: BenchReport) -> str:
    q = report.quality
    rows = [
        [
            side,
            f"{q.side(side).score:.3f}",
            f"[{q.side(side).low:.3f}, {q.side(side).high:.3f}]",
            f"{q.side(side).accuracy:.3f}",
            f"{q.side(side).invalid:.1%}",
            str(q.right_only[side]),
        ]
        for side in SIDES
    ]
    headers = ["", q.metric, "95% interval", "accuracy", "outside labels", "correct where the other is not"]
    blocks = [page.table(headers, rows)]
    old, new = q.baseline.classes, q.candidate.classes
    if old and new:
        classes = [
            [label, f"{old[label].f1:.2f}" if label in old else "-", f"{scores.f1:.2f}", str(scores.support)]
            for label, scores in new.items()
        ]
        blocks.append(page.details("F1 by class", page.table(["class", *SIDES, "rows"], classes)))
    return "".join(blocks)


def _forecast(report: BenchReport) -> list[str]:
    rows = [
        [
            row.mode,
            row.side,
            {"ttft": "TTFT p50", "e2e": "end to end p50"}[row.figure],
            charts.milliseconds(row.forecast_ms),
            charts.milliseconds(row.measured_ms),
            f"{row.measured_ms / row.forecast_ms:.2f}x",
            "-" if row.utilisation is None else f"{row.utilisation:.0%}",
        ]
        for row in report.forecast
    ]
    if not rows:
        return []
    note = page.text(
        "The plan is for the catalog's CPU and its busiest hour: its times hold the waiting of a machine as busy as "
        "the last column says; the measurement had one request at a time. `unshot plan --calibrate report.json` fits "
        "the plan to this machine.",
        small=True,
    )
    headers = ["", "", "", "forecast", "measured", "measured / forecast", "busy in the plan"]
    return [
        page.section(
            "The plan's forecast against the measurement", page.table(headers, rows, left=(0, 1, 2)), note
        )
    ]


def _conditions(report: BenchReport) -> dict[str, str]:
    c = report.conditions
    facts: dict[str, str] = {}
    for side in SIDES:
        s = report.systems[side]
        size = f", {s.bytes / 1e6:,.0f} MB" if s.bytes else ""
        facts[side] = (
            f"{s.spec} ({s.model}{size}), {s.library}, {_threads(s.threads)}{s.device}; "
            f"{s.examples_in_prompt} examples in the prompt; tokens counted by {s.tokens_counted_by}"
        )
        if s.proxy not in (None, "none"):
            facts[f"{side}, through a proxy"] = str(s.proxy)
        if s.command:
            facts[f"{side}, its server"] = " ".join(s.command)
        if s.client:
            facts[f"{side}, the client"] = (
                "kept up" if s.client.valid else f"was the bottleneck: {'; '.join(s.client.reasons)}"
            )
    fill = {side: value for side, value in report.prefix_fill_ms.items() if value is not None}
    machine = c.hardware
    return {
        **facts,
        "machine": f"{machine.cpu}, {machine.cores} cores, {(machine.ram_bytes or 0) / 2**30:.0f} GiB",
        "peak memory": memory_words(report.resources),
        "power": power_words(report.resources),
        "load": f"{c.load} of {c.block}; {c.warm_up} warm-up requests a side, not measured"
        + ("; rows asked again as they are (--repeat)" if c.repeat else "; what is asked again begins anew"),
        "decoding": f"{c.decoding}, at most {c.max_tokens} tokens",
        "filling the prefix cache": ", ".join(f"{s} {charts.milliseconds(v)}" for s, v in fill.items())
        or "not run",
        "data": f"{c.data}, {c.rows} rows",
        "date": c.date,
    }
