"""The page's live controls compute what the planner computes, at random settings, in headless Chromium."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from msgspec.structs import replace

from planner import live
from planner.breakeven import exact_break_even
from planner.options import Option, Shape, World
from planner.payload import payload
from planner.plan import Plan
from planner.report import report, shown
from tests.test_workbook import made
from tests.test_workbook import plan as planned

plan = planned  # the workbook's plan, as a fixture here
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SETTINGS = 50


def in_chromium(folder: Path, script: str, expression: str) -> object:
    """The JSON value of a JavaScript expression, evaluated after `script` on an empty page."""
    assert CHROMIUM is not None
    # The page's own wiring is left out: only its functions are wanted here.
    functions = script.split('if (typeof document !== "undefined")')[0]
    page = folder / "probe.html"
    page.write_text(
        f"<body><pre id=out></pre><script>{functions}\n"
        f"document.getElementById('out').textContent = JSON.stringify({expression});</script>",
        encoding="utf-8",
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{page}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = re.search(r"<pre id=\"out\">(.*?)</pre>", done.stdout, re.DOTALL)
    assert found, done.stderr[-400:]
    loaded: object = json.loads(unescape(found[1]))
    return loaded


def moved(option: Option, w: dict[str, float]) -> Option:
    """The option under other settings of the form."""
    return replace(option, shape=Shape.of(w["peak"]), min_replicas=int(w["least"]))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")
def test_the_controls_agree_with_the_planner_at_random_settings(plan: Plan, tmp_path: Path) -> None:
    draw = random.Random(7)
    settings = [
        {
            "rate": 10 ** draw.uniform(-2, 2.5), "peak": draw.uniform(1, 8), "varying": draw.uniform(0.3, 4),
            "answer": draw.uniform(0.5, 6), "api": draw.uniform(0.3, 2), "gpu": draw.uniform(0.3, 2),
            "least": draw.randint(1, 5), "horizon": draw.uniform(1, 36),
        }
        for _ in range(SETTINGS)
    ]  # fmt: skip
    script = live.script(plan, shown(plan))
    found = in_chromium(tmp_path, script, f"{json.dumps(settings)}.map((w) => figures(w))")
    assert isinstance(found, list) and plan.keep is not None and plan.tuned is not None
    for w, there in zip(settings, found, strict=True):
        world = World(varying=w["varying"], answer=w["answer"], api_price=w["api"], gpu_price=w["gpu"])
        for option in (o for o in plan.options if o.usable):
            monthly = float(moved(option, w).monthly(w["rate"], world))
            total = monthly * w["horizon"] + float(option.once(world))
            seen = there["options"][option.key]
            assert seen["monthly"] == pytest.approx(monthly, rel=1e-7, abs=0.005), (option.key, w)
            assert seen["total"] == pytest.approx(total, rel=1e-7, abs=0.005), (option.key, w)
        if w["varying"] == w["answer"] == w["api"] == w["gpu"] == 1:
            even = exact_break_even(moved(plan.tuned, w), moved(plan.keep, w))
            assert there["even"] == pytest.approx(even, rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")
def test_other_lengths_at_an_engine_that_pays_for_each_chunk(tmp_path: Path) -> None:
    """llama.cpp's launches and unpacking come with every chunk, and decoding takes its share of one."""
    plan = made(
        tmp_path, candidate__engine="llamacpp", candidate__precision="q4_k_m", candidate__gpu=["rtx-4090"]
    )
    w = {
        "rate": 30.0,
        "peak": 2.0,
        "varying": 3.0,
        "answer": 2.0,
        "api": 1.0,
        "gpu": 1.0,
        "least": 1,
        "horizon": 12,
    }
    found = in_chromium(tmp_path, live.script(plan, shown(plan)), f"figures({json.dumps(w)})")
    hosted = [o for o in plan.options if o.usable and o.serving is not None]
    assert isinstance(found, dict) and hosted
    for option in hosted:
        monthly = float(moved(option, w).monthly(w["rate"], World(varying=3.0, answer=2.0)))
        assert found["options"][option.key]["monthly"] == pytest.approx(monthly, rel=1e-7)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")
def test_the_page_starts_at_the_plans_figures(plan: Plan, tmp_path: Path) -> None:
    file, page = payload(plan), tmp_path / "report.html"
    page.write_text(report(plan, file), encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{page}"]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert '<section id="live">' in dom  # shown, since the script ran
    assert re.search(r'<p id="live-verdict">Tuning (saves|costs) \$', dom)
    assert len(re.findall(r' id="(live-\w+)"', dom)) == len(set(re.findall(r' id="(live-\w+)"', dom)))
    for option in (o for o in file.options if o.usable):
        row = re.search(rf'<tr data-key="{re.escape(option.key)}">(.*?)</tr>', dom, re.DOTALL)
        assert row and option.per_month is not None
        cells = re.findall(r"<td[^>]*>(.*?)</td>", row[1])
        shown_value = float(cells[1].replace("$", "").replace(",", ""))
        assert shown_value == pytest.approx(option.per_month, abs=0.51 if option.per_month >= 1000 else 0.006)
    # To the cent, in the figures the page computes with.
    at = {"rate": plan.rate, "peak": plan.case.traffic.peak_factor, "least": 2, "horizon": 12}
    at |= dict.fromkeys(("varying", "answer", "api", "gpu"), 1.0)
    start = f"figures({json.dumps(at)})"
    found = in_chromium(tmp_path, live.script(plan, shown(plan)), start)
    assert isinstance(found, dict)
    for option in (o for o in file.options if o.usable):
        assert found["options"][option.key]["monthly"] == pytest.approx(option.per_month, abs=0.005)
        assert found["options"][option.key]["total"] == pytest.approx(option.total_over_horizon, abs=0.005)
    assert plan.economics is not None
    assert found["even"] == pytest.approx(plan.economics.break_even, rel=1e-4)
