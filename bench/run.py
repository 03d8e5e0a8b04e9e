"""`unshot bench` from two specs to a report directory."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import claim as claims
from bench.cost import Price, costs, machine_price
from bench.measure import CACHE_OFF, CACHE_ON, MODES, pairs, run_mode
from bench.quality import judge
from bench.records import Record, summarise
from bench.systems import System
from unshot.case import Case
from unshot.console import Output, dumps, jsonable
from unshot.data import Example, read_examples, write_jsonl
from unshot.engines import open_engine
from unshot.errors import InputError
from unshot.manifest import Manifest, describe_file, hardware, staged, write_text
from unshot.prompts import Prompt
from unshot.task import Task, derive_task, read_task

DEFAULT_MAX_TOKENS = 64
SCHEMA = 1


@dataclass
class Job:
    """What to measure: specs, prompts, rows, and how long."""

    baseline: str
    candidate: str
    data: Path
    final: Path
    baseline_prompt: Prompt
    candidate_prompt: Prompt
    task_path: Path | None = None
    plan: Path | None = None
    price_per_hour: float | None = None
    cold_requests: int = 8
    block: int = 4
    warm_up: int = 2
    rows: int | None = None
    max_tokens: int | None = None
    threads: int | None = None
    modes: tuple[str, ...] = MODES
    inputs: list[Path] = field(default_factory=list)


def bench_run(job: Job, case: Case, out: Output, *, overwrite: bool = False) -> dict[str, Any]:
    """Measure, judge and write the report directory `job.final`; return the report.

    Raises `InputError` for bad input. The caller turns the verdict into an exit code.
    """
    rows = _rows(job, case)
    task = read_task(job.task_path) if job.task_path else derive_task(case.task, rows)
    for row in rows:
        if task.label(row.answer or "") == "(invalid)":
            raise InputError(
                f"{job.data}, line {row.line}: the answer {row.answer!r:.60} is none of the task's labels"
            )
    with staged(job.final, overwrite=overwrite) as work:
        manifest = Manifest("bench", config=_config(job, case), seeds={"seed": case.bench.seed})
        manifest.inputs = [describe_file(p) for p in (job.data, *job.inputs) if p.is_file()]
        with manifest.timed("load"):
            systems = _open(job, case, task, out)
        try:
            records, warm = _measure(job, case, rows, systems, manifest, out)
            report = build(job, case, task, rows, systems, records, warm)
        finally:
            for system in systems:
                system.engine.close()
        report["timings"] = dict(manifest.timings)
        write_jsonl(work / "records.jsonl", [jsonable(r) for r in (*warm, *records)])
        write_text(work / "report.json", dumps(report) + "\n")
        from bench.html import render

        write_text(work / "report.html", render(report, records))
        manifest.result = {k: report[k] for k in ("verdict", "reason")}
        manifest.write(work)
    return report


def _rows(job: Job, case: Case) -> list[Example]:
    rows = read_examples(job.data)
    if job.rows is not None and job.rows < len(rows):
        rows = random.Random(case.bench.seed).sample(rows, job.rows)
    return rows


def _config(job: Job, case: Case) -> dict[str, Any]:
    return {
        "baseline": job.baseline,
        "candidate": job.candidate,
        "data": str(job.data),
        "requests": case.bench.requests,
        "cold_requests": job.cold_requests,
        "block": job.block,
        "warm_up": job.warm_up,
        "max_tokens": job.max_tokens,
        "modes": list(job.modes),
        "margin": case.bench.margin,
        "claim": case.bench.claim.model_dump(),
    }


def _open(job: Job, case: Case, task: Task, out: Output) -> list[System]:
    limit = job.max_tokens or task.max_answer_tokens or DEFAULT_MAX_TOKENS
    systems = []
    for side, spec, prompt in (
        ("baseline", job.baseline, job.baseline_prompt),
        ("candidate", job.candidate, job.candidate_prompt),
    ):
        out.log(f"{side}: {spec}, {len(prompt.examples)} examples in the prompt")
        systems.append(System(side, open_engine(spec, threads=job.threads), prompt, limit))
    return systems


def _measure(
    job: Job,
    case: Case,
    rows: Sequence[Example],
    systems: Sequence[System],
    manifest: Manifest,
    out: Output,
) -> tuple[list[Record], list[Record]]:
    """All modes. With the cache on every row is answered once per side at least: those answers are the quality."""
    counts = {CACHE_ON: max(case.bench.requests, len(rows)), CACHE_OFF: job.cold_requests}
    measured: list[Record] = []
    warm: list[Record] = []
    with out.progress() as progress:
        for mode in job.modes:
            count = counts[mode] if CACHE_ON in job.modes else counts[CACHE_ON]
            bar = progress.add_task(f"requests, {mode}", total=count * len(systems), note="")

            def advance(record: Record, bar: Any = bar) -> None:
                progress.update(bar, advance=1, note=f"{record.side} {record.e2e * 1000:.0f} ms")

            with manifest.timed(mode):
                got, first = run_mode(
                    systems,
                    rows,
                    mode=mode,
                    count=count,
                    block=job.block if mode == CACHE_ON else 1,
                    # The machine is warm by the second mode; a request without cache leaves nothing to warm.
                    warm_up=job.warm_up if not warm else 0,
                    progress=advance,
                )
            measured += got
            warm += first
    return measured, warm


def build(
    job: Job,
    case: Case,
    task: Task,
    rows: Sequence[Example],
    systems: Sequence[System],
    records: Sequence[Record],
    warm: Sequence[Record],
) -> dict[str, Any]:
    """The report as one JSON value; docs/bench.md describes its fields."""
    price = machine_price(job.price_per_hour, job.plan, systems[0].engine.threads)
    seed = case.bench.seed
    answers: dict[str, dict[int, str]] = {"baseline": {}, "candidate": {}}
    for record in records:
        # The first answer to each row counts, from the first mode that ran.
        if record.ok:
            answers[record.side].setdefault(record.row, record.text)
    scored = sorted(answers["baseline"].keys() & answers["candidate"].keys())
    truth = [rows[i].answer or "" for i in scored]
    texts = {side: [answers[side][i] for i in scored] for side in answers}
    quality = judge(task, truth, texts["baseline"], texts["candidate"], margin=case.bench.margin, seed=seed)
    right = {
        side: [task.label(t) == task.label(a) for t, a in zip(truth, texts[side], strict=True)]
        for side in texts
    }
    modes = {
        mode: _mode(mode, [r for r in records if r.mode == mode], price, quality, right, case)
        for mode in job.modes
    }
    verdict, reason = claims.overall({m: f["claim"] for m, f in modes.items()}, quality["gate"])
    return {
        "schema": SCHEMA,
        "verdict": verdict,
        "reason": reason,
        "claim": case.bench.claim.model_dump(),
        "modes": modes,
        "quality": quality,
        "systems": {s.side: s.facts() for s in systems},
        "prefix_fill_ms": {
            s.side: next((r.e2e * 1000 for r in warm if r.side == s.side and r.mode == CACHE_ON), None)
            for s in systems
        },
        "task": json.loads(task.model_dump_json()),
        "price": {"per_hour": price.per_hour, "source": price.source},
        "conditions": {
            **_config(job, case),
            "load": "closed loop, one request at a time, interleaved A/B blocks",
            "decoding": "greedy",
            "max_tokens": systems[0].max_tokens,
            "rows": len(rows),
            "hardware": hardware(),
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        },
    }


def _mode(
    mode: str,
    records: Sequence[Record],
    price: Price,
    quality: dict[str, Any],
    right: dict[str, list[bool]],
    case: Case,
) -> dict[str, Any]:
    seed = case.bench.seed
    a, b = pairs(records)
    if len(a) < 2:
        raise InputError(
            f"{mode}: {len(a)} pairs of answered requests; at least 2 are needed, raise the requests"
        )
    facts: dict[str, Any] = {}
    for side, group in (("baseline", a), ("candidate", b)):
        facts[side] = summarise([r for r in records if r.side == side])
        facts[side]["cost"] = costs(price, [r.e2e for r in group], quality["correct_share"][side])
    speed = claims.service_ratio(a, b, seed=seed)
    cost = claims.widest([price.of(r.e2e) for r in a], [price.of(r.e2e) for r in b], seed=seed)
    facts["claim"] = claims.check(speed, cost, case.bench.claim)
    facts["ratios"] = {
        **{name: claims.side_ratio(a, b, name, seed=seed) for name in ("ttft", "tpot")},
        **{name: claims.side_ratio(a, b, name, seed=seed) for name in ("prompt_tokens", "output_tokens")},
        "cost_per_correct": claims.per_correct_ratio(
            ([price.of(r.e2e) for r in a], [price.of(r.e2e) for r in b]),
            (right["baseline"], right["candidate"]),
            seed=seed,
        ),
    }
    return facts
