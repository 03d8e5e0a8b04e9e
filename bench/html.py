"""`report.html`: the verdict, its reason and the conditions first, then figures and plots. One file, no script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.measure import block_seconds
from bench.records import SIDES, Record
from bench.resources import memory_words, power_words
from bench.summary import ROWS, both, errors, goodput_words, joules, ratio, token_words, told
from unshot.report import charts, page

# The ratio chart shows an interval up to so many times its value.
WIDEST = 8.0
KIND = {"met": "good", "not met": "bad", "inconclusive": "warn"}
WORD = {"met": "MET", "not met": "NOT MET", "inconclusive": "INCONCLUSIVE"}


def render(report: dict[str, Any], records: Sequence[Record]) -> str:
    """The whole page."""
    low, high = report["claim"]["low"], report["claim"]["high"]
    title = f"{low:g}-{high:g}x faster and cheaper: {WORD[report['verdict']]}"
    return page.page(
        title,
        page.verdict(_headline(report), _reasons(report), kind=KIND[report["verdict"]]),
        page.cards(_cards(report)),
        page.charts(_ratios(report), _quality_chart(report)),
        page.section("Measured", _table(report), _definitions()),
        page.section("Latency", page.charts(*_latency(report, records))),
        page.section("Cost", _cost(report)),
        page.section("Quality", _quality(report)),
        *_forecast(report),
        page.section("Conditions", page.facts(_conditions(report))),
        subtitle=_subtitle(report),
        footer="Raw requests: records.jsonl. All figures: report.json. Versions and hashes: manifest.json.",
    )


def _headline(report: dict[str, Any]) -> str:
    return f"{WORD[report['verdict']].capitalize()}: {report['reason']}"


def _subtitle(report: dict[str, Any]) -> str:
    old, new = (report["systems"][side] for side in SIDES)
    c = report["conditions"]
    return (
        f"{_short(old)} with {old['examples_in_prompt'] or 'no'} examples in the prompt, against {_short(new)} with "
        f"{new['examples_in_prompt'] or 'no'} examples. {new['engine']} on "
        f"{c['hardware'].get('cpu', 'an unknown CPU')}, {_threads(new['threads'])}{c['date']}."
    )


def _short(system: dict[str, Any]) -> str:
    """The last two parts of a path: artifacts of different runs share their file name."""
    return "/".join(str(system["spec"]).rstrip("/").split("/")[-2:])


def _threads(count: int | None) -> str:
    return f"{count} thread{'s' if count != 1 else ''}, " if count else ""


def _reasons(report: dict[str, Any]) -> list[str]:
    lines = []
    for mode, facts in report["modes"].items():
        claim = facts["claim"]
        text = f"Prefix {mode}: {both(claim)} ({claim['speed']['pairs']} pairs): {claim['verdict']}."
        if claim.get("pairs_to_settle"):
            text += f" About {claim['pairs_to_settle']} pairs would settle it."
        if claim.get("above_range"):
            text += f" Above the claimed {report['claim']['high']:g}x."
        lines.append(text)
    q = report["quality"]
    d = q["difference"]
    lines.append(
        f"Quality gate {q['gate']}: {q['metric']} {q['candidate']['score']:.3f} against "
        f"{q['baseline']['score']:.3f} on {q['rows']} rows, difference {d['value']:+.3f} "
        f"[{d['low']:+.3f}, {d['high']:+.3f}]; at most {q['margin']:g} worse is allowed "
        f"({q['why']})."
    )
    return lines


def _cards(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    cards = []
    for mode, facts in report["modes"].items():
        speed = facts["claim"]["speed"]
        cards.append((f"Faster, {mode}", f"{speed['value']:.1f}x", f"95%: {ratio(speed).split('x ')[-1]}"))
    for mode, facts in report["modes"].items():
        cost = [facts[s]["cost"]["per_1000_requests"] for s in SIDES]
        cards.append((f"$ per 1,000, {mode}", charts.dollars(cost[1]), f"baseline {charts.dollars(cost[0])}"))
    q = report["quality"]
    cards.append((q["metric"], f"{q['candidate']['score']:.3f}", f"baseline {q['baseline']['score']:.3f}"))
    first = next(iter(report["modes"].values()))
    cards.append(
        (
            "Prompt tokens",
            f"{first['candidate']['tokens']['prompt']:,.0f}",
            f"baseline {first['baseline']['tokens']['prompt']:,.0f}",
        )
    )
    return cards


def _ratios(report: dict[str, Any]) -> str:
    spans = []
    c = report["claim"]
    for mode, facts in report["modes"].items():
        entries = {
            "end to end": facts["claim"]["speed"],
            "TTFT": facts["ratios"]["ttft"],
            "TPOT": facts["ratios"]["tpot"],
            "cost per correct answer": facts["ratios"]["cost_per_correct"],
        }
        for name, r in entries.items():
            if r:
                # An interval far wider than the claim would make everything else a dot.
                low, high = r["value"] / WIDEST, r["value"] * WIDEST
                bounded = r["high"] is not None
                note = "" if bounded else f" (≥{r['low']:.3g}x)"
                if bounded and not low <= r["low"] <= r["high"] <= high:
                    top = charts.number(r["high"]) if r["high"] < 1e4 else "∞"
                    note = f" [{charts.number(r['low'])}, {top}]"
                high = min(r["high"], high) if bounded else r["value"]
                spans.append(charts.Span(f"{mode}: {name}", r["value"], max(r["low"], low), high, note))
    return charts.intervals(
        "Baseline over candidate, 95% interval",
        spans,
        x_label="times better (log scale)",
        log=True,
        x_format=lambda v: f"{charts.number(v)}x",
        marks=[charts.Mark(c["low"], f"claim {c['low']:g}x"), charts.Mark(1.0, "equal")],
    )


def _quality_chart(report: dict[str, Any]) -> str:
    q = report["quality"]
    spans = [charts.Span(s, q[s]["score"], q[s]["low"], q[s]["high"]) for s in SIDES]
    return charts.intervals(
        f"{q['metric']} on the same {q['rows']} rows, 95% interval",
        spans,
        x_label=q["metric"],
        x_format=lambda v: f"{v:.2f}",
        note=f"Answers outside the labels: baseline {q['baseline']['invalid']:.0%}, "
        f"candidate {q['candidate']['invalid']:.0%}.",
    )


def _table(report: dict[str, Any]) -> str:
    """A table a mode, so that both sides fit a narrow screen."""
    tables = []
    for mode, facts in report["modes"].items():
        rows = told(FIGURES, [facts[side] for side in SIDES])
        tables.append(page.table(["", *SIDES], rows, caption=f"Prefix {mode}"))
    return page.charts(*tables)


FIGURES = {
    **ROWS,
    "end to end p99": lambda f: ms(f["e2e_ms"], "p99"),
    "ITL p50": lambda f: ms(f["itl_ms"], "p50"),
    "ITL p95": lambda f: ms(f["itl_ms"], "p95"),
    "input tokens/s": lambda f: f"{f['input_tokens_per_second'] or 0:,.0f}",
    "output tokens/s": lambda f: f"{f['output_tokens_per_second'] or 0:,.1f}",
    "cut at the limit": lambda f: str(f["stopped_at_limit"]),
    "errors": errors,
    "server's tokens minus ours": token_words,
    "goodput under the SLO": goodput_words,
    "joules a request": joules,
}


def ms(facts: dict[str, Any], name: str) -> str:
    """A percentile as text; `-` where nothing was counted."""
    return charts.milliseconds(facts[name]["value"]) if facts.get("count") else "-"


def _definitions() -> str:
    return page.text(
        "TTFT: from the messages to the first token, tokenizing included. TPOT: (last token - first token) / "
        "(tokens - 1). ITL: time between neighbouring tokens. Tokens are counted from ids, the stop token included. "
        "Cache on: the shared prefix is in the KV cache; cache off: every request starts with an empty one. "
        "Faster: ratio of mean end-to-end times on the same requests.",
        small=True,
    )


def _latency(report: dict[str, Any], records: Sequence[Record]) -> list[str]:
    figures = []
    for mode in report["modes"]:
        chosen = {s: [r for r in records if r.mode == mode and r.side == s and r.ok] for s in SIDES}
        for name, label in (("e2e", "End to end"), ("ttft", "Time to first token")):
            samples = {s: [getattr(r, name) * 1000 for r in chosen[s]] for s in SIDES}
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
                        s, [r.start for r in chosen[s]], [r.e2e * 1000 for r in chosen[s]], points=True
                    )
                    for s in SIDES
                ],
                x_label="seconds since the start",
                y_label="end to end, ms",
                log_y=True,
            )
        )
        figures.append(_throughput(mode, [r for r in records if r.mode == mode]))
    return figures


def _throughput(mode: str, records: Sequence[Record]) -> str:
    """A point a block: what the side answered a second, and how long an answer took."""
    series = []
    for side, seconds in block_seconds(records).items():
        points = []
        for block, each in seconds.items():
            times = [r.e2e for r in records if r.side == side and r.block == block and r.ok]
            if each > 0:
                points.append((1 / each, sum(times) / len(times) * 1000))
        points.sort()
        series.append(charts.Series(side, [x for x, _ in points], [y for _, y in points], points=True))
    return charts.line(
        f"Throughput against latency, {mode}",
        series,
        x_label="requests a second (log), one point a block",
        y_label="mean end to end, ms",
        log_x=True,
        log_y=True,
    )


def _cost(report: dict[str, Any]) -> str:
    rows = []
    for mode, facts in report["modes"].items():
        for side in SIDES:
            cost = facts[side]["cost"]
            right = cost["per_1000_correct"]
            rows.append(
                [
                    mode,
                    side,
                    charts.dollars(cost["per_1000_requests"]),
                    charts.dollars(right) if right is not None else "no right answer",
                    f"{cost['machine_seconds_per_request'] * 1000:,.1f} ms",
                ]
            )
    return page.table(
        ["", "", "$ per 1,000 requests", "$ per 1,000 correct", "machine time a request"], rows, left=(0, 1)
    ) + page.text(
        " ".join(_price_notes(report["price"])),
        small=True,
    )


def _price_notes(price: dict[str, Any]) -> list[str]:
    notes = []
    for side, tokens in price["tokens"].items():
        notes.append(
            f"The {side} at ${tokens['input']:g} in, ${tokens['output']:g} out, ${tokens['cached']:g} cached per "
            f"million tokens ({tokens['source']})."
        )
    if len(price["tokens"]) < 2:
        notes.append(
            f"{'The other side: ' if notes else ''}${price['per_hour']:.4f} an hour ({price['source']}) times the "
            "measured machine time of a request."
        )
    if not notes[:-1]:
        notes.append("Both sides have the same machine, so the ratio does not depend on the price.")
    return notes


def _quality(report: dict[str, Any]) -> str:
    q = report["quality"]
    rows = [
        [
            side,
            f"{q[side]['score']:.3f}",
            f"[{q[side]['low']:.3f}, {q[side]['high']:.3f}]",
            f"{q[side]['accuracy']:.3f}",
            f"{q[side]['invalid']:.1%}",
            str(q["right_only"][side]),
        ]
        for side in SIDES
    ]
    blocks = [
        page.table(
            ["", q["metric"], "95% interval", "accuracy", "outside labels", "right where the other is not"],
            rows,
        )
    ]
    if q["candidate"]["classes"]:
        classes = [
            [label, *(f"{q[s]['classes'][label]['f1']:.2f}" for s in SIDES), str(facts["support"])]
            for label, facts in q["candidate"]["classes"].items()
        ]
        blocks.append(page.details("F1 by class", page.table(["class", *SIDES, "rows"], classes)))
    return "".join(blocks)


def _forecast(report: dict[str, Any]) -> list[str]:
    rows = [
        [
            row["mode"],
            row["side"],
            {"ttft": "TTFT p50", "e2e": "end to end p50"}[row["figure"]],
            charts.milliseconds(row["forecast_ms"]),
            charts.milliseconds(row["measured_ms"]),
            f"{row['measured_ms'] / row['forecast_ms']:.2f}x",
            "-" if row.get("utilisation") is None else f"{row['utilisation']:.0%}",
        ]
        for row in report["forecast"]
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


def _conditions(report: dict[str, Any]) -> dict[str, str]:
    c = report["conditions"]
    facts = {}
    for side in SIDES:
        s = report["systems"][side]
        size = f", {s['bytes'] / 1e6:,.0f} MB" if s["bytes"] else ""
        facts[side] = (
            f"{s['spec']} ({s['model']}{size}), {s['library']}, {_threads(s['threads'])}{s['device']}; "
            f"{s['examples_in_prompt']} examples in the prompt"
        )
        if s.get("client"):
            client = s["client"]
            facts[f"{side}, the client"] = (
                "kept up" if client["valid"] else f"was the bottleneck: {'; '.join(client['reasons'])}"
            )
    fill = report["prefix_fill_ms"]
    machine = c["hardware"]
    return {
        **facts,
        "machine": f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('ram_bytes', 0) / 2**30:.0f} GiB",
        "peak memory": memory_words(report["resources"]),
        "power": power_words(report["resources"]),
        "load": f"{c['load']} of {c['block']}; {c['warm_up']} warm-up requests a side, not measured",
        "decoding": f"{c['decoding']}, at most {c['max_tokens']} tokens",
        "filling the prefix cache": ", ".join(
            f"{s} {charts.milliseconds(v)}" for s, v in fill.items() if v is not None
        )
        or "not run",
        "data": f"{c['data']}, {c['rows']} rows",
        "date": c["date"],
    }
