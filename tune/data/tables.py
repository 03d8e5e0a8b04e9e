"""Results of `unshot data` for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune.data.check_report import CheckReport, Malformed
    from tune.data.review import LabelReview

SHOWN = 10


def check_tables(result: CheckReport) -> list[Any]:
    """Counts, then the first findings of each kind, then the warnings."""
    shown: list[Any] = [_table("", ("", ""), _facts(result))]
    _add_findings(shown, result)
    shown += [f"warning: {text}" for text in result.warnings]
    if (reading := result.reading).example:
        how = (
            "as the model sees it"
            if reading.example_rendered
            else "turn by turn (--base renders it for a model)"
        )
        shown.append(f"an example row, {how}:\n{reading.example}\n")
    shown.append("ready to train" if result.ready else f"not ready to train: {_why(result)}")
    return shown


def _facts(result: CheckReport) -> list[tuple[str, str]]:
    length = result.length
    labels = result.labels
    facts = [
        ("form", result.reading.format),
        ("rows", f"{result.rows}, {result.well_formed} well-formed (at least 50, usually 200)"),
        *(
            (
                f"{name} {length.unit}",
                f"median {spread.median:.0f}, 95% under {spread.p95:.0f}, longest {spread.max:.0f}",
            )
            for name, spread in (("prompt", length.prompt), ("answer", length.answer))
        ),
        (
            "labels",
            f"{labels.classes} classes, {labels.smallest} to {labels.largest} rows, evenness "
            f"{labels.evenness:.2f}"
            if labels
            else "free text",
        ),
        (
            "duplicates",
            f"{result.duplicates.exact_rows} exact, {result.duplicates.near_rows} near "
            f"(similarity {result.duplicates.threshold:g} and more)",
        ),
        *(
            [
                (
                    "close in meaning",
                    f"{p.total} more pairs (cosine {p.threshold:g} and more, {p.embedder})",
                )
            ]
            if (p := result.paraphrases)
            else []
        ),
        ("contradictions", f"{result.contradictions.total} pairs"),
        ("template share", f"{result.variety.template_share:.0%} of the prompts' words"),
        ("personal data", f"{result.personal_data.total} rows"),
    ]
    agreement = result.agreement
    if agreement and agreement.items:
        cohen = agreement.cohen_kappa
        facts.append(
            (
                "agreement",
                f"{agreement.items} items, Krippendorff's alpha {agreement.krippendorff_alpha:.3f}, "
                f"Fleiss' kappa {agreement.fleiss_kappa:.3f}"
                + (f", Cohen's kappa {cohen:.3f}" if cohen is not None else ""),
            )
        )
    return facts


def _add_findings(shown: list[Any], result: CheckReport) -> None:
    agreement = result.agreement
    _add(
        shown,
        "malformed rows",
        ("line", "problem"),
        [(_place(m, result.data), m.problem) for m in result.malformed],
    )
    _add(
        shown,
        "contradictions: near-identical inputs with different answers",
        ("lines", "similarity", "answers", "input"),
        [
            ("{} {}".format(*c.lines), c.similarity, " | ".join(c.answers), c.texts[0])
            for c in result.contradictions.listed
        ],
    )
    _add(
        shown,
        "close in meaning, in other words",
        ("lines", "similarity", "answers", "inputs"),
        [
            (
                "{} {}".format(*c.lines),
                c.similarity,
                " | ".join(dict.fromkeys(c.answers)),
                " | ".join(c.texts),
            )
            for c in (result.paraphrases.listed if result.paraphrases else [])
        ],
    )
    if agreement and agreement.settle_first:
        _add(
            shown,
            "settle first",
            ("lines", "answers", "input"),
            [
                (
                    " ".join(map(str, s.lines)),
                    ", ".join(f"{k}: {v}" for k, v in s.answers.items()),
                    s.text,
                )
                for s in agreement.settle_first.listed
            ],
        )
    _add(
        shown,
        "personal data",
        ("line", "kinds"),
        [(p.line, ", ".join(p.kinds)) for p in result.personal_data.listed],
    )


def _place(fault: Malformed, data: str) -> str:
    """A fault's line, with its file where the data are several."""
    where = str(fault.where)
    return where if where and not where.startswith(f"{data}, ") else str(fault.line)


def import_tables(result: dict[str, Any]) -> list[Any]:
    """The forms of the logs, then what each version of the prompt shares and its traffic."""
    forms = ", ".join(f"{name} ({count:,})" for name, count in result["formats"].items())
    lines: list[Any] = [
        f"read as {forms}; {result['requests']:,} requests, {result['failed']:,} failed, "
        f"{result['without_answer']:,} without a whole answer"
    ]
    rows = []
    for version in result["versions"]:
        traffic = version["traffic"]
        share = version["requests"] / result["requests"]
        lines.append(
            f"version {version['version']}: {version['static_tokens']:,} of {version['mean_tokens']:,.0f} tokens are "
            f"the same in {share:.0%} of requests"
        )
        lines += [f"version {version['version']}: {note}" for note in version["notes"]]
        rows.append(
            (
                version["version"],
                f"{version['requests']:,}",
                version["model"] or "",
                f"{traffic['rate']:.3g}/s" if traffic["rate"] else "",
                f"{traffic['peak_factor']:.2f}" if traffic["peak_factor"] else "",
                f"{traffic['arrival_cv']:.2f}" if traffic["arrival_cv"] else "",
                f"{version['answers']:,}",
                str(Path(result["out"]) / version["folder"] / "unshot.toml"),
            )
        )
    names = ("version", "requests", "model", "rate", "peak factor", "arrival CV", "answers", "case file")
    lines.append(_table("", names, rows))
    for reason, count in result["unknown"].items():
        lines.append(f"warning: {count:,} rows not used: {reason}")
    if result["first_unknown"]:
        lines.append(f"the first: {result['first_unknown']}")
    return lines


def _why(result: CheckReport) -> str:
    if result.malformed:
        return "mend or remove the malformed rows"
    if result.length.too_long.total and result.minimum.enough:
        return "shorten the rows that are too long, or raise max_length under [tune]"
    return "too few rows" if not result.minimum.enough else "see the warnings"


def split_tables(result: dict[str, Any]) -> list[Any]:
    """Rows of each part, and the first rows moved."""
    shown: list[Any] = [
        _table(
            "",
            ("part", "rows", "before the move"),
            [(n, result["rows"][n], result["before"][n]) for n in result["rows"]],
        )
    ]
    _add(
        shown,
        "moved: near-duplicates across parts",
        ("line", "from", "to", "like line", "similarity", "by"),
        [
            (m["line"], m["source"], m["to"], m["like_line"], m["similarity"], m["by"])
            for m in result["contamination"]["moved"]
        ],
    )
    shown.append(f"{result['moved']} moved, {result['refilled']} replaced; written to {result['out']}")
    return shown


def _add(shown: list[Any], title: str, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    if rows:
        shown.append(_table(title, names, rows[:SHOWN]))
        if len(rows) > SHOWN:
            shown.append(f"... {len(rows) - SHOWN} more; all of them with --json or in --out")


def _table(title: str, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", show_header=any(names))
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row))
    return table


def review_tables(report: LabelReview, final: Path) -> list[Any]:
    """What people said of a teacher's labels."""
    from rich.table import Table

    lines: list[Any] = [
        f"the teacher's error rate: {report.error_rate} ({report.error_rate.n} random rows, "
        f"{report.reviewers} reviewers)"
    ]
    if report.by_class:
        table = Table(title="by class, random rows", title_justify="left")
        for name in ("class", "judged", "wrong", "error rate"):
            table.add_column(name, justify="left" if name == "class" else "right")
        for name, found in report.by_class.items():
            table.add_row(name, str(found.judged), str(found.wrong), str(found.rate))
        lines.append(table)
    for why, found in report.queue.items():
        lines.append(f"queue, {why}: {found.wrong} of {found.judged} labels wrong")
    return [
        *lines,
        f"{report.right} rows confirmed, {report.corrected} corrected, {report.dropped} dropped: {final}",
    ]
