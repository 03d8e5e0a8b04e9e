"""`unshot bench` from two specs to a report directory."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

from bench import claim as claims
from bench.cost import Price, costs, machine_price
from bench.forecast import forecast, sides
from bench.measure import CACHE_OFF, CACHE_ON, MODES, Measurement, block_seconds, pairs, run_mode
from bench.opening import Server, open_system
from bench.quality import FAILED, PASSED, Quality, judge
from bench.records import SIDES, Record, summarise
from bench.resources import Monitor, energy_per_request
from bench.systems import Measured
from unshot.case import Case
from unshot.console import Output, dumps, jsonable
from unshot.contracts.gates import Gate
from unshot.contracts.manifest import Manifest, describe_data, describe_file, hardware, staged
from unshot.contracts.task import Task, derive_task, read_task
from unshot.data.files import write_text
from unshot.data.load import load_rows
from unshot.data.prompts import Prompt
from unshot.data.rows import Example, RowOptions, write_jsonl
from unshot.errors import InputError, OutsideError
from unshot.machine import usable_cores
from unshot.metrics.intervals import INCONCLUSIVE, MET, NOT_MET, ratio_of_means
from unshot.prices import TokenPrice

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
    concurrency: int = 1
    server: Server = field(default_factory=Server)
    token_prices: dict[str, TokenPrice] = field(default_factory=dict)
    modes: tuple[str, ...] = MODES
    inputs: list[Path] = field(default_factory=list)
    rows_as: RowOptions | None = None


def bench_run(job: Job, case: Case, out: Output, *, overwrite: bool = False) -> dict[str, Any]:
    """Measure, judge and write the report directory `job.final`; return the report.

    Raises `InputError` for bad input. The caller turns the verdict into an exit code.
    """
    rows = _rows(job, case, out)
    task = (
        read_task(job.task_path)
        if job.task_path
        else derive_task(case.task, rows, out.log, embedder=case.tune.embedder)
    )
    named = {k: getattr(case.task, k) for k in ("metric", "judge", "judge_model", "judge_key_env")}
    task = task.changed(**{k: v for k, v in named.items() if v is not None})
    for row in rows:
        if task.label(row.answer or "") == "(invalid)":
            raise InputError(f"{row.where}: the answer {row.answer!r:.60} is none of the task's labels")
    with staged(job.final, overwrite=overwrite) as work:
        manifest = Manifest("bench", config=_config(job, case), seeds={"seed": case.bench.seed})
        manifest.inputs = [describe_file(p) for p in job.inputs if p.is_file()]
        manifest.inputs.insert(0, describe_data(job.data))
        with manifest.timed("load"):
            systems = _open(job, task, out)
        try:
            with Monitor(_processes(systems)) as monitor:
                measured = _measure(job, case, rows, systems, manifest, monitor, out)
            report = build(job, case, task, rows, systems, measured)
            report["resources"] = monitor.facts()
            for mode, facts in report["modes"].items():
                for side in SIDES:
                    facts[side]["energy"] = energy_per_request(
                        monitor, measured.records, side, mode, measured.clocks[mode]
                    )
        finally:
            for system in systems:
                system.close()
        report["timings"] = dict(manifest.timings)
        write_jsonl(work / "records.jsonl", [jsonable(r) for r in (*measured.warm, *measured.records)])
        write_text(work / "report.json", dumps(report) + "\n")
        from bench.html import render

        write_text(work / "report.html", render(report, measured.records))
        manifest.candidate, manifest.gates = job.candidate, gates(report)
        manifest.verdict, manifest.reason = report["verdict"], report["reason"]
        manifest.finish(work)
    return report


def gates(report: dict[str, Any]) -> list[Gate]:
    """The claim and the quality gate as `unshot.contracts.gates` reads them from the manifest, for a promotion."""
    q = report["quality"]
    d = q["difference"]
    passed = {MET: True, NOT_MET: False}.get(report["verdict"])
    claim = Gate(
        name="claim",
        passed=passed,
        detail=f"{report['claim']['low']:g}-{report['claim']['high']:g}x {report['verdict']}: {report['reason']}",
        figures={
            mode: {k: facts["claim"][k] for k in ("speed", "cost")} for mode, facts in report["modes"].items()
        },
    )
    quality = Gate(
        name="quality",
        # What was measured until a run was stopped is no answer for a promotion.
        passed={PASSED: True, FAILED: False}.get(q["gate"]) if not report["partial"] else None,
        detail=f"{q['metric']} {q['candidate']['score']:.3f} against {q['baseline']['score']:.3f} on {q['rows']} rows, "
        f"difference {d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}], margin {q['margin']:g}: {q['gate']} "
        f"({q['why']})",
        figures={k: q[k] for k in ("difference", "lower_bound", "margin", "rows")},
    )
    return [claim, quality]


def _processes(systems: Sequence[Measured]) -> dict[str, int]:
    """The processes whose memory is watched, by name."""
    own = " and ".join(s.side for s in systems if s.pid is None)
    served = {f"the {s.side}'s server": s.pid for s in systems if s.pid is not None}
    return {f"this process ({own or 'client'})": os.getpid(), **served}


def _rows(job: Job, case: Case, out: Output) -> list[Example]:
    long = job.baseline_prompt
    rows = load_rows(
        job.data,
        job.rows_as,
        out,
        prompt=long if long.given else None,
        instruction=case.task.instruction,
        used=long.slots,
    )
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
        "concurrency": job.concurrency,
        "block": job.block,
        "warm_up": job.warm_up,
        "max_tokens": job.max_tokens,
        "modes": list(job.modes),
        "margin": case.bench.margin,
        "claim": case.bench.claim.plain(),
    }


def _open(job: Job, task: Task, out: Output) -> list[Measured]:
    limit = job.max_tokens or task.max_answer_tokens or DEFAULT_MAX_TOKENS
    systems: list[Measured] = []
    for side, spec, prompt in (
        ("baseline", job.baseline, job.baseline_prompt),
        ("candidate", job.candidate, job.candidate_prompt),
    ):
        out.log(f"{side}: {spec}, {len(prompt.examples)} examples in the prompt")
        try:
            systems.append(
                open_system(
                    side,
                    spec,
                    prompt,
                    max_tokens=limit,
                    threads=job.threads,
                    concurrency=job.concurrency,
                    server=job.server,
                    out=out,
                )
            )
        except BaseException:
            for system in systems:
                system.close()
            raise
    return systems


def _measure(
    job: Job,
    case: Case,
    rows: Sequence[Example],
    systems: Sequence[Measured],
    manifest: Manifest,
    monitor: Monitor,
    out: Output,
) -> Measurement:
    """All modes. With the cache on every row is answered once per side at least: those answers are the quality."""
    counts = {CACHE_ON: max(case.bench.requests, len(rows)), CACHE_OFF: job.cold_requests}
    total = Measurement()
    with out.progress() as progress:
        for mode in job.modes:
            count = counts[mode] if CACHE_ON in job.modes else counts[CACHE_ON]
            bar = progress.add_task(f"requests, {mode}", total=count * len(systems), note="")

            def advance(record: Record, bar: Any = bar) -> None:
                note = record.error or f"{record.e2e * 1000:.0f} ms"
                progress.update(bar, advance=1, note=f"{record.side} {note}")

            with manifest.timed(mode):
                got = run_mode(
                    systems,
                    rows,
                    mode=mode,
                    count=count,
                    block=job.block if mode == CACHE_ON else max(1, job.concurrency),
                    # The machine is warm by the second mode; a request without cache leaves nothing to warm.
                    warm_up=job.warm_up if not total.warm else 0,
                    progress=advance,
                    between=monitor.look,
                )
            total.records += got.records
            total.warm += got.warm
            total.clocks |= got.clocks
            if got.interrupted:
                total.interrupted = True
                out.warn("stopped; the report is of what was measured until then, and marked partial")
                break
    return total


def build(
    job: Job,
    case: Case,
    task: Task,
    rows: Sequence[Example],
    systems: Sequence[Measured],
    measured: Measurement,
) -> dict[str, Any]:
    """The report as one JSON value; docs/bench.md describes its fields."""
    records = measured.records
    facts = {s.side: s.facts() for s in systems}
    cores = next((f["threads"] for f in facts.values() if f["threads"]), usable_cores())
    price = machine_price(job.price_per_hour, job.plan, cores)
    seed = case.bench.seed
    texts, asked = _answers(records, rows)
    truth = [row.answer or "" for row in asked]
    quality = judge(
        task, truth, texts["baseline"], texts["candidate"], margin=case.bench.margin,
        requests=[row.text for row in asked], seed=seed,
    )  # fmt: skip
    right = {side: task.answers(truth, given).right.tolist() for side, given in texts.items()}
    modes = {}
    for mode in job.modes:
        chosen = [r for r in records if r.mode == mode]
        if chosen or not measured.interrupted:
            modes[mode] = _mode(mode, chosen, price, job.token_prices, quality, right, case)
    verdict, reason = claims.overall(
        {m: f["claim"] for m, f in modes.items()}, quality["gate"], quality["why"]
    )
    doubts = ["the run was stopped before its end"] if measured.interrupted else []
    for side, fact in facts.items():
        client = fact.get("client")
        if client and not client["valid"]:
            doubts.append(f"the client was the bottleneck of the {side} ({'; '.join(client['reasons'])})")
    if doubts:
        verdict, reason = INCONCLUSIVE, f"{'; '.join(doubts)} (as far as measured: {verdict}, {reason})"
    report = {
        "schema": SCHEMA,
        "verdict": verdict,
        "reason": reason,
        "partial": measured.interrupted,
        "valid": not doubts,
        "claim": case.bench.claim.plain(),
        "modes": modes,
        "quality": quality,
        "systems": facts,
        "prefix_fill_ms": {
            s.side: next(
                (r.e2e * 1000 for r in measured.warm if r.side == s.side and r.mode == CACHE_ON and r.ok),
                None,
            )
            for s in systems
        },
        "task": task.plain(),
        "price": {
            "per_hour": price.per_hour,
            "source": price.source,
            "tokens": {side: asdict(p) for side, p in job.token_prices.items()},
        },
        "conditions": {
            **_config(job, case),
            "load": f"closed loop, {job.concurrency} request{'s' if job.concurrency > 1 else ''} at a time, "
            "interleaved A/B blocks",
            "decoding": "greedy",
            "max_tokens": systems[0].max_tokens,
            "rows": len(rows),
            "hardware": hardware(),
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        },
        "gpu": "cpu",
        "sides": sides(records, facts),
    }
    report["forecast"] = forecast(job.plan, report)
    return report


def _answers(
    records: Sequence[Record], rows: Sequence[Example]
) -> tuple[dict[str, list[str | None]], list[Example]]:
    """`(answers by side, rows)` of the rows both sides were asked; the first answer counts, None was not answered."""
    answers: dict[str, dict[int, str | None]] = {side: {} for side in SIDES}
    for record in records:
        mine = answers[record.side]
        if record.ok and mine.get(record.row) is None:
            mine[record.row] = record.text
        mine.setdefault(record.row, None)
    scored = sorted(answers["baseline"].keys() & answers["candidate"].keys())
    return {side: [answers[side][i] for i in scored] for side in SIDES}, [rows[i] for i in scored]


def _mode(
    mode: str,
    records: Sequence[Record],
    price: Price,
    token_prices: dict[str, TokenPrice],
    quality: Quality,
    right: dict[str, list[float]],
    case: Case,
) -> dict[str, Any]:
    seed = case.bench.seed
    a, b = pairs(records)
    if len(a) < 2:
        kinds = sorted({f"{r.side}: {r.error}" for r in records if r.error})
        raise OutsideError(
            f"{mode}: {len(a)} requests were answered by both sides, at least 2 are needed"
            + (f" ({'; '.join(kinds[:4])})" if kinds else "")
        )
    dollars = _dollars(records, (a, b), price, token_prices)
    seconds = block_seconds(records)
    facts: dict[str, Any] = {}
    for side in SIDES:
        mine = [r for r in records if r.side == side]
        busy = sum(
            value * sum(r.ok for r in mine if r.block == block) for block, value in seconds[side].items()
        )
        facts[side] = summarise(mine, busy, case.traffic.slo)
        facts[side]["cost"] = {
            **costs(dollars[side], quality["correct_share"][side]),
            "machine_seconds_per_request": busy / max(1, facts[side]["answered"]),
        }
    speed = claims.service_ratio(a, b)
    cost = ratio_of_means(dollars["baseline"], dollars["candidate"])
    facts["claim"] = claims.check(speed, cost, case.bench.claim)
    facts["ratios"] = {
        **{
            name: claims.side_ratio(a, b, name) for name in ("ttft", "tpot", "prompt_tokens", "output_tokens")
        },
        "cost_per_correct": claims.per_correct_ratio(
            (dollars["baseline"], dollars["candidate"]), (right["baseline"], right["candidate"]), seed=seed
        ),
    }
    return facts


def _dollars(
    records: Sequence[Record],
    paired: tuple[Sequence[Record], Sequence[Record]],
    price: Price,
    token_prices: dict[str, TokenPrice],
) -> dict[str, list[float]]:
    """Dollars per request as pairs: by token prices where a side has them, else by machine time.

    One request at a time, a request's machine time is its end-to-end time. With more at once the block's wall time
    is shared by its requests, and the pairs are blocks.
    """
    seconds = block_seconds(records)
    blocks = sorted(seconds["baseline"].keys() & seconds["candidate"].keys())
    alone = all(
        x.scheduled + x.e2e <= y.scheduled + 1e-9
        for group in paired
        for x, y in itertools.pairwise(sorted(group, key=lambda r: r.scheduled))
    )
    result = {}
    for side, group in zip(SIDES, paired, strict=True):
        tokens = token_prices.get(side)
        if tokens is not None:
            each = [tokens.of(r.prompt_tokens, r.output_tokens, r.cached_tokens) for r in group]
        else:
            each = [price.of(r.e2e) for r in group]
        if alone or len(blocks) < 2:
            result[side] = each
        elif tokens is not None:
            by_block = {n: [d for d, r in zip(each, group, strict=True) if r.block == n] for n in blocks}
            result[side] = [sum(v) / len(v) if (v := by_block[n]) else 0.0 for n in blocks]
        else:
            result[side] = [price.of(seconds[side][n]) for n in blocks]
    return result
