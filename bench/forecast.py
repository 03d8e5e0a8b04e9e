"""Back to the planner: the measured times it can be calibrated with, and its forecast beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from bench.records import SIDES, RequestRecord
from bench.sides import CACHE_OFF, CACHE_ON
from unshot.contracts.plan import PlanFile, PlannedOption
from unshot.contracts.report import BenchReport, CalibrationSide, ForecastRow, SideName, SystemFacts

OF_THE_SERVER = "of the server"
PLAN_MODE = {CACHE_ON: "prefix cache", CACHE_OFF: "plain"}


def calibration_sides(
    records: Sequence[RequestRecord], systems: dict[SideName, SystemFacts]
) -> list[CalibrationSide]:
    """One entry a side and mode, as `unshot plan --calibrate` reads them; times in seconds, one stream.

    Only llama.cpp on this machine, whose model file says what it is. Sides run at more than one request at a time are
    left out, since their times hold waiting.
    """
    result = []
    for side in SIDES:
        facts = systems[side]
        here = facts.engine == "llama.cpp" and facts.device != OF_THE_SERVER
        if not facts.config or not facts.precision or not here or facts.concurrency > 1:
            continue
        for mode in PLAN_MODE:
            good = [r for r in records if r.side == side and r.mode == mode and r.ok]
            prompt, cached, output = (
                [c for r in good if (c := getattr(r, name)) is not None]
                for name in ("prompt_tokens", "cached_tokens", "output_tokens")
            )
            if not good or min(len(prompt), len(cached), len(output)) < len(good):
                continue
            result.append(
                CalibrationSide(
                    side=side,
                    mode=mode,
                    model=facts.config,
                    precision=facts.precision,
                    prompt_tokens=prompt,
                    cached_tokens=cached,
                    output_tokens=output,
                    ttft_s=[r.ttft for r in good],
                    tpot_s=[r.tpot for r in good if math.isfinite(r.tpot)],
                )
            )
    return result


def forecast(plan: Path | None, report: BenchReport) -> list[ForecastRow]:
    """The plan's forecast for the options that were measured, beside the measurement.

    `utilisation` is how busy the plan's traffic keeps the machine: its forecast holds the waiting that this brings.

    Empty without a plan, or if the plan is for another kind of machine than the one measured: a forecast for an
    H100 says nothing about a CPU.
    """
    if plan is None:
        return []
    loaded = PlanFile.read(plan)
    machine = loaded.prices.machine
    devices = {facts.device for facts in report.systems.values()}
    if machine is None or machine.kind != "cpu" or devices != {"cpu"}:
        return []
    rows: list[ForecastRow] = []
    for mode, facts in report.modes.items():
        for side in SIDES:
            option = _option(loaded.options, side, mode, report.systems[side].precision)
            figures = facts.side(side)
            for figure, measured in (("ttft", figures.ttft_ms), ("e2e", figures.e2e_ms)):
                planned = getattr(option.latency_ms, figure) if option and option.latency_ms else None
                if option and planned and measured.p50:
                    rows.append(
                        ForecastRow(
                            mode=mode,
                            side=side,
                            figure=figure,  # type: ignore[arg-type]
                            option=option.key,
                            utilisation=option.utilisation,
                            forecast_ms=planned.p50,
                            measured_ms=measured.p50.value,
                        )
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
