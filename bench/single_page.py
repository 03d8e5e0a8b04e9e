"""Terminal and HTML views of `unshot bench load` and `unshot bench sweep`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.html import ms
from bench.records import Record
from unshot import charts, page

FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "requests": lambda f: str(f["requests"]),
    "answered": lambda f: str(f["answered"]),
    "errors": lambda f: ", ".join(f"{n} {k}" for k, n in f["errors"].items()) or "none",
    "requests/s": lambda f: f"{f['requests_per_second'] or 0:.2f}",
    "output tokens/s": lambda f: f"{f['output_tokens_per_second'] or 0:,.1f}",
    **{
        f"{label} {p}": (lambda f, key=key, p=p: ms(f[key], p))  # type: ignore[misc]
        for label, key in (
            ("TTFT", "ttft_ms"),
            ("TPOT", "tpot_ms"),
            ("ITL", "itl_ms"),
            ("end to end", "e2e_ms"),
        )
        for p in ("p50", "p95", "p99")
    },
    "queued in the client p99": lambda f: ms(f["queue_ms"], "p99"),
    "goodput": lambda f: (
        f"{f['goodput']['requests_per_second']:.2f}/s ({f['goodput']['share']:.1%})"
        if "goodput" in f
        else "no SLO"
    ),
}


def load_summary(report: dict[str, Any]) -> list[Any]:
    """One column of figures."""
    return [
        _table(f"{report['url']}, {report['load']}", [("", report["figures"])]),
        _client(report["client"]),
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
    for name, show in FIGURES.items():
        table.add_row(name, *(show(f) for _, f in columns))
    return table


def _client(client: dict[str, Any]) -> str:
    late = client["send_lateness"]
    text = f"client: {client['cpu_seconds_per_1000'] or 0:.3f} CPU s per 1,000 requests"
    if late:
        text += f", sent late by {late['p50_ms']:.2f} ms at p50, {late['p99_ms']:.2f} ms at p99"
    return text + ("" if client["valid"] else f"; INVALID: {'; '.join(client['reasons'])}")


def _knee(knee: dict[str, Any] | None) -> str:
    if knee is None:
        return "too few steps for a knee; three are needed"
    if not knee["saturated"]:
        return (
            f"no knee up to concurrency {knee['concurrency']}: throughput still rises as fast as latency "
            f"({knee['requests_per_second']:.2f} requests/s); raise --concurrencies"
        )
    return (
        f"knee at concurrency {knee['concurrency']}: {knee['requests_per_second']:.2f} requests/s "
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
        rows = [[name, *(show(p["figures"]) for p in points)] for name, show in FIGURES.items()]
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
    else:
        client = report["client"]
        head = page.verdict(
            f"{report['figures']['requests_per_second'] or 0:.2f} requests/s at {report['load']}"
            + ("" if client["valid"] else ": INVALID, the client was the bottleneck"),
            client["reasons"],
            kind="good" if client["valid"] else "bad",
        )
        table = page.table(["", ""], [[name, show(report["figures"])] for name, show in FIGURES.items()])
        figures = [
            charts.line(
                "Timeline",
                [
                    charts.Series(
                        "end to end", [r.scheduled for r in good], [r.e2e * 1000 for r in good], points=True
                    )
                ],
                x_label="scheduled, seconds since the start",
                y_label="ms",
                log_y=True,
            )
        ]
        modes = {report["load"]: report["load"]}
    for label, name in (("End to end", "e2e"), ("Time to first token", "ttft")):
        samples = {k: [getattr(r, name) * 1000 for r in good if r.mode == m] for k, m in modes.items()}
        figures.append(charts.cdf(label, samples, x_label="milliseconds (log)", log_x=True))
    if report["partial"]:
        head = page.verdict("Partial: the run was stopped before its end", kind="warn") + head
    return page.page(
        f"{report['kind'].capitalize()} of {report['model']}",
        head,
        page.section("Figures", table),
        page.section("Plots", page.charts(*figures)),
        page.section("Conditions", page.facts({k: str(v) for k, v in report["conditions"].items()})),
        subtitle=report["url"],
        footer="Latency counts from the scheduled time of a request. Definitions: docs/bench.md.",
    )
