"""Run `unshot plan`: flags to a case, case to a plan, plan to terminal, JSON and files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.count import Counts
from planner.overrides import Overrides
from planner.prices import api_price, look_up_ahead
from planner.settings import Settings
from unshot import catalog
from unshot.case import Case
from unshot.console import Output, dumps
from unshot.contracts.manifest import Manifest, describe_file, staged
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
) -> None:
    """Plan one prompt, or each prompt of a folder, and write what was asked for."""
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
    # Tokens and the price are on their way while numpy and what needs it are loaded.
    counts = Counts(case, settings)
    counts.ahead()
    if case.baseline.api is not None:
        look_up_ahead(case.baseline.api)
    from planner.build import build
    from planner.payload import payload

    check_names(case, settings)
    manifest = Manifest("plan", config=case.plain(), seeds={"uncertainty": seed})
    with manifest.timed("plan"):
        found = build(case, settings, counts)
    data = payload(found)
    if final is not None:
        write_plan(found, data, final, manifest, overwrite=overwrite)
        data["out"] = str(final)
    if out.json_mode:
        out.result(data)
        return
    from planner.terminal import summary

    extra = [f"written to {final}"] if final else []
    out.result(data, *summary(found, data), *extra)


def check_names(case: Case, settings: Settings) -> None:
    """Refuse unknown models, GPUs and priced models, with the nearest names, before any token is counted."""
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
        found[catalog.gpu(name).name if name else ""] = price
    return found


def write_plan(
    found: Plan, data: dict[str, Any], final: Path, manifest: Manifest, *, overwrite: bool
) -> None:
    """Write plan.json, report.html and manifest.json as one directory."""
    from planner.report import report

    task = found.case.task
    with staged(final, overwrite=overwrite) as work:
        for path in (task.examples, task.inputs, task.data):
            if path is not None and path.is_file():
                manifest.inputs.append(describe_file(path))
        with manifest.timed("report"):
            write_text(work / "plan.json", dumps(data) + "\n")
            write_text(work / "report.html", report(found, data))
        manifest.result = {"verdict": data["verdict"]["answer"], **data["compared"]}
        manifest.finish(work)
