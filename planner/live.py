"""The report's live controls: a form, a table and a curve that the page's script recomputes from the plan's terms."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from msgspec import to_builtins

from planner.options import Option
from planner.plan import Plan
from planner.terms import terms
from unshot.report.formats import dollars

SCRIPT = Path(__file__).parent / "live.js"


def script(plan: Plan, shown: list[Option]) -> str:
    """The page's JavaScript with the plan's figures in it."""
    apis, hosted = terms(plan)
    long = next((u for name, u in plan.usages.items() if name.endswith("long prompt")), None)
    data = {
        "options": [to_builtins(one) for one in (*apis, *hosted)],
        "keep": plan.keep.key if plan.keep else None,
        "tuned": plan.tuned.key if plan.tuned else None,
        "shown": [o.key for o in shown],
        "varying": max(long.varying, 1.0) if long else 1.0,
        "answer": long.output.mean if long else 1.0,
    }
    # "</" would end the script's element.
    text = json.dumps(data, ensure_ascii=True).replace("</", "<\\/")
    return f"const DATA = {text};\n{SCRIPT.read_text(encoding='utf-8')}"


def controls(plan: Plan) -> str:
    """The form and the table, hidden until the script shows them: without it the page reads as it is."""
    apis, hosted = terms(plan)
    long = next((u for name, u in plan.usages.items() if name.endswith("long prompt")), None)
    least = max((o.min_replicas for o in plan.options if o.serving), default=1)
    fields = (
        ("rate", "requests per second, mean", plan.rate, "any"),
        ("peak", "busiest hour over the mean", plan.case.traffic.peak_factor, "any"),
        ("varying", "varying input, tokens", max(long.varying, 1.0) if long else 1.0, "any"),
        ("answer", "answer, tokens", long.output.mean if long else 1.0, "any"),
        ("api", "API prices, factor", 1.0, "any"),
        ("gpu", "GPU prices, factor", 1.0, "any"),
        ("least", "replicas kept at least", float(least), "1"),
        ("horizon", "horizon, months", plan.case.plan.horizon_months, "any"),
    )
    inputs = "".join(
        f'<label>{escape(title)}<input id="live-{name}" type="number" min="0" step="{step}" value="{value:.4g}" '
        f'data-exact="{value!r}"></label>'
        for name, title, value, step in fields
    )
    rows = "".join(
        f'<tr data-key="{escape(key)}"><td>{escape(name)}</td><td class="r"></td><td class="r"></td></tr>'
        for key, name in [*((one.key, one.name) for one in apis), *((one.key, one.name) for one in hosted)]
    )
    once = dollars(plan.tuned.costs.total_once) if plan.tuned else "–"
    return (
        '<section id="live" hidden><h2>Change an assumption</h2>'
        f'<div class="form">{inputs}<button id="live-reset" type="button">as planned</button></div>'
        '<p id="live-verdict"></p><figure id="live-curve"></figure>'
        '<div class="scroll"><table><thead><tr><th>option</th><th class="r">$ / month</th>'
        f'<th class="r" id="live-months"></th></tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="small">Running costs; the totals hold one-off costs ({escape(once)} for the tuned model). Latency '
        "and the rate a replica holds within the SLO are the plan's; with other lengths it scales with the capacity."
        "</p></section>"
    )
