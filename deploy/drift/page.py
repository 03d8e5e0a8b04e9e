"""The drift report for people: terminal tables and one HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploy.drift.looks import Look
from deploy.drift.run import DRIFT, EARLY, NONE, Report, SliceFacts
from unshot.report import charts, page

if TYPE_CHECKING:
    from rich.console import RenderableType

KINDS = {DRIFT: "bad", NONE: "good", EARLY: "warn"}
SHOWN = 8
SMALLEST = 1e-12
TITLES = {DRIFT: "Drift was found", NONE: "No drift", EARLY: "Too early to look for drift"}
FEATURES = ("length", "vocabulary", "embedding", "labels", "failures", "uncertainty")
HEADERS = ("feature", "reference -> live window", "p", "corrected for features", "drift")
SLICE_HEADERS = ("slice", "requests", "bad inside", "bad elsewhere", "corrected p", "worse")


def headline(report: Report) -> str:
    """The answer in one line."""
    if report["verdict"] == EARLY:
        return f"too early: {report['requests']} requests, the first look is due after {report['first_look']}"
    last = report["looks"][-1]
    if report["found"] is not None:
        found, since = report["found"], report["since"]
        text = f"drift in {', '.join(found['features'])}: found after request {found['requests']}, {found['time']}"
        if since is None:
            return f"{text}; gone since"
        earlier = since["requests"] < found["requests"]
        return f"{text}; lasts since request {since['requests']}" if earlier else text
    return f"no drift in {len(report['looks'])} looks up to request {last.end}"


def feature_rows(report: Report) -> list[list[str]]:
    """The features of the look that is shown."""
    look = shown_look(report)
    if look is None:
        return []
    return [
        [s["feature"], s["detail"], f"{s['p']:.2g}", f"{s['p_holm']:.2g}", "yes" if s["drift"] else ""]
        for s in look.shifts
    ]


def shown_look(report: Report) -> Look | None:
    """The look that the tables show: the last one, but where drift came and went the one that found it."""
    looks = report["looks"]
    if not looks:
        return None
    if report["found"] and not looks[-1].alarm:
        return next(x for x in looks if x.end == report["found"]["requests"])
    return looks[-1]


def look_title(report: Report) -> str:
    """Which look the tables show."""
    look = shown_look(report)
    return f"after request {look.end}, against {report['reference']}" if look else ""


def worse_line(row: SliceFacts, what: str) -> str:
    """One slice in which the model is worse."""
    return f"worse in {row['name']}: {row['share']:.0%} {what}, elsewhere {row['elsewhere']:.0%}"


def slice_rows(report: Report) -> list[list[str]]:
    """Slices, worst first."""
    return [
        [
            s["name"],
            str(s["rows"]),
            f"{s['share']:.1%}",
            f"{s['elsewhere']:.1%}",
            f"{s['q']:.2g}",
            "yes" if s["worse"] else "",
        ]
        for s in report["slices"][:SHOWN]
    ]


def tables(report: Report) -> list[RenderableType]:
    """What the terminal shows."""
    from rich.table import Table
    from rich.text import Text

    shown: list[RenderableType] = [headline(report)]
    shown += [worse_line(s, report["judged_by"]) for s in report["slices"] if s["worse"]]
    for title, headers, rows in (
        (look_title(report), HEADERS, feature_rows(report)),
        (
            f"slices, by what is {report['judged_by']} ({report['judged']} judged)",
            SLICE_HEADERS,
            slice_rows(report),
        ),
    ):
        if not rows:
            continue
        table = Table(title=title, title_justify="left")
        for number, name in enumerate(headers):
            table.add_column(name, justify="left" if number in (0, 1, len(headers) - 1) else "right")
        for row in rows:
            table.add_row(*map(Text, row))
        shown.append(table)
    return shown


def html(report: Report) -> str:
    """The whole report as one page."""
    s = report["schedule"]
    spent = s.spent
    look = shown_look(report)
    return page.page(
        TITLES[report["verdict"]],
        page.verdict(
            headline(report),
            [worse_line(x, report["judged_by"]) for x in report["slices"] if x["worse"]],
            kind=KINDS[report["verdict"]],
        ),
        page.cards(
            [
                ("requests", f"{report['requests']:,}", f"{report['arm']}, version {report['version']}"),
                ("looks", f"{len(report['looks'])}", f"every {s.every} requests, window {s.window}"),
                ("error rate", f"{s.alpha:g}", f"over {s.looks} looks together"),
                ("reference", f"{report['reference_rows']:,}", report["reference"]),
            ]
        ),
        page.section(
            "Features",
            page.table(
                HEADERS,
                feature_rows(report),
                caption=look_title(report),
                left=(0, 1, 4),
            )
            if look
            else page.text("No look was due yet."),
            page.text(
                f"Drift: a corrected p at or below {spent:.2g}, the error rate of one look.", small=True
            ),
        ),
        page.section("Over time", chart(report, spent)) if len(report["looks"]) > 1 else "",
        page.section(
            "Slices",
            page.table(SLICE_HEADERS, slice_rows(report), left=(0, 5))
            if report["slices"]
            else page.text("Too few requests in any slice."),
            page.text(
                f"By what is {report['judged_by']}, {report['judged']} requests judged. Named as worse with an "
                "expected share of false names of at most 5% (Fisher's exact tests, Benjamini-Hochberg).",
                small=True,
            ),
        ),
        subtitle=report["log"],
        footer="Kolmogorov-Smirnov, Mann-Whitney, chi-squared and Fisher tests by SciPy; classifier two-sample test "
        "(Lopez-Paz and Oquab 2017); Holm over features, Bonferroni over looks.",
    )


def chart(report: Report, spent: float) -> str:
    """Corrected p-values of every look, on a log scale, with the bound."""
    series = []
    for name in FEATURES:
        points = [
            (look.end, max(s["p_holm"], SMALLEST))
            for look in report["looks"]
            for s in look.shifts
            if s["feature"] == name
        ]
        if points:
            series.append(charts.Series(name, [p[0] for p in points], [p[1] for p in points]))
    if not series:
        return page.text("No look had enough requests for a test.")
    return charts.line(
        "corrected p by look",
        series,
        x_label="requests",
        y_label="p",
        log_y=True,
        y_marks=[charts.Mark(spent, "drift below")],
        note="Drawn down to 1e-12.",
    )
