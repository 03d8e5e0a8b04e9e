"""Every figure of the worked example in docs/planner.md, computed by the planner and compared to the cent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace

from planner import oneoff
from planner.breakeven import exact_break_even, payback
from planner.latency.replica import Load, replica
from planner.options import SECONDS_PER_MONTH, Option, Shape
from planner.prices import ApiPrice, CacheRule, request_cost
from planner.serving import Serving
from planner.usage import Spread, Usage
from unshot.case import PlanSettings
from unshot.contracts.plan import MachinePrice

DOCS = Path(__file__).parent.parent / "docs" / "planner.md"
LOAD = Load(1.0, 140.0, 20.0)
RATE, PARAMS, L4_HOUR, L4_FLOPS = 2.0, 8.03e9, 0.80, 121e12


def rows() -> dict[str, str]:
    """The example's table: figure -> value as printed."""
    section = DOCS.read_text(encoding="utf-8").split("## A worked example")[1].split("\n## ")[0]
    cells = [
        [c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"
    ]
    return {name: value for name, _, value in cells[2:]}


def usage(prefix: int, varying: int, output: int) -> Usage:
    total = prefix + varying
    return Usage(
        counter="by hand",
        error=0.0,
        prefix=prefix,
        input=Spread.of([total]),
        output=Spread.of([output]),
        samples=((total, output),),
    )


def api(mode: str) -> Option:
    price = ApiPrice(
        model="gpt-4o",
        provider="openai",
        input=2.5,
        output=10.0,
        cached=1.25,
        write=None,
        write_long=None,
        batch_input=1.25,
        batch_cached=None,
        batch_output=5.0,
        rule=CacheRule(minimum=1024, step=128, ttl=300.0),
        latency=None,
        source="by hand",
        date="2026-11-24",
    )
    return Option(
        key=mode,
        name=mode,
        kind="api",
        model="gpt-4o",
        prompt="long",
        tuned=False,
        usage=usage(1500, 100, 20),
        costs=oneoff.Costs({}, {}, {}),
        shape=Shape.of(1.0),
        mode=cast(Any, mode),
        price=price,
    )


def tuned() -> Option:
    serving = Serving(
        fits=True,
        why="",
        capacity=10.0,
        gpus_per_replica=1,
        machine=MachinePrice("l4", "L4", "gpu", L4_HOUR, "by hand", ""),
        train_flops=L4_FLOPS,
        capacity_interval=(0.8, 1.2),
        price_interval=(0.6, 1.6),
        load=LOAD,
        one=replica("llama-3.1-8b", "l4", "fp16", LOAD),
    )
    costs = oneoff.self_hosted(
        PlanSettings(),
        examples_at_hand=0,
        tokens_per_example=160,
        epochs=5,
        method="lora",
        params=PARAMS,
        peak_flops=L4_FLOPS,
        gpu_hour=L4_HOUR,
    )
    return Option(
        key="tuned",
        name="tuned",
        kind="hosted",
        model="8b",
        prompt="short",
        tuned=True,
        usage=usage(40, 100, 20),
        costs=costs,
        shape=Shape.of(1.0),
        serving=serving,
        min_replicas=PlanSettings().min_replicas,
    )


def computed() -> dict[str, str]:
    plain, cached, batch, small = api("plain"), api("cached"), api("batch"), tuned()
    run = small.costs.training
    assert run is not None
    retraining = small.costs.monthly["retraining"]
    saving = float(cached.monthly(RATE) - small.monthly(RATE))
    slow = 0.01
    return {
        "requests per month": f"{RATE * SECONDS_PER_MONTH:,.0f}",
        "cached tokens": f"{cached.price.rule.cacheable(1500):,}",  # type: ignore[union-attr]
        "plain, per 1,000 requests": f"${plain.request_cost(RATE).total * 1000:,.2f}",
        "plain, per month": f"${plain.monthly(RATE):,.2f}",
        "cached, per 1,000 requests": f"${cached.request_cost(RATE).total * 1000:,.2f}",
        "cached, per month": f"${cached.monthly(RATE):,.2f}",
        "batch, per month": f"${batch.monthly(RATE):,.2f}",
        "hit rate at one request per 100 s": f"{float(cached.hit(slow)):.2%}",
        "cached, per 1,000 requests at that rate": f"${float(cached.request_cost(slow).total) * 1000:,.2f}",
        "GPUs, per month": f"${float(small.parts(RATE)['GPU hours']):,.2f}",
        "operations, per month": f"${small.costs.monthly['operations']:,.2f}",
        "training tokens": f"{run.tokens:,.0f}",
        "one training run": f"${small.costs.retraining['training']:,.2f}",
        "data, once": f"${small.costs.once['data']:,.2f}",
        "evaluation, once": f"${small.costs.once['evaluation']:,.2f}",
        "engineering, once": f"${small.costs.once['engineering']:,.2f}",
        "training, once": f"${small.costs.once['training']:,.2f}",
        "one-off": f"${float(small.once()):,.2f}",
        "retraining, per month": f"${retraining:,.2f}",
        "tuned, per month": f"${float(small.monthly(RATE)):,.2f}",
        "saving, per month": f"${saving:,.2f}",
        "payback": f"{payback(small, cached, RATE):.2f} months",
        "break-even": f"{exact_break_even(small, cached):.4f}/s",
    }


def test_every_figure_of_the_docs_is_the_planners() -> None:
    assert computed() == rows()


def test_the_example_has_the_steps_a_reader_needs() -> None:
    assert len(rows()) >= 20
    assert all(re.search(r"\d", value) for value in rows().values())


def test_misses_pay_the_input_price() -> None:
    price = api("cached").price
    assert price is not None
    none = request_cost(price, input_tokens=1600, output_tokens=20, prefix=1500, hit=0.0)
    assert none.total == pytest.approx(0.0042)
    below = request_cost(
        replace(price, rule=CacheRule(minimum=2048)),
        input_tokens=1600,
        output_tokens=20,
        prefix=1500,
        hit=1.0,
    )
    assert below.total == pytest.approx(0.0042)
