"""The workbook's formulas give the plan's figures to the cent, in LibreOffice and at other inputs too."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace
from openpyxl import Workbook, load_workbook

from planner.judge import make_plan
from planner.options import World
from planner.overrides import Overrides
from planner.payload import payload
from planner.plan import Plan
from planner.settings import Settings
from planner.workbook import csv_text, write_workbook
from tests.planner_files import few_shot, inputs, model_folder
from unshot.case_file import load_case
from unshot.text.tokenizers import Paths

OFFICE = shutil.which("soffice") or shutil.which("libreoffice")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return made(tmp_path_factory.mktemp("workbook"))


def made(folder: Path, **more: object) -> Plan:
    """A plan with an API baseline and a sibling; `more` are further keys of the case, `section__key`."""
    case = load_case(
        None,
        {
            "task.examples": few_shot(folder / "shots.jsonl", 40), "task.inputs": inputs(folder / "inputs.jsonl"),
            "traffic.rate": 3.0, "traffic.peak_factor": 2.5, "baseline.api": "claude-sonnet-4-5",
            "candidate.model": "llama-3.1-8b", "candidate.gpu": ["l4", "h100-sxm"],
            "plan.cheaper_api": "claude-haiku-5-5", **{k.replace("__", "."): v for k, v in more.items()},
        },
    )  # fmt: skip
    settings = Settings(
        paths=Paths.parse([f"llama-3.1-8b={model_folder(folder / 'model')}"]), approximate=True,
        prices=Overrides(["claude-sonnet-4-5:cache_min=512"]), draws=50,
    )  # fmt: skip
    return make_plan(case, settings)


def recalculated(book: Path) -> Workbook:
    """The workbook with the values that LibreOffice computes."""
    assert OFFICE is not None
    out = book.parent / "calculated"
    profile = f"-env:UserInstallation=file://{book.parent}/profile"
    command = [OFFICE, profile, "--headless", "--convert-to", "xlsx", "--outdir", str(out), str(book)]
    subprocess.run(command, check=True, capture_output=True, timeout=180)
    return load_workbook(out / book.name, data_only=True)


def test_the_workbook_reads_as_one_for_finance(plan: Plan, tmp_path: Path) -> None:
    """Every usable option on the first sheet, dollars as dollars, what may be changed set off, warnings not lost."""
    path = tmp_path / "plan.xlsx"
    write_workbook(plan, path)
    book = load_workbook(path)
    listed = {str(row[0].value): row for row in book["summary"].iter_rows()}
    for option in (o for o in plan.options if o.usable):
        assert (
            str(listed[option.name][1].value).startswith("=") and "$" in listed[option.name][1].number_format
        )
    rate = book["inputs"]["B2"]
    assert rate.font.color.rgb == "000000FF" and book["inputs"]["B8"].font.color.rgb != "000000FF"
    assert book["api"]["E2"].number_format.startswith("$") and book["hosted"]["P2"].number_format == "0.0%"
    assert book["api"]["A1"].font.b and book["api"].page_setup.orientation == "landscape"
    said = [str(row[0]) for row in book["assumptions"].iter_rows(values_only=True)]
    assert set(plan.warnings) <= set(said)


def column(book: Workbook, sheet: str, heading: str) -> dict[str, float]:
    """`{option name: value}` of one column."""
    rows = list(book[sheet].iter_rows(values_only=True))
    at = rows[0].index(heading)
    return {str(row[0]): float(str(row[at])) for row in rows[1:]}


@pytest.mark.slow
@pytest.mark.skipif(
    OFFICE is None, reason="LibreOffice is not installed (apt-get install libreoffice-calc-nogui)"
)
def test_libreoffice_computes_the_plans_figures(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.xlsx"
    write_workbook(plan, path)
    book, file = recalculated(path), payload(plan)
    for option in (o for o in file.options if o.usable):
        sheet = "api" if option.kind == "api" else "hosted"
        assert column(book, sheet, "$/month")[option.name] == pytest.approx(option.per_month, abs=0.005)
        total = column(book, sheet, "$ over the horizon")[option.name]
        assert total == pytest.approx(option.total_over_horizon, abs=0.005)
    summary = {str(row[0]): row[1] for row in book["summary"].iter_rows(values_only=True)}
    assert plan.economics is not None
    assert float(str(summary["saved over the horizon"])) == pytest.approx(plan.economics.net, abs=0.01)
    # Finance changes an input: the planner says the same.
    changed = load_workbook(path)
    changed["inputs"]["B2"], changed["inputs"]["B6"] = 11.0, 0.7
    changed.save(tmp_path / "changed.xlsx")
    book = recalculated(tmp_path / "changed.xlsx")
    for one in (o for o in plan.options if o.usable):
        at = replace(one.costs, monthly=one.costs.monthly)
        monthly = float(replace(one, costs=at).monthly(11.0, World(gpu_price=0.7)))
        sheet = "api" if one.kind == "api" else "hosted"
        assert column(book, sheet, "$/month")[one.name] == pytest.approx(monthly, abs=0.005)


def test_the_csv_holds_the_plans_figures(plan: Plan) -> None:
    file = payload(plan)
    rows = list(csv.DictReader(io.StringIO(csv_text(file))))
    assert len(rows) == len(file.options)
    for row, option in zip(rows, file.options, strict=True):
        if option.per_month is not None:
            assert float(row["per_month"]) == option.per_month
