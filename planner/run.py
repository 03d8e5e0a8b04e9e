"""Run `unshot plan`: flags to a case, case to a plan, plan to terminal, JSON and files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from planner.overrides import Overrides
from planner.prices import api_price
from planner.settings import Settings
from unshot import catalog
from unshot.case import Case
from unshot.catalog.gpu import own_gpu
from unshot.console import Output
from unshot.contracts.manifest import Manifest, describe_there, staged
from unshot.contracts.plan import PlanFile
from unshot.data.files import write_text
from unshot.errors import InputError
from unshot.prices import Prices
from unshot.text.tokenizers import Paths

if TYPE_CHECKING:
    from planner.plan import Plan


def plan_run(
    out: Output,
    *,
    case: Case,
    final: Path | None,
    overwrite: bool,
    price_values: Sequence[Prices],
    gpu_price_values: Sequence[str],
    tokenizer: Sequence[str],
    approximate: bool,
    calibrate: Path | None,
    seed: int,
    everything: bool,
) -> None:
    """Plan one prompt, or each prompt of a folder, and write what was asked for."""
    catalog.use_own(
        {name: own_gpu(name, own) for name, own in case.gpu.items()},
        {name: catalog.read_architecture(own.config) for name, own in case.model.items()},
    )
    settings = Settings(
        paths=Paths.parse(tokenizer),
        approximate=approximate,
        prices=Overrides(price_values),
        gpu_prices=gpu_prices(gpu_price_values),
        calibration=calibrate,
        seed=seed,
    )
    if case.task.examples is not None and case.task.examples.is_dir():
        from planner.folder import plan_folder

        check_names(case, settings)
        plan_folder(case, settings, out, final, overwrite=overwrite)
        return
    from planner.judge import make_plan
    from planner.payload import payload

    check_names(case, settings)
    manifest = Manifest("plan", config=case.plain(), seeds={"uncertainty": seed})
    with manifest.timed("plan"):
        found = make_plan(case, settings)
        file = payload(found)
    if final is not None:
        write_plan(found, file, final, manifest, overwrite=overwrite)
    data = file.plain() | ({"out": str(final)} if final is not None else {})
    if out.json_mode:
        out.result(data)
        return
    from planner.terminal import summary

    extra = [f"written to {final}"] if final else []
    out.result(data, *summary(found, file, everything=everything), *extra)


# More requests per second than any one task of anybody gets.
BUSIEST = 1e5


def check_names(case: Case, settings: Settings) -> None:
    """Refuse unknown models, GPUs and priced models, with the nearest names, before any token is counted."""
    if case.traffic.rate > BUSIEST:
        raise InputError(
            f"rate {case.traffic.rate:g}: requests per second are needed, and nothing gets so many; if that is a "
            f"month's, did you mean {case.traffic.rate * 12 / (8760 * 3600):.3g}?"
        )
    if case.candidate.engine is not None:
        catalog.engine(case.candidate.engine)
    for device in map(catalog.gpu, case.candidate.gpu):
        if "" in settings.gpu_prices and device.name not in settings.gpu_prices:
            _check_hourly(f"{settings.gpu_prices['']:g}", settings.gpu_prices[""], device)
    for name, target in case.traffic.slo.plain().items():
        if name.endswith("_ms") and target is not None and target < 1:
            raise InputError(
                f"[traffic.slo] {name} is {target:g}: milliseconds are needed, and nothing answers that fast; did you "
                f"mean {target * 1e3:g}?"
            )
    names = [case.candidate.model, case.baseline.model]
    for name in filter(None, names):
        catalog.model(name)
    for name in filter(None, [*case.candidate.gpu, case.baseline.gpu]):
        catalog.gpu(name)
    api = case.baseline.api
    if api is not None:
        try:
            api_price(api, overrides=settings.prices)
        except InputError:
            try:
                catalog.model(api)  # an open model is welcome too
            except InputError:
                pass
            else:
                return
            raise


def gpu_prices(values: Sequence[str]) -> dict[str, float]:
    """`2.10` (any GPU, key "") and `GPU=2.10`. Raises `InputError`."""
    found = {}
    for value in values:
        name, _, number = value.rpartition("=")
        try:
            price = float(number)
        except ValueError:
            price = math.nan
        if not (math.isfinite(price) and price >= 0):
            raise InputError(f"--gpu-price {value}: give dollars per hour, as 2.10 or h100-sxm=2.10")
        device = catalog.gpu(name) if name else None
        if device is not None:
            price /= device.per_instance  # an instance's price is that of the whole
        _check_hourly(value, price, device)
        found[device.name if device else ""] = price
    return found


# Above this a device costs no hour anywhere: eight B300s stay below it.
DEAREST_HOUR = 150.0


def _check_hourly(value: str, price: float, device: catalog.Gpu | None) -> None:
    """Refuse a month's or a second's price, with what was probably meant."""
    listed = device.price if device is not None and device.price else None
    low, high = (listed / 25, 25 * listed) if listed else (0.003, DEAREST_HOUR)
    if price == 0 or low <= price <= high:
        return
    units = (
        (("month", 12 / 8760), ("day", 1 / 24)) if price > high else (("second", 3600.0), ("minute", 60.0))
    )
    aim = listed or math.sqrt(low * high)
    period, factor = min(units, key=lambda unit: abs(math.log(price * unit[1] / aim)))
    per = (
        f"{device.name} costs about ${listed:g} per hour"
        if device and listed
        else f"no device costs {'that' if price > high else 'so little'} per hour"
    )
    guess = f"{price * factor:.2f}"
    raise InputError(
        f"--gpu-price {value}: dollars per hour are needed, and {per}; if that is a {period}'s price, did you mean "
        f"{guess}?"
    )


def write_plan(found: Plan, file: PlanFile, final: Path, manifest: Manifest, *, overwrite: bool) -> None:
    """Write plan.json, plan.csv, plan.xlsx, report.html and manifest.json as one directory."""
    from planner.report import report
    from planner.workbook import csv_text, write_workbook

    task = found.case.task
    with staged(final, overwrite=overwrite) as work:
        manifest.inputs += describe_there((task.examples, task.inputs, task.data))
        with manifest.timed("report"):
            file.write(work)
            write_text(work / "report.html", report(found, file))
            write_text(work / "plan.csv", csv_text(file))
            write_workbook(found, work / "plan.xlsx")
        manifest.result = {"verdict": file.verdict.answer, **file.compared.plain()}
        manifest.finish(work)
