"""The A/B report for people: terminal tables and one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from deploy.ab.run import (
    BETTER,
    NOT_WORSE,
    OPEN,
    WITHHELD,
    WORSE,
    Comparison,
    MetricFacts,
    Report,
    track,
)
from deploy.ab.sequential import BURN_IN
from unshot.contracts.request_log import Arm
from unshot.report import charts, page

if TYPE_CHECKING:
    from rich.console import RenderableType

KINDS = {BETTER: "good", NOT_WORSE: "good", WORSE: "bad", OPEN: "warn", WITHHELD: "warn"}


def tables(report: Report) -> list[RenderableType]:
    """Verdict, metrics and sample size for the terminal."""
    from rich.table import Table

    shown = Table(title=f"{report['log']}: {report['verdict']}", title_justify="left")
    for number, name in enumerate(HEADERS):
        shown.add_column(name, justify="left" if number in (0, len(HEADERS) - 1) else "right")
    for row in metric_rows(report):
        shown.add_row(*row)
    lines: list[RenderableType] = [shown, report["reason"], arms_line(report)]
    if report["stratified"]:
        lines.append(report["stratified"])
    lines.append(sample_line(report))
    return lines


HEADERS = (
    "metric",
    "baseline",
    "candidate",
    "candidate against baseline",
    "always-valid interval",
    "verdict",
)


def metric_rows(report: Report) -> list[list[str]]:
    """One row per metric, as texts."""
    rows = []
    for name, m in report["metrics"].items():
        ratio = m["compared_as"] == "ratio"

        def arm(side: Arm, m: MetricFacts = m, name: str = name) -> str:
            value = m[side]["mean"]
            if value is None:
                return "-"
            if name in ("quality", "failures"):
                return f"{value:.3f} (n {m[side]['n']})"
            if name == "cost":
                return f"{charts.dollars(value)} (n {m[side]['n']})"
            return f"{charts.milliseconds(1000 * m[side]['p50'])}, p95 {charts.milliseconds(1000 * m[side]['p95'])}"

        rows.append(
            [
                m["title"],
                arm("baseline"),
                arm("candidate"),
                "-"
                if m["estimate"] is None
                else f"{m['estimate']:.3f}x"
                if ratio
                else f"{m['estimate']:+.3f}",
                interval(m),
                m["verdict"],
            ]
        )
    return rows


def interval(m: MetricFacts) -> str:
    """`[low, high]`, open where there is no bound yet."""
    if m["low"] is None and m["high"] is None:
        return "none yet"
    form = "{:.3f}" if m["compared_as"] == "ratio" else "{:+.3f}"
    low, high = (form.format(v) if v is not None else "open" for v in (m["low"], m["high"]))
    return f"[{low}, {high}]"


def arms_line(report: Report) -> str:
    """Requests, units and what went wrong, of both arms."""
    parts = []
    for arm, a in report["arms"].items():
        counted = (
            (a["fallbacks"], "answered by the other arm"),
            (a["unanswered"], "unanswered"),
            (a["shadowed"], "shadowed"),
            (a["request_faults"], "failed for their own sake"),
        )
        more = [f"{number} {word}" for number, word in counted if number]
        parts.append(", ".join([f"{arm}: {a['requests']} requests of {a['units']} units", *more]))
    return "; ".join(parts)


def sample_line(report: Report) -> str:
    """What the plan needs, and what that takes for granted."""
    plan, sample = report["plan"], report["sample"]
    line = f"planned for an effect of {plan.effect:g} with power {plan.power:g}: "
    if sample is None:
        return f"{line}how many answers that takes is not known before both arms have some with feedback"
    if sample["needed"] is not None:
        line += f"{sample['needed']} {sample['unit']}, {sample['seen']} seen"
    else:
        line += (
            f"more answers of the same users hardly get there, since a few users have most of them: each arm needs "
            f"users who weigh as {sample['users_needed']} of equal size (at least {BURN_IN}), and those of the smaller "
            f"arm weigh as {sample['users']:.1f}"
        )
    alike = sample["design_effect"]
    return f"{line}; traffic is taken to go on as it has, and " + (
        "answers as independent, since no user has two yet"
        if alike is None
        else f"the answers of one user are alike: {alike:.2f} times the variance of independent ones so far"
    )


def html(report: Report, analysed: Mapping[str, Comparison]) -> str:
    """The whole report as one page."""
    plan = report["plan"]
    quality = report["metrics"].get("quality")
    cards = []
    if quality:
        for side in ("baseline", "candidate"):
            mean = quality[side]["mean"]
            cards.append(
                (
                    f"{side}, {quality['title']}",
                    "-" if mean is None else f"{mean:.3f}",
                    f"{quality[side]['n']} answers",
                )
            )
    if report["sample"]:
        s = report["sample"]
        if s["needed"] is not None:
            cards.append(("needed by plan", f"{s['needed']:,}", f"{s['unit']}; {s['seen']:,} seen"))
        else:
            cards.append(
                (
                    "needed by plan",
                    f"{s['users_needed']:,}",
                    f"users of equal size per arm; {s['users']:.1f} so far",
                )
            )
    if report["decided_at"]:
        cards.append(("decided after", f"{report['decided_at']:,}", "answers with feedback"))
    figures = [
        figure
        for name, title in (
            ("quality", f"{analysed['quality'].seen.metric.title}, candidate minus baseline"),
            ("failures", "share failed, candidate minus baseline"),
            ("ttft", "TTFT, candidate / baseline"),
            ("e2e", "end to end, candidate / baseline"),
            ("cost", "cost, candidate / baseline"),
        )
        if (figure := chart(name, title, analysed[name], plan.margin))
    ]
    return page.page(
        f"A/B: {report['verdict']}",
        page.verdict(report["verdict"], [report["reason"]], kind=KINDS[report["verdict"]]),
        page.cards(cards),
        page.section(
            "Both arms",
            page.table(HEADERS, metric_rows(report), left=(0, 5)),
            page.text(
                "Quality has the whole error rate; the other metrics share it once more. Times are medians and p95, "
                "their ratio and that of costs is one of geometric means.",
                small=True,
            ),
            page.text(arms_line(report), small=True),
        ),
        page.section("Confidence sequences", page.charts(*figures)) if figures else "",
        page.section("Warnings", page.bullets(report["warnings"])) if report["warnings"] else "",
        page.section(
            "Plan",
            page.facts(
                {
                    "comparison": "shadowed pairs" if plan.design == "pairs" else "units drawn into arms",
                    "stratified": report["stratified"] or "no: one share throughout",
                    "sample ratio, p": "not known"
                    if report["sample_ratio_p"] is None
                    else f"{report['sample_ratio_p']:.2g}",
                    "error rate over all looks": f"{plan.alpha:g}",
                    "margin": f"{plan.margin:g}",
                    "effect": f"{plan.effect:g} with power {plan.power:g}",
                    "sample": sample_line(report),
                    "feedback": ", ".join(f"{n} by {k}" for k, n in report["feedback"].items()) or "none",
                }
            ),
        ),
        subtitle=report["log"],
        footer="Normal-mixture confidence sequence (Robbins 1970, Johari et al. 2022, Howard et al. 2021), variance by "
        "unit. It may be looked at after every request.",
    )


def chart(name: str, title: str, c: Comparison, margin: float) -> str:
    """The confidence sequence over the observations; nothing before the burn-in is over."""
    import math

    points = track(c)
    if len(points["n"]) < 2:
        return ""
    ratio = c.seen.metric.kind == "log"
    change = math.exp if ratio else float
    marks = [charts.Mark(1.0, "equal") if ratio else charts.Mark(0.0, "")]
    if not ratio:
        bad = -margin if c.seen.metric.higher_is_better else margin
        marks.append(charts.Mark(bad, "margin"))
    return charts.line(
        title,
        [
            charts.Series(
                f"estimate and {1 - c.alpha:.4g} confidence sequence",
                points["n"],
                [change(v) for v in points["estimate"]],
                low=[change(v) for v in points["low"]],
                high=[change(v) for v in points["high"]],
            )
        ],
        x_label="answers with feedback" if name == "quality" else "requests",
        y_label="ratio" if ratio else "difference",
        y_marks=marks,
    )
