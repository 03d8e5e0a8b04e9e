"""The verdict where code is reviewed: Markdown for a pull request, JUnit XML for CI."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from bench.records import SIDES
from bench.summary import ROWS, judged_words, ratio, table_rows
from unshot.contracts.report import BenchReport


def markdown_report(report: BenchReport) -> str:
    """The report in Markdown: verdict, warnings, ratios, figures, conditions."""
    q, d = report.quality, report.quality.difference
    lines = [
        f"### {report.claim.low:g}-{report.claim.high:g}x faster and cheaper: {report.verdict}",
        "",
        report.reason,
        "",
        *(f"> Warning: {w}\n" for w in report.warnings),
        "| prefix | faster | cheaper | verdict |",
        "|---|---|---|---|",
    ]
    for mode, facts in report.modes.items():
        c = facts.claim
        lines.append(f"| {mode} | {ratio(c.speed)} | {ratio(c.cost)} | {c.verdict} |")
    lines += [
        "",
        f"Quality gate {q.gate}: {q.metric} {q.candidate.score:.3f} against {q.baseline.score:.3f}, "
        f"difference {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}] on {q.rows} rows, margin {q.margin:g}.",
        "",
    ]
    columns = [(mode, side) for mode in report.modes for side in SIDES]
    lines.append("| | " + " | ".join(f"{mode}, {side}" for mode, side in columns) + " |")
    lines.append("|---|" + "--:|" * len(columns))
    lines += [
        "| " + " | ".join(row) + " |"
        for row in table_rows(ROWS, [report.modes[mode].side(side) for mode, side in columns])
    ]
    on = report.conditions
    lines += ["", f"{on.load}; {on.hardware.cpu}, {on.hardware.cores} cores; {on.date}.", ""]
    return "\n".join(lines)


def junit_report(report: BenchReport) -> str:
    """One test case per mode and one for the quality gate."""
    cases: list[tuple[str, str | None]] = []
    for mode, facts in report.modes.items():
        c = facts.claim
        text = f"{judged_words('faster', c.speed)}, {judged_words('cheaper', c.cost)}"
        text += "".join(f", {side} errors {gate.rate:.1%}" for side, gate in c.errors.items() if gate.failed)
        cases.append((f"claim, prefix {mode}", None if c.verdict == "met" else f"{text}: {c.verdict}"))
    q = report.quality
    text = f"{q.metric} difference {q.difference.value:+.3f}, margin {q.margin:g}: {q.gate}"
    cases.append(("quality gate", None if q.gate == "passed" else text))
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
