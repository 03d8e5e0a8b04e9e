"""Terminal and HTML views of `unshot bench load` and `unshot bench sweep`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.html import ms
from bench.records import Record
from bench.resources import memory_words, power_words
from bench.summary import errors, goodput_words, joules, token_words, told
from unshot.report import charts, page

# Distributions in the order of a request's life; each is shown by its percentiles.
TIMES = {
    "TTFT": "ttft_ms", "TPOT": "tpot_ms", "ITL": "itl_ms", "end to end": "e2e_ms",
    "queued in the client": "queue_ms",
}  # fmt: skip
# A look-up that is worth a word, seconds.
SLOW_DNS = 0.01
SHOWN = ("p50", "p90", "p95", "p99")
COUNTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "requests": lambda f: str(f["requests"]),
    "answered": lambda f: str(f["answered"]),
    "errors": errors,
    "requests/s": lambda f: f"{f['requests_per_second'] or 0:.2f}",
    "input tokens/s": lambda f: f"{f['input_tokens_per_second'] or 0:,.1f}",
    "output tokens/s": lambda f: f"{f['output_tokens_per_second'] or 0:,.1f}",
    "output tokens a request": lambda f: f"{f['tokens']['output']:.1f}",
    "server's tokens minus ours": token_words,
    "goodput": goodput_words,
    "joules a request": joules,
}
FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    **COUNTS,
    **{
        f"{label} {p}": (lambda f, key=key, p=p: ms(f[key], p))  # type: ignore[misc]
        for label, key in TIMES.items()
        for p in SHOWN
        if key != "queue_ms" or p == "p99"
    },
}


def load_summary(report: dict[str, Any]) -> list[Any]:
    """One column of figures."""
    return [
        _table(f"{report['url']}, {report['load']}", [("", report["figures"])]),
        *(f"{name}: {text}" for name, text in _client(report["client"], report["resources"]).items()),
    ]


def sweep_summary(report: dict[str, Any]) -> list[Any]:
    """A column of figures per step, and the knee."""
    columns = [(str(p["concurrency"]), p["figures"]) for p in report["points"]]
    return [_table(f"{report['url']}, by concurrency", columns), _knee(report["knee"])]


def _table(title: str, columns: Sequence[tuple[str, dict[str, Any]]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=len(columns) > 1)
    table.add_column("")
    for name, _ in columns:
        table.add_column(name, justify="right")
    for row in told(FIGURES, [f for _, f in columns]):
        table.add_row(*row)
    return table


def _client(client: dict[str, Any], resources: dict[str, Any] | None) -> dict[str, str]:
    """What the client did and whether it kept up, and what the run took of this machine."""
    words = f"{client['cpu_seconds_per_1000'] or 0:.3f} CPU s per 1,000 requests"
    words += f", {client['connections']} connections opened on the way"
    late = client["send_lateness"]
    if late:
        words += f", sent late by {late['p50_ms']:.2f} ms at p50, {late['p99_ms']:.2f} ms at p99"
    if (client["dns_seconds"] or 0) > SLOW_DNS:
        words += f", host name looked up in {charts.milliseconds(client['dns_seconds'] * 1000)}"
    facts = {"client": words + ("" if client["valid"] else f"; INVALID: {'; '.join(client['reasons'])}")}
    if "machines" in client:
        facts["clients"] = (
            f"{client['clients']} on Ray, on {', '.join(client['machines'])}; lateness of the worst one"
        )
    if resources:
        facts |= {"peak memory": memory_words(resources), "power of this machine": power_words(resources)}
    return facts


def _knee(knee: dict[str, Any] | None) -> str:
    if knee is None:
        return "too few steps for a knee; three are needed"
    if not knee["saturated"]:
        return (
            f"No knee up to concurrency {knee['concurrency']}: throughput still rises as fast as latency "
            f"({knee['requests_per_second']:.2f} requests/s); go higher with --most or --concurrencies"
        )
    return (
        f"Knee at concurrency {knee['concurrency']}: {knee['requests_per_second']:.2f} requests/s "
        f"({knee['share_of_most']:.0%} of the most, {knee['most_requests_per_second']:.2f}), e2e p50 "
        f"{charts.milliseconds(knee['e2e_p50_ms'])}"
    )


def render(report: dict[str, Any], records: Sequence[Record]) -> str:
    """The HTML page of either kind."""
    good = [r for r in records if r.ok]
    if report["kind"] == "sweep":
        points = report["points"]
        head = page.verdict(
            _knee(report["knee"]), kind="good" if report["knee"] and report["knee"]["saturated"] else "warn"
        )
        rows = told(FIGURES, [p["figures"] for p in points])
        table = page.table(["", *(f"{p['concurrency']} at once" for p in points)], rows)
        throughput = [p["figures"]["requests_per_second"] or 0.0 for p in points]
        series = [
            charts.Series(
                name,
                throughput,
                [
                    p["figures"]["e2e_ms"][name]["value"] if p["figures"]["e2e_ms"]["count"] else float("nan")
                    for p in points
                ],
                points=True,
            )
            for name in ("p50", "p95")
        ]
        figures = [
            charts.line(
                "Throughput against latency",
                series,
                x_label="requests a second",
                y_label="end to end, ms",
                log_y=True,
            )
        ]
        modes = {f"{p['concurrency']} at once": f"closed:{p['concurrency']}" for p in points}
        conditions = {}
    else:
        client = report["client"]
        facts = report["figures"]
        head = page.verdict(
            f"{facts['requests_per_second'] or 0:.2f} requests/s at {report['load']}, {facts['answered']:,} of "
            f"{facts['requests']:,} answered"
            + ("" if client["valid"] else ": INVALID, the client was the bottleneck"),
            [*client["reasons"], *([report["failure"]] if report["failure"] else [])],
            kind="bad" if report["failure"] or not client["valid"] else "warn" if facts["errors"] else "good",
        )
        head += page.cards(_cards(report["figures"]))
        table = page.table(["", ""], told(COUNTS, [report["figures"]])) + page.table(
            ["", *SHOWN],
            [[label, *(_interval(report["figures"][key], p) for p in SHOWN)] for label, key in TIMES.items()],
            caption="Percentiles with their 95% intervals",
        )
        figures = [
            charts.line(
                "Timeline",
                [
                    charts.Series(
                        "end to end",
                        [r.scheduled for r in good],
                        [r.e2e * 1000 for r in good],
                        points=True,
                        joined=False,
                    )
                ],
                x_label="scheduled, seconds since the start",
                y_label="ms",
                log_y=True,
            )
        ]
        modes = {report["load"]: report["load"]}
        conditions = _client(client, report["resources"])
    for label, name in (("End to end", "e2e"), ("Time to first token", "ttft")):
        samples = {k: [getattr(r, name) * 1000 for r in good if r.mode == m] for k, m in modes.items()}
        figures.append(charts.cdf(label, samples, x_label="milliseconds (log)", log_x=True))
    if report["partial"]:
        head = page.verdict("Partial: the run was stopped before its end", kind="warn") + head
    sample = len(records) < sum(f["requests"] for f in _all_figures(report))
    conditions |= {k.replace("_", " "): _value(v) for k, v in report["conditions"].items()}
    return page.page(
        f"{report['kind'].capitalize()} of {report['url'] if report['model'] == 'default' else report['model']}",
        head,
        page.section("Figures", table),
        page.section(
            "Plots",
            *(
                [page.text(f"Drawn from a sample of {len(records):,} requests.", small=True)]
                if sample
                else []
            ),
            page.charts(*figures),
        ),
        page.section("Conditions", page.facts(conditions)),
        subtitle=f"{report['url']}, {report['conditions']['date']}",
        footer="Latency counts from the scheduled time of a request. Definitions: docs/bench.md.",
    )


def _all_figures(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [p["figures"] for p in report["points"]] if report["kind"] == "sweep" else [report["figures"]]


def _cards(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    cards = [
        (label, ms(facts[key], "p50"), f"p99 {ms(facts[key], 'p99')}")
        for label, key in TIMES.items()
        if key in ("ttft_ms", "tpot_ms", "e2e_ms")
    ]
    failed = facts["requests"] - facts["answered"]
    cards.append(("Answered", f"{facts['answered']:,}", f"{failed:,} failed" if failed else "none failed"))
    if "goodput" in facts:
        bounds = ", ".join(f"{k} {v:g} ms" for k, v in facts["goodput"]["slo_ms"].items())
        cards.append(("Within the SLO", f"{facts['goodput']['share'] or 0:.1%}", bounds))
    return cards


def _interval(facts: dict[str, Any], name: str) -> str:
    """The percentile with its interval; a bound that the sample is too small for is a question mark."""
    if not facts.get("count"):
        return "-"
    low, high = (
        charts.number(v) if v is not None else "?" for v in (facts[name]["low"], facts[name]["high"])
    )
    return f"{ms(facts, name)} [{low}, {high}]"


def _value(value: Any) -> str:
    """A condition in words."""
    if isinstance(value, dict):
        return ", ".join(f"{k.replace('_', ' ')} {_value(v)}" for k, v in value.items())
    return "-" if value is None else str(value)
