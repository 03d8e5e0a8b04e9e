"""The verdict where code is reviewed: Markdown for a pull request, JUnit XML for CI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from bench.records import SIDES
from bench.summary import ROWS, ratio


def markdown_report(report: dict[str, Any]) -> str:
    """The report in Markdown: verdict, ratios, figures, conditions."""
    low, high = report["claim"]["low"], report["claim"]["high"]
    q = report["quality"]
    d = q["difference"]
    lines = [
        f"### {low:g}-{high:g}x faster and cheaper: {report['verdict']}",
        "",
        report["reason"],
        "",
        "| prefix | faster | cheaper | verdict |",
        "|---|---|---|---|",
    ]
    for mode, facts in report["modes"].items():
        c = facts["claim"]
        lines.append(f"| {mode} | {ratio(c['speed'])} | {ratio(c['cost'])} | {c['verdict']} |")
    lines += [
        "",
        f"Quality gate {q['gate']}: {q['metric']} {q['candidate']['score']:.3f} against {q['baseline']['score']:.3f}, "
        f"difference {d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}] on {q['rows']} rows, "
        f"margin {q['margin']:g}.",
        "",
    ]
    columns = [(mode, side) for mode in report["modes"] for side in SIDES]
    lines.append("| | " + " | ".join(f"{mode}, {side}" for mode, side in columns) + " |")
    lines.append("|---|" + "--:|" * len(columns))
    for name, show in ROWS.items():
        cells = " | ".join(show(report["modes"][mode][side]) for mode, side in columns)
        lines.append(f"| {name} | {cells} |")
    c = report["conditions"]
    lines += [
        "",
        f"{c['load']}; {c['hardware'].get('cpu')}, {c['hardware'].get('cores')} cores; {c['date']}.",
        "",
    ]
    return "\n".join(lines)


def junit_report(report: dict[str, Any]) -> str:
    """One test case per mode and one for the quality gate."""
    cases = []
    for mode, facts in report["modes"].items():
        c = facts["claim"]
        text = f"faster {ratio(c['speed'])}, cheaper {ratio(c['cost'])}: {c['verdict']}"
        cases.append((f"claim, prefix {mode}", None if c["verdict"] == "met" else text))
    q = report["quality"]
    text = f"{q['metric']} difference {q['difference']['value']:+.3f}, margin {q['margin']:g}: {q['gate']}"
    cases.append(("quality gate", None if q["gate"] == "passed" else text))
    return junit("unshot bench", cases)


def junit(suite: str, cases: Sequence[tuple[str, str | None]]) -> str:
    """JUnit XML of `(name, failure or None)` cases."""
    failures = sum(1 for _, failure in cases if failure)
    root = ElementTree.Element(
        "testsuite", name=suite, tests=str(len(cases)), failures=str(failures), errors="0"
    )
    for name, failure in cases:
        case = ElementTree.SubElement(root, "testcase", classname=suite.replace(" ", "."), name=name)
        if failure:
            ElementTree.SubElement(case, "failure", message=failure).text = failure
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
