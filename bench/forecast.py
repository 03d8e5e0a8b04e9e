"""Back to the planner: the measured times it can be calibrated with, and its forecast beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.measure import CACHE_OFF, CACHE_ON
from bench.records import SIDES, Record
from unshot.contracts.plan import PlanFile, PlannedOption

PLAN_MODE = {CACHE_ON: "prefix cache", CACHE_OFF: "plain"}


def sides(records: Sequence[Record], systems: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a side and mode, as `unshot plan --calibrate` reads them; times in seconds, one stream.

    Only llama.cpp on a CPU: that is the device and engine the calibration fits. Sides run at more than one request
    at a time are left out, since their times hold waiting.
    """
    result = []
    for side in SIDES:
        facts = systems[side]
        config, precision = facts.get("config"), facts.get("precision")
        if not config or not precision or facts.get("device") != "cpu" or facts.get("concurrency", 1) > 1:
            continue
        for mode in PLAN_MODE:
            good = [r for r in records if r.side == side and r.mode == mode and r.ok]
            if not good or any(r.cached_tokens is None for r in good):
                continue
            result.append(
                {
                    "side": side,
                    "mode": mode,
                    "model": config,
                    "precision": precision,
                    "prompt_tokens": [r.prompt_tokens for r in good],
                    "cached_tokens": [r.cached_tokens for r in good],
                    "output_tokens": [r.output_tokens for r in good],
                    "ttft_s": [r.ttft for r in good],
                    "tpot_s": [r.tpot for r in good if math.isfinite(r.tpot)],
                }
            )
    return result


def forecast(plan: Path | None, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The plan's forecast for the options that were measured: `[{mode, side, figure, forecast_ms, measured_ms}]`.

    `utilisation` is how busy the plan's traffic keeps the machine: its forecast holds the waiting that this brings.

    Empty without a plan, or where the plan is for another kind of machine than the one measured: a forecast for an
    H100 says nothing about a CPU.
    """
    if plan is None:
        return []
    loaded = PlanFile.read(plan)
    machine = loaded.prices.machine
    devices = {facts.get("device") for facts in report["systems"].values()}
    if machine is None or machine.kind != "cpu" or devices != {"cpu"}:
        return []
    rows = []
    for mode, facts in report["modes"].items():
        for side in SIDES:
            option = _option(loaded.options, side, mode, report["systems"][side].get("precision"))
            for figure in ("ttft", "e2e"):
                measured = facts[side][f"{figure}_ms"]
                planned = getattr(option.latency_ms, figure) if option and option.latency_ms else None
                if planned and measured["count"]:
                    rows.append(
                        {
                            "mode": mode,
                            "side": side,
                            "figure": figure,
                            "option": option.key if option else None,
                            "utilisation": option.utilisation if option else None,
                            "forecast_ms": planned.p50,
                            "measured_ms": measured["p50"]["value"],
                        }
                    )
    return rows


def _option(
    options: list[PlannedOption], side: str, mode: str, precision: str | None
) -> PlannedOption | None:
    """The hosted option of that side and cache mode, of the same precision if there is one."""
    fitting = [
        o
        for o in options
        if o.kind == "hosted" and o.tuned == (side == "candidate") and o.mode == PLAN_MODE[mode] and o.usable
    ]
    same = [o for o in fitting if o.precision == precision]
    return next(iter(same or fitting), None)
