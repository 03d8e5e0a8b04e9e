"""A folder of prompts planned in one go: a table with one row per prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from planner.judge import make_plan
from planner.options import SECONDS_PER_MONTH, Option
from planner.payload import payload
from planner.plan import Comparison, Plan
from planner.settings import Settings
from planner.terminal import table_of
from unshot import __version__
from unshot.case import Case
from unshot.console import Output
from unshot.contracts.manifest import Manifest, describe_file, staged
from unshot.contracts.plan import FolderPlanFile
from unshot.data.files import write_text
from unshot.errors import InputError
from unshot.report import page
from unshot.report.charts import Bar, bars, dollars
from unshot.report.formats import months, per_second

if TYPE_CHECKING:
    from rich.console import RenderableType

PROMPT_NAMES = ("base_prompt", "prompt", "few_shot")
INPUT_NAMES = ("inputs", "test", "train", "data")
PROMPT_SUFFIXES = (".txt", ".md", ".jsonl", ".json")
INPUT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
HEADERS = (
    "prompt", "tokens in", "prefix", "out", "short in", "plain", "cached", "tuned", "break-even", "payback", "verdict",
)  # fmt: skip


class Found(Struct, frozen=True):
    """One prompt of a folder with its sample of inputs (None: the case's own)."""

    name: str
    prompt: Path
    inputs: Path | None


def find_prompts(folder: Path) -> list[Found]:
    """The prompts of a folder: one per subfolder that holds one, else one per prompt file.

    A subfolder holds `base_prompt`, `prompt` or `few_shot` (.txt, .md, .jsonl, .json) and `inputs`, `test`, `train` or
    `data` (.jsonl, .json, .csv, .tsv). Raises `InputError` where there is none.
    """
    found = []
    for sub in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        prompt = _first(sub, PROMPT_NAMES, PROMPT_SUFFIXES)
        if prompt is not None:
            found.append(Found(sub.name, prompt, _first(sub, INPUT_NAMES, INPUT_SUFFIXES)))
    if not found:
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in PROMPT_SUFFIXES and p.is_file())
        found = [Found(p.stem, p, None) for p in files if p.stem not in INPUT_NAMES]
    if not found:
        raise InputError(
            f"{folder}: no prompts there; it needs subfolders with {', '.join(PROMPT_NAMES)} "
            f"({', '.join(PROMPT_SUFFIXES)}), or prompt files"
        )
    return found


def _first(folder: Path, names: tuple[str, ...], suffixes: tuple[str, ...]) -> Path | None:
    candidates = (folder / f"{name}{suffix}" for name in names for suffix in suffixes)
    return next((p for p in candidates if p.is_file()), None)


def plan_folder(case: Case, settings: Settings, out: Output, final: Path | None, *, overwrite: bool) -> None:
    """Plan every prompt of the folder `case.task.examples` and print or write the table."""
    folder = case.task.examples
    assert folder is not None
    found = find_prompts(folder)
    manifest = Manifest("plan", config=case.plain(), seeds={"uncertainty": settings.seed})
    plans: list[tuple[str, Plan]] = []
    with manifest.timed("plan"):
        for one in found:
            task = case.task.changed(
                examples=one.prompt, inputs=one.inputs or case.task.inputs, name=one.name
            )
            try:
                plans.append((one.name, make_plan(case.changed(task=task), settings)))
            except InputError as error:
                raise InputError(f"{one.name}: {error}") from None
            out.detail(f"{one.name}: planned")
    file = FolderPlanFile(folder=str(folder), prompts={name: payload(plan) for name, plan in plans})
    even = [c.break_even for _, plan in plans if (c := _compared(plan)) is not None and c.break_even]
    rows = [row(name, plan, min(even, default=None)) for name, plan in plans]
    if final is not None:
        with staged(final, overwrite=overwrite) as work:
            manifest.inputs = [describe_file(p) for one in found for p in (one.prompt, one.inputs) if p]
            file.write(work)
            write_text(work / "report.html", report(case, plans, rows))
            manifest.finish(work)
    data = file.plain() | ({"out": str(final)} if final is not None else {})
    out.result(data, *([] if out.json_mode else _terminal(case, plans, rows)))


def _compared(plan: Plan) -> Comparison | None:
    return plan.comparisons.get(plan.tuned.key) if plan.tuned else None


def row(name: str, plan: Plan, smallest: float | None) -> list[str]:
    """One prompt's line: tokens, dollars per 1,000 requests, break-even, payback, verdict.

    `smallest` is the lowest break-even of the table, requests/s: it decides the unit of all.
    """
    long = next(o for o in plan.options if o.prompt == "long")
    thousand = plan.rate * SECONDS_PER_MONTH / 1000

    def cost(wanted: Callable[[Option], bool]) -> str:
        option = next((o for o in plan.options if wanted(o)), None)
        return dollars(float(option.monthly(plan.rate)) / thousand) if option is not None else "–"

    def uncached(option: Option) -> bool:
        return bool(option.baseline and option.mode == "plain" and not option.prefix_cache)

    def cached(option: Option) -> bool:
        return bool(option.baseline and (option.mode == "cached" or option.prefix_cache))

    compared = _compared(plan)
    return [
        name,
        f"{long.usage.input.mean:,.0f}",
        f"{long.usage.prefix:,}",
        f"{long.usage.output.mean:,.1f}",
        f"{plan.tuned.usage.input.mean:,.0f}" if plan.tuned else "–",
        cost(uncached),
        cost(cached),
        cost(lambda o: plan.tuned is not None and o.key == plan.tuned.key),
        per_second(compared.break_even, smallest) if compared else "–",
        months(compared.payback_months) if compared else "–",
        plan.verdict.answer,
    ]


def _caption(case: Case) -> str:
    today = case.baseline.api or case.baseline.model
    return (
        f"{today} with the long prompt against tuned {case.candidate.model} on {', '.join(case.candidate.gpu)}, "
        f"{case.traffic.rate:g} requests/s each; $ per 1,000 requests"
    )


def _notes(plans: list[tuple[str, Plan]]) -> tuple[list[str], list[str]]:
    """Assumptions and warnings, each once, those about a single prompt's inputs left to its own plan."""
    assumptions = dict.fromkeys(a for _, p in plans for a in p.assumptions if not a.startswith("inputs:"))
    warnings = dict.fromkeys(w for _, p in plans for w in p.warnings)
    return list(assumptions), list(warnings)


def _terminal(case: Case, plans: list[tuple[str, Plan]], rows: list[list[str]]) -> list[RenderableType]:
    from rich.text import Text

    table = table_of(_caption(case), *HEADERS)
    for cells in rows:
        table.add_row(*cells)
    assumptions, warnings = _notes(plans)
    lines: list[RenderableType] = [Text(f"  warning: {w}", style="yellow") for w in warnings]
    lines.append(Text("Assumptions", style="bold"))
    return [table, *lines, *(Text(f"  - {a}", style="dim") for a in assumptions)]


def report(case: Case, plans: list[tuple[str, Plan]], rows: list[list[str]]) -> str:
    """The folder's page: the table, tokens per prompt, and what it rests on."""
    assumptions, warnings = _notes(plans)
    tokens = []
    for name, plan in plans:
        long = next(o for o in plan.options if o.prompt == "long").usage
        parts = {
            "static prefix": float(long.prefix),
            "varying input": long.varying,
            "output": long.output.mean,
        }
        tokens.append(Bar(name, parts))
    yes = sum(plan.verdict.answer == "tune" for _, plan in plans)
    less = sum(bool(plan.economics and plan.economics.untuned) for _, plan in plans)
    first = [
        f"for {less} of them a cheaper model with the same prompt would cost less still, if it answers as well"
    ] * bool(less)
    return page.page(
        "Which of these prompts should move into a tuned model?",
        page.verdict(
            f"Tuning is the answer for {yes} of {len(plans)} prompts at {case.traffic.rate:g} requests/s each",
            [*first, *warnings],
        ),
        page.table(HEADERS, rows, left=(0, 10), caption=_caption(case)),
        page.charts(bars("Tokens per request with the long prompt", tokens, x_label="tokens")),
        page.section("Why", page.bullets([f"{name}: {plan.verdict.headline}" for name, plan in plans])),
        page.section("What it rests on", page.bullets(assumptions, linked=True)),
        subtitle=str(case.task.examples),
        footer=f"unshot {__version__}. Forecast, not a measurement.",
    )
