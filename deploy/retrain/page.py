"""The proposal for people: terminal lines, Markdown for a pull request, and one HTML page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from deploy.retrain.run import KEEP, NOTHING, PROPOSE
from unshot.report import charts, page

KINDS = {PROPOSE: "good", KEEP: "bad", NOTHING: "warn"}
SHOWN = 50
HEADERS = ("held-out rows", "rows", "champion", "new", "new minus champion", "McNemar p")
TESTS = {
    "sealed": "sealed test of the champion",
    "fresh": "fresh corrections, kept out of training",
}
KINDS_OF_ROWS = {
    "train": "rows to tune on (validation and a new test included)",
    "added": "added from the log",
    "replaced": "original rows whose answer an expert corrected",
    "contested": "users' corrections of original rows (nothing changed; look at them)",
    "fresh": "corrections kept out of training",
    "held_back": "left out: nearly a test row",
    "disputed": "corrections that contradict the sealed test (nothing changed; look at them)",
    "unusable": "corrections that could not be used",
    "to_label": "failures and wrong answers without a correction (to_label.jsonl)",
}


def score_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Both scores on each held-out set, as texts."""
    rows = []
    for name, title in TESTS.items():
        c = report.get(name)
        if c is None:
            continue
        d = c["difference"]
        rows.append(
            [
                f"{title}, {c['metric']}",
                str(c["rows"]),
                f"{c['champion']['value']:.3f}",
                f"{c['new']['value']:.3f}",
                f"{d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]",
                f"{c['mcnemar_p']:.3g}",
            ]
        )
    return rows


def gate_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Gates by stage."""
    words = {True: "passed", False: "failed", None: "not decided"}
    return [[name, words[g["passed"]], g["detail"]] for name, g in report["gates"].items()]


def bench_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Speed and cost against the champion."""
    return [
        [f"prefix {mode}", *(_ratio(facts[k]) for k in ("faster", "cheaper"))]
        for mode, facts in (report["bench"] or {}).items()
    ]


def _ratio(r: Mapping[str, Any] | None) -> str:
    if not r or r.get("value") is None:
        return "-"
    low, high = (f"{r[k]:.2f}" if r.get(k) is not None else "open" for k in ("low", "high"))
    return f"{r['value']:.2f}x [{low}, {high}]"


def tables(report: Mapping[str, Any]) -> list[Any]:
    """What the terminal shows."""
    from rich.table import Table
    from rich.text import Text

    shown: list[Any] = [f"{report['verdict']}: {report['reason']}"]
    if report["verdict"] == NOTHING:
        return shown
    shown.append(rows_line(report))
    for title, headers, rows in (
        ("scores on the same rows", HEADERS, score_rows(report)),
        ("gates of the new run", ("gate", "", ""), gate_rows(report)),
        ("against the champion", ("", "faster", "cheaper"), bench_rows(report)),
    ):
        if rows:
            table = Table(title=title, title_justify="left")
            for name in headers:
                table.add_column(name)
            for row in rows:
                table.add_row(*map(Text, row))
            shown.append(table)
    if report["verdict"] == PROPOSE:
        shown += ["nothing was promoted; to do so:", *(f"  {line}" for line in report["promote"])]
    return shown


def rows_line(report: Mapping[str, Any]) -> str:
    """What the rows are, in one line."""
    n = report["rows"]
    return (
        f"{n['train']} rows: {n['added']} added from the log, {n['replaced']} corrected, {n['fresh']} corrections kept "
        f"for the fresh test, {n['held_back']} left out as nearly test rows, {n['to_label']} still to label"
    )


def markdown(report: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    """The proposal as a pull request's text."""
    lines = [f"### Retraining against {report['champion']}: {report['verdict']}", "", report["reason"], ""]
    lines += _table(HEADERS, score_rows(report))
    lines += ["", rows_line(report), ""]
    if gates := gate_rows(report):
        lines += _table(("gate", "", ""), gates)
    if bench := bench_rows(report):
        lines += ["", *_table(("against the champion", "faster", "cheaper"), bench)]
    for name in ("added", "replaced", "contested", "disputed"):
        if changes[name]:
            lines += ["", f"<details><summary>{KINDS_OF_ROWS[name]}: {len(changes[name])}</summary>", ""]
            lines += _table(("input", "answer", "was"), row_texts(changes[name]))
            lines += ["", "</details>"]
    if report["verdict"] == PROPOSE:
        lines += ["", "To promote it:", "", "```sh", *report["promote"], "```"]
    return "\n".join(lines) + "\n"


def _table(headers: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    def cells(row: tuple[str, ...] | list[str]) -> str:
        return "| " + " | ".join(_cell(c) for c in row) + " |"

    return [cells(headers), "|" + "---|" * len(headers), *map(cells, rows)]


def _cell(text: str) -> str:
    """A text of the log's in a Markdown table: no markup of its own, no HTML."""
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ").replace("\r", " ")
    return re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", plain)


def row_texts(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Input, new answer and old answer of changed rows, shortened."""
    shown = []
    for row in rows[:SHOWN]:
        if "messages" in row:
            user = next(m["content"] for m in reversed(row["messages"]) if m["role"] == "user")
            text, new, old = user, row["messages"][-1]["content"], row.get("was", "")
        else:
            text, new, old = (
                row.get("input", row.get("request", "")),
                row.get("correction", ""),
                row.get("test", ""),
            )
        shown.append([_short(text), _short(new), _short(old or "")])
    return shown


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 160 else f"{flat[:157]}..."


def html(report: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    """The whole proposal as one page."""
    spans = [
        charts.Span(TESTS[name], c["difference"]["value"], c["difference"]["low"], c["difference"]["high"])
        for name in TESTS
        if (c := report.get(name))
    ]
    live = report["live"]
    right = "-" if live["share_right"] is None else f"{live['share_right']:.3f}"
    return page.page(
        f"Retraining: {report['verdict']}",
        page.verdict(report["verdict"], [report["reason"]], kind=KINDS[report["verdict"]]),
        page.cards(
            [
                ("champion", report["champion"], ""),
                (
                    "added from the log",
                    str(report["rows"]["added"]),
                    f"{report['rows']['replaced']} corrected",
                ),
                ("live, share right", right, f"{live['judged']} answers judged"),
            ]
        ),
        page.section(
            "Scores on the same rows",
            page.table(HEADERS, score_rows(report)),
            charts.intervals(
                "new minus champion",
                spans,
                x_label="difference",
                marks=[charts.Mark(0.0, "equal"), charts.Mark(-report["margin"], "margin")],
                note="95% paired interval. The fresh test holds the champion's mistakes: it shows what was mended.",
            ),
        ),
        page.section("Gates", page.table(("gate", "", ""), gate_rows(report), left=(0, 1, 2)))
        if report["gates"]
        else "",
        page.section("Speed and cost", page.table(("", "faster", "cheaper"), bench_rows(report)))
        if report["bench"]
        else "",
        page.section(
            "Rows",
            page.facts({text: str(report["rows"][name]) for name, text in KINDS_OF_ROWS.items()}),
            *(
                page.details(
                    f"{KINDS_OF_ROWS[name]}: {len(changes[name])}",
                    page.table(("input", "answer", "was"), row_texts(changes[name]), left=(0, 1, 2)),
                )
                for name in ("added", "replaced", "contested", "disputed", "held_back")
                if changes[name]
            ),
        ),
        page.section("To promote it", *(page.text(line) for line in report["promote"]))
        if report["verdict"] == PROPOSE
        else "",
        footer="Nothing was promoted. The sealed test was never in training; near-duplicates of it are left out.",
    )
