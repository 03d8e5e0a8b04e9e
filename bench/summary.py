"""The report on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

STYLE = {"met": "bold green", "not met": "bold red", "inconclusive": "bold yellow"}


def ratio(facts: dict[str, Any] | None) -> str:
    """`5.21x [4.90, 5.60]`."""
    if facts is None:
        return "-"
    high = "inf" if facts["high"] is None else f"{facts['high']:.2f}"
    return f"{facts['value']:.2f}x [{facts['low']:.2f}, {high}]"


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
    table = Table(title="service, one request at a time", title_justify="left")
    for name in ("mode", "side", "prompt", "cached", "output", "TTFT", "TPOT", "e2e p50", "e2e p95", "req/s", "$/1k", "$/1k right"):
        table.add_column(name, justify="left" if name in ("mode", "side") else "right")
    for mode, facts in report["modes"].items():
        for side in ("baseline", "candidate"):
            f = facts[side]
            tokens, cost = f["tokens"], f["cost"]
            table.add_row(
                mode,
                side,
                f"{tokens['prompt']:.0f}",
                "-" if tokens["cached"] is None else f"{tokens['cached']:.0f}",
                f"{tokens['output']:.1f}",
                _ms(f["ttft_ms"]),
                _ms(f["tpot_ms"]),
                _ms(f["e2e_ms"]),
                _ms(f["e2e_ms"], "p95"),
                f"{f['requests_per_second']:.2f}",
                f"{cost['per_1000_requests']:.4f}",
                "-" if cost["per_1000_correct"] is None else f"{cost['per_1000_correct']:.4f}",
            )
    lines.append(table)
    for mode, facts in report["modes"].items():
        claim = facts["claim"]
        line = f"{mode}: faster {ratio(claim['speed'])}, cheaper {ratio(claim['cost'])}: {claim['verdict']}"
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
    lines.append(f"written to {final}")
    return lines


def _ms(facts: dict[str, Any], name: str = "p50") -> str:
    if not facts["count"]:
        return "-"
    value = facts[name]["value"]
    return f"{value / 1000:.2f} s" if value >= 1000 else f"{value:.1f} ms"
