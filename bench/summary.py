"""The report on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.records import SIDES
from bench.resources import memory_words, power_words

# What a row says that has no figure.
ONE_COUNT, NO_SLO, UNREADABLE = "one count only", "no SLO", "not readable"
NOTHING = {"-", ONE_COUNT, NO_SLO, UNREADABLE}
STYLE = {"met": "bold green", "not met": "bold red", "inconclusive": "bold yellow"}


def time(facts: dict[str, Any], name: str = "p50") -> str:
    """A percentile of a distribution in milliseconds as text; `-` where nothing was counted."""
    if not facts["count"]:
        return "-"
    value = facts[name]["value"]
    return f"{value / 1000:.2f} s" if value >= 1000 else f"{value:.1f} ms"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def errors(facts: dict[str, Any]) -> str:
    """Failed requests by kind."""
    return ", ".join(f"{n} {kind}" for kind, n in facts["errors"].items()) or "none"


def token_words(facts: dict[str, Any]) -> str:
    """How the server's count of output tokens differs from ours."""
    d = facts["server_minus_our_tokens"]
    if d is None:
        return ONE_COUNT
    return (
        f"{d['mean']:+.1f} on average, {d['differ']} of {d['requests']} differ" if d["differ"] else "the same"
    )


def goodput_words(facts: dict[str, Any]) -> str:
    """Requests per second that met the SLO, and their share."""
    g = facts.get("goodput")
    return f"{g['requests_per_second'] or 0:.2f}/s ({g['share'] or 0:.1%})" if g else NO_SLO


def joules(facts: dict[str, Any]) -> str:
    """Energy of one answered request."""
    return f"{facts['energy']['joules']:.3g} J" if facts.get("energy") else UNREADABLE


ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "requests": lambda f: str(f["requests"]),
    "prompt tokens": lambda f: f"{f['tokens']['prompt']:.0f}",
    "of them cached": lambda f: _number(f["tokens"]["cached"], ".0f"),
    "output tokens": lambda f: f"{f['tokens']['output']:.1f}",
    "TTFT p50": lambda f: time(f["ttft_ms"]),
    "TPOT p50": lambda f: time(f["tpot_ms"]),
    "end to end p50": lambda f: time(f["e2e_ms"]),
    "end to end p95": lambda f: time(f["e2e_ms"], "p95"),
    "requests/s": lambda f: _number(f["requests_per_second"], ".2f"),
    "$ per 1,000": lambda f: _number(f["cost"]["per_1000_requests"], ".4f"),
    "$ per 1,000 right": lambda f: _number(f["cost"]["per_1000_correct"], ".4f"),
}


def ratio(facts: dict[str, Any] | None) -> str:
    """`5.21x [4.90, 5.60]`."""
    if facts is None:
        return "-"
    high = "inf" if facts["high"] is None else _times(facts["high"])
    return f"{_times(facts['value'])}x [{_times(facts['low'])}, {high}]"


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def both(claim: dict[str, Any]) -> str:
    """Speed and cost ratio in words; said once where they are the same number, as on one machine."""
    speed, cost = ratio(claim["speed"]), ratio(claim["cost"])
    return f"{speed} faster and cheaper" if speed == cost else f"{speed} faster, {cost} cheaper"


def told(
    rows: dict[str, Callable[[dict[str, Any]], str]], columns: Sequence[dict[str, Any]]
) -> list[list[str]]:
    """Table rows of the figures that at least one column has."""
    table = [[name, *(show(facts) for facts in columns)] for name, show in rows.items()]
    return [row for row in table if not set(row[1:]) <= NOTHING]


def summary(report: dict[str, Any], final: Path) -> list[Any]:
    """Verdict, one table over sides and modes, and where the report is."""
    from rich.table import Table
    from rich.text import Text

    low, high = report["claim"]["low"], report["claim"]["high"]
    verdict = report["verdict"]
    lines: list[Any] = [
        Text(f"{low:g}-{high:g}x faster and cheaper: {verdict.upper()}", style=STYLE[verdict]),
        report["reason"],
    ]
    table = Table(title=report["conditions"]["load"], title_justify="left")
    table.add_column("")
    columns = [(mode, side) for mode in report["modes"] for side in SIDES]
    for mode, side in columns:
        table.add_column(f"{mode}\n{side}", justify="right")
    for name, show in ROWS.items():
        table.add_row(name, *(show(report["modes"][mode][side]) for mode, side in columns))
    lines.append(table)
    for mode, facts in report["modes"].items():
        claim = facts["claim"]
        line = f"{mode}: {both(claim)}: {claim['verdict']}"
        if claim.get("pairs_to_settle"):
            line += f" (about {claim['pairs_to_settle']} pairs would settle it)"
        lines.append(line)
    quality = report["quality"]
    sides = ", ".join(
        f"{side} {quality[side]['score']:.3f} [{quality[side]['low']:.3f}, {quality[side]['high']:.3f}]"
        for side in ("baseline", "candidate")
    )
    d = quality["difference"]
    lines.append(
        f"{quality['metric']} on {quality['rows']} rows: {sides}; difference {d['value']:+.3f} "
        f"[{d['low']:+.3f}, {d['high']:+.3f}], gate {quality['gate']} (margin {quality['margin']:g})"
    )
    lines.append(f"peak memory: {memory_words(report['resources'])}")
    lines.append(f"power: {power_words(report['resources'])}")
    for mode, facts in report["modes"].items():
        energy = [facts[side]["energy"] for side in SIDES]
        if all(energy):
            lines.append(f"{mode}: {energy[0]['joules']:.3g} J a request against {energy[1]['joules']:.3g} J")
    lines.append(f"written to {final}")
    return lines
