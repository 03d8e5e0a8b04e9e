"""`unshot bench compare OLD NEW`: regressions between two reports, by a test on the kept requests."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from bench.pull_request import junit
from unshot.contracts.manifest import read_manifest
from unshot.data.rows import read_text
from unshot.errors import InputError
from unshot.metrics.intervals import t_quantile

LEVEL = 0.95
# Figure -> how it is called; all are better when smaller.
FIGURES = {"e2e": "end to end", "ttft": "TTFT", "tpot": "TPOT"}


def compare_reports(old: Path, new: Path, *, side: str, threshold: float) -> dict[str, Any]:
    """Compare one side of two report directories.

    Welch's interval on the mean log time of each figure and mode, Holm's correction over all of them: a
    regression is a ratio NEW / OLD whose interval lies above 1 + `threshold`. Quality regresses where the
    intervals of the scores do not overlap and NEW is lower. Raises `InputError` for directories that are no
    reports or do not compare.
    """
    if not 0 <= threshold < math.inf:
        raise InputError(f"--threshold is {threshold:g}; it must be 0 or more")
    reports = [_read(path) for path in (old, new)]
    records = [_records(path, side) for path in (old, new)]
    modes = [m for m in records[0] if m in records[1]]
    if not modes:
        raise InputError(
            f"{new}: no mode in common with {old} ({', '.join(records[0])} / {', '.join(records[1])})"
        )
    rows = []
    for mode in modes:
        for figure, name in FIGURES.items():
            a, b = ([v for r in part[mode] if (v := r[figure]) is not None] for part in records)
            if len(a) >= 2 and len(b) >= 2:
                rows.append({"name": f"{name}, {mode}", **_change(a, b)})
    _judge(rows, threshold)
    rows += _scores(reports, side)
    warnings = []
    hardware = [r.get("conditions", {}).get("hardware", {}).get("cpu") for r in reports]
    if hardware[0] != hardware[1]:
        warnings.append(f"different machines: {hardware[0]} / {hardware[1]}")
    return {
        "old": str(old),
        "new": str(new),
        "side": side,
        "threshold": threshold,
        "rows": rows,
        "warnings": warnings,
    }


def _read(path: Path) -> dict[str, Any]:
    read_manifest(path, stage="bench")
    loaded: dict[str, Any] = json.loads(read_text(path / "report.json"))
    return loaded


def _records(path: Path, side: str) -> dict[str, list[dict[str, float | None]]]:
    """Times by mode of the measured, answered requests."""
    modes: dict[str, list[dict[str, float | None]]] = {}
    for line in read_text(path / "records.jsonl").splitlines():
        record = json.loads(line)
        if record["side"] != side or record["error"] or record["block"] < 0:
            continue
        times, tokens = record["token_times"], record["output_tokens"]
        tpot = (times[-1] - times[0]) / (tokens - 1) if len(times) > 1 and tokens > 1 else None
        modes.setdefault(record["mode"], []).append(
            {"e2e": record["e2e"], "ttft": times[0] if times else None, "tpot": tpot}
        )
    return modes


def _change(a: list[float], b: list[float]) -> dict[str, Any]:
    x, y = np.log(np.maximum(a, 1e-9)), np.log(np.maximum(b, 1e-9))
    va, vb = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    error = math.sqrt(va + vb)
    freedom = (va + vb) ** 2 / (va**2 / (len(x) - 1) + vb**2 / (len(y) - 1)) if error else len(x) + len(y) - 2
    return {
        "change": float(y.mean() - x.mean()),
        "error": error,
        "freedom": float(freedom),
        "old_ms": float(np.exp(x.mean()) * 1000),
        "new_ms": float(np.exp(y.mean()) * 1000),
        "requests": [len(x), len(y)],
    }


def _judge(rows: list[dict[str, Any]], threshold: float) -> None:
    """Verdicts with Holm's step-down: the clearest change has the strictest level."""
    limit = math.log1p(threshold)

    def clearness(row: dict[str, Any]) -> float:
        away = abs(row["change"]) - limit
        return away / row["error"] if row["error"] else math.copysign(math.inf, away)

    rejecting = True
    for rank, row in enumerate(sorted(rows, key=clearness, reverse=True)):
        alpha = (1 - LEVEL) / (len(rows) - rank)
        half = t_quantile(1 - alpha / 2, max(row["freedom"], 1.0)) * row["error"]
        low, high = row["change"] - half, row["change"] + half
        rejecting = rejecting and (low > limit or high < -limit)
        row["verdict"] = ("regression" if low > limit else "improvement") if rejecting else "no change shown"
        row["ratio"] = {"value": math.exp(row["change"]), "low": math.exp(low), "high": math.exp(high)}
    for row in rows:
        for key in ("change", "error", "freedom"):
            del row[key]


def _scores(reports: list[dict[str, Any]], side: str) -> list[dict[str, Any]]:
    if not all("quality" in r for r in reports):
        return []
    old, new = (r["quality"][side] for r in reports)
    verdict = "no change shown"
    if new["high"] < old["low"]:
        verdict = "regression"
    elif new["low"] > old["high"]:
        verdict = "improvement"
    return [
        {
            "name": reports[0]["quality"]["metric"],
            "old": old["score"],
            "new": new["score"],
            "verdict": verdict,
        }
    ]


def _cells(row: dict[str, Any]) -> list[str]:
    if "ratio" not in row:
        return [row["name"], f"{row['old']:.3f}", f"{row['new']:.3f}", "", row["verdict"]]
    r = row["ratio"]
    change = f"{r['value'] - 1:+.1%} [{r['low'] - 1:+.1%}, {r['high'] - 1:+.1%}]"
    return [row["name"], f"{row['old_ms']:.1f} ms", f"{row['new_ms']:.1f} ms", change, row["verdict"]]


HEADERS = ("figure", "old", "new", "change, 95%", "verdict")


def compare_summary(result: dict[str, Any]) -> list[Any]:
    """The comparison as a rich table."""
    from rich.table import Table

    table = Table(title=f"{result['side']}: {result['old']} -> {result['new']}", title_justify="left")
    for header in HEADERS:
        table.add_column(header, justify="left" if header in ("figure", "verdict") else "right")
    for row in result["rows"]:
        table.add_row(*_cells(row))
    return [table, *(f"warning: {w}" for w in result["warnings"])]


def to_markdown(result: dict[str, Any]) -> str:
    """The comparison as a Markdown table."""
    lines = ["| " + " | ".join(HEADERS) + " |", "|---|--:|--:|--:|---|"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in result["rows"]]
    return "\n".join([*lines, "", *(f"Warning: {w}." for w in result["warnings"])]) + "\n"


def to_junit(result: dict[str, Any]) -> str:
    """The comparison as JUnit XML: a regression is a failure."""
    return junit(
        "unshot bench compare",
        [
            (row["name"], " ".join(_cells(row)) if row["verdict"] == "regression" else None)
            for row in result["rows"]
        ],
    )
