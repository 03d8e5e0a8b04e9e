"""`unshot bench` from two specs to a report directory."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import claim as claims
from bench.cost import PriceOptions, busy_seconds, costs, dollars, side_price
from bench.forecast import calibration_sides, forecast
from bench.measure import Looks, Measurement, ModeSettings, pairs, run_mode
from bench.quality import FAILED, PASSED, judge
from bench.records import SIDES, RequestRecord, summarise
from bench.resources import Monitor, catalog_gpu, energy_per_request
from bench.sides import CACHE_OFF, CACHE_ON, MODES, System, client_facts, open_system
from bench.traffic import ServerOptions, cache_warning, shared_share
from unshot.case import Case
from unshot.console import Output, jsonable
from unshot.contracts.manifest import Gate, Manifest, describe_data, describe_file, hardware, staged
from unshot.contracts.report import (
    BenchReport,
    Conditions,
    Figures,
    Mode,
    Quality,
    Ratios,
    SideName,
    SidePrice,
    SystemFacts,
)
from unshot.contracts.task import Task, derive_task, hold_metric, read_task
from unshot.data.files import write_text
from unshot.data.load import load_rows
from unshot.data.prompts import Prompt
from unshot.data.rows import Example, RowOptions
from unshot.errors import InputError, OutsideError
from unshot.machine import usable_cores
from unshot.metrics.intervals import INCONCLUSIVE, LEVEL, MET, NOT_MET, looks
from unshot.metrics.thresholds import ERROR_RATE

DEFAULT_MAX_TOKENS = 64
# Without cache, requests are dear: the run is looked at after so many pairs (of blocks, where several requests run at
# once), after twice as many, and so on to the last, and ends at the first look that settles the verdict.
COLD_LOOKS, COLD_BLOCK_LOOKS = (6, 48), (4, 16)
COLD_SECONDS = 900.0
# In flight less than this share of what was asked for: the figures are of another load.
IN_FLIGHT = 0.9


@dataclass
class Job:
    """What to measure: specs, prompts, rows, and how long. `cold_requests` None: until the verdict is settled."""

    baseline: str
    candidate: str
    data: Path
    final: Path
    prompts: dict[SideName, Prompt]
    task_path: Path | None = None
    plan: Path | None = None
    cold_requests: int | None = None
    block: int = 4
    warm_up: int = 2
    rows: int | None = None
    max_tokens: int | None = None
    threads: int | None = None
    concurrency: int = 1
    repeat: bool = False
    max_error_rate: float = ERROR_RATE.value
    servers: dict[SideName, ServerOptions] = field(default_factory=dict)
    server_args: dict[SideName, list[str]] = field(default_factory=dict)
    prices: dict[SideName, PriceOptions] = field(default_factory=dict)
    modes: tuple[str, ...] = MODES
    inputs: list[Path] = field(default_factory=list)
    rows_as: RowOptions | None = None

    def spec(self, side: SideName) -> str:
        """The spec of a side."""
        return self.baseline if side == "baseline" else self.candidate

    def settings(self, mode: str, requests: int, rows: int, *, warm: bool) -> ModeSettings:
        """How a mode is measured. With several requests at once a block has room for all of them to be in flight."""
        several = self.concurrency > 1
        block = max(self.block, 4 * self.concurrency) if several else self.block
        # With the cache on every row is answered once per side at least: those answers are the quality.
        ends: Looks = [(max(requests, rows), LEVEL)]
        if mode == CACHE_OFF:
            block = 2 * self.concurrency if several else 1
            if self.cold_requests is not None:
                ends = [(self.cold_requests, LEVEL)]
            elif CACHE_ON not in self.modes:
                ends = [(max(requests, rows), LEVEL)]
            elif several:
                ends = [(n * block, level) for n, level in looks(*COLD_BLOCK_LOOKS)]
            else:
                ends = list(looks(*COLD_LOOKS))
        # The machine is warm by the second mode; a request without cache leaves nothing to warm.
        return ModeSettings(mode, ends, block, self.warm_up if warm else 0, self.repeat, COLD_SECONDS)


def bench_run(job: Job, case: Case, out: Output, *, overwrite: bool = False) -> BenchReport:
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
    references = [row.answer or "" for row in rows]
    hold_metric(task.metric, task.answers(references, references))
    with staged(job.final, overwrite=overwrite) as work:
        manifest = Manifest("bench", seeds={"seed": case.bench.seed})
        manifest.inputs = [describe_file(p) for p in job.inputs if p.is_file()]
        manifest.inputs.insert(0, describe_data(job.data))
        with manifest.timed("load"):
            systems = _open(job, task, out)
        try:
            with Monitor(_processes(systems)) as monitor:
                measured = _Bench(job, case, rows, systems, manifest, monitor, out).measure()
            report = build(job, case, task, rows, systems, measured)
            report.resources = monitor.facts()
            for mode, facts in report.modes.items():
                for side in SIDES:
                    facts.side(side).energy = energy_per_request(
                        monitor, measured.records, side, mode, measured.clocks[mode]
                    )
        finally:
            for system in systems:
                system.close()
        report.gpu = catalog_gpu([s.device for s in report.systems.values()], report.resources.gpus)
        report.timings = dict(manifest.timings)
        lines = (r.to_json() for r in (*measured.warm, *measured.dropped, *measured.records))
        write_text(work / "records.jsonl", "".join(f"{line}\n" for line in lines))
        report.write(work)
        from bench.html import render

        write_text(work / "report.html", render(report, measured.records))
        manifest.config = jsonable(report.conditions)
        manifest.candidate, manifest.gates = job.candidate, gates(report)
        manifest.verdict, manifest.reason = report.verdict, report.reason
        manifest.finish(work)
    return report


def gates(report: BenchReport) -> list[Gate]:
    """The claim and the quality gate as `unshot.contracts.gates` reads them from the manifest, for a promotion."""
    q = report.quality
    d = q.difference
    claim = Gate(
        name="claim",
        passed={MET: True, NOT_MET: False}.get(report.verdict),
        detail=f"{report.claim.low:g}-{report.claim.high:g}x {report.verdict}: {report.reason}",
        figures={
            mode: jsonable({"speed": facts.claim.speed, "cost": facts.claim.cost})
            for mode, facts in report.modes.items()
        },
    )
    quality = Gate(
        name="quality",
        # What was measured until a run was stopped is no answer for a promotion.
        passed={PASSED: True, FAILED: False}.get(q.gate) if not report.partial else None,
        detail=f"{q.metric} {q.candidate.score:.3f} against {q.baseline.score:.3f} on {q.rows} rows, "
        f"difference {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}], margin {q.margin:g}: {q.gate} "
        f"({q.why})",
        figures=jsonable({"difference": d, "lower_bound": q.lower_bound, "margin": q.margin, "rows": q.rows}),
    )
    return [claim, quality]


def _processes(systems: Sequence[System]) -> dict[str, int]:
    """The processes whose memory is watched, by name."""
    own = " and ".join(s.side for s in systems if s.pid is None)
    served = {f"the {s.side}'s server": s.pid for s in systems if s.pid is not None}
    return {f"this process ({own or 'client'})": os.getpid(), **served}


def _rows(job: Job, case: Case, out: Output) -> list[Example]:
    long = job.prompts["baseline"]
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


def _open(job: Job, task: Task, out: Output) -> list[System]:
    limit = job.max_tokens or task.max_answer_tokens or DEFAULT_MAX_TOKENS
    systems: list[System] = []
    for side in SIDES:
        prompt = job.prompts[side]
        out.log(f"{side}: {job.spec(side)}, {len(prompt.examples)} examples in the prompt")
        try:
            systems.append(
                open_system(
                    side,
                    job.spec(side),
                    prompt,
                    max_tokens=limit,
                    threads=job.threads,
                    concurrency=job.concurrency,
                    options=job.servers.get(side, ServerOptions()),
                    server_args=job.server_args.get(side, []),
                    out=out,
                )
            )
        except BaseException:
            for system in systems:
                system.close()
            raise
    return systems


@dataclass
class _Bench:
    """One run's parts while it is measured."""

    job: Job
    case: Case
    rows: Sequence[Example]
    systems: Sequence[System]
    manifest: Manifest
    monitor: Monitor
    out: Output

    def measure(self) -> Measurement:
        """All modes, until the end or Ctrl-C."""
        total = Measurement()
        with self.out.progress() as progress:
            for mode in self.job.modes:
                settings = self.job.settings(
                    mode, self.case.bench.requests, len(self.rows), warm=not total.warm
                )
                most = settings.looks[-1][0] * len(self.systems)
                bar = progress.add_task(f"requests, {mode}", total=most, note="")

                def advance(record: RequestRecord, bar: object = bar) -> None:
                    note = record.error or f"{record.seconds * 1000:.0f} ms"
                    progress.update(bar, advance=1, note=f"{record.side} {note}")  # type: ignore[arg-type]

                with self.manifest.timed(mode):
                    total.add(
                        run_mode(
                            self.systems,
                            self.rows,
                            settings,
                            progress=advance,
                            between=self.monitor.look,
                            settled=self._settled,
                        )
                    )
                if total.interrupted:
                    self.out.warn(
                        "stopped; the report is of what was measured until then, and marked partial"
                    )
                    break
        return total

    def _settled(self, records: Sequence[RequestRecord], level: float) -> bool:
        """Whether the speed's interval leaves no doubt about the claim; the cost's follows it."""
        a, b = pairs(records)
        if len(a) < 2:
            return False
        speed = claims.ratio_of(
            [r.seconds for r in a], [r.seconds for r in b], claims.Clusters.of(a), level=level
        )
        return speed.verdict(self.case.bench.claim.low) != INCONCLUSIVE


def build(
    job: Job,
    case: Case,
    task: Task,
    rows: Sequence[Example],
    systems: Sequence[System],
    measured: Measurement,
) -> BenchReport:
    """The report; docs/bench.md describes its fields."""
    facts = {s.side: s.facts() for s in systems}
    for side, fact in facts.items():
        fact.client = client_facts(measured.clients[side])
    cores = next((f.threads for f in facts.values() if f.threads), usable_cores())
    prices: dict[SideName, SidePrice] = {
        s.side: side_price(
            s.side,
            job.prices.get(s.side, PriceOptions()),
            job.plan,
            facts[s.side],
            local=s.local,
            cores=cores,
        )
        for s in systems
    }
    texts, scored = first_answers(measured.asked, rows)
    truth = [row.answer or "" for row in scored]
    quality = judge(
        task, truth, texts["baseline"], texts["candidate"], margin=case.bench.margin,
        requests=[row.text for row in scored], seed=case.bench.seed,
    )  # fmt: skip
    right: dict[SideName, list[float]] = {
        side: task.answers(truth, given).right.tolist() for side, given in texts.items()
    }
    builder = _ModeBuilder(job, case, prices, facts, quality, right)
    modes = {}
    for mode in job.modes:
        chosen = [r for r in measured.records if r.mode == mode]
        if chosen or not measured.interrupted:
            modes[mode] = builder.build(mode, chosen, measured)
    verdict, reasons = claims.overall({m: f.claim for m, f in modes.items()}, quality.gate, quality.why)
    warnings = _warnings(job, rows, modes, facts)
    reasons += [words for m, f in modes.items() if (words := claims.length_words(m, f))]
    doubts = _doubts(measured, facts, modes)
    if doubts:
        verdict, reasons = "inconclusive", [*doubts, f"as far as measured: {verdict}", *reasons]
    report = BenchReport(
        verdict=verdict,
        reason="; ".join(reasons),
        reasons=reasons,
        warnings=warnings,
        partial=measured.interrupted,
        valid=not doubts,
        claim=case.bench.claim,
        modes=modes,
        quality=quality,
        systems=facts,
        price=prices,
        prefix_fill_ms={s.side: _prefix_fill(measured, s.side) for s in systems},
        task=task.plain(),
        conditions=_conditions(job, case, rows, systems, measured),
        gpu=None,
        sides=calibration_sides(measured.records, facts),
    )
    report.forecast = forecast(job.plan, report)
    return report


def _prefix_fill(measured: Measurement, side: SideName) -> float | None:
    """What the first warm-up request took with an empty cache, milliseconds; None where it was not run."""
    first = (r for r in measured.warm if r.side == side and r.mode == CACHE_ON and r.ok)
    return next((r.seconds * 1000 for r in first), None)


def _conditions(
    job: Job, case: Case, rows: Sequence[Example], systems: Sequence[System], measured: Measurement
) -> Conditions:
    many = f"{job.concurrency} request{'s' if job.concurrency > 1 else ''} at a time"
    cold = [r for r in measured.records if r.mode == CACHE_OFF and r.side == "baseline"]
    return Conditions(
        baseline=job.baseline,
        candidate=job.candidate,
        data=str(job.data),
        rows=len(rows),
        requests=case.bench.requests,
        cold_requests=len(cold) if CACHE_OFF in job.modes else None,
        concurrency=job.concurrency,
        block=job.settings(CACHE_ON, case.bench.requests, len(rows), warm=False).block,
        warm_up=job.warm_up,
        max_tokens=systems[0].max_tokens,
        modes=list(job.modes),
        margin=case.bench.margin,
        max_error_rate=job.max_error_rate,
        repeat=job.repeat,
        load=f"closed loop, {many}, interleaved A/B blocks",
        hardware=hardware(),
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def _warnings(
    job: Job, rows: Sequence[Example], modes: dict[str, Mode], facts: dict[SideName, SystemFacts]
) -> list[str]:
    """What a reader must know before the figures."""
    found = []
    for mode, figures in modes.items():
        for side in SIDES:
            mine = figures.side(side)
            requests = [job.prompts[side].request(row) for row in rows]
            asked = shared_share(requests) if mode == CACHE_ON else 0.0
            in_process = facts[side].engine != "server" and mode == CACHE_ON
            repeated = job.repeat and len(rows) < mine.requests
            if not in_process and not repeated:
                found.append(
                    cache_warning(f"{side}, {mode}", asked, mine.tokens.cached_share, repeated=False)
                )
            if mine.tokens.output is None and mine.answered:
                found.append(
                    f"{side}, {mode}: the output tokens are not known, since the server reports no usage; "
                    "give --tokenizer"
                )
    return list(dict.fromkeys(w for w in found if w))


def _doubts(measured: Measurement, facts: dict[SideName, SystemFacts], modes: dict[str, Mode]) -> list[str]:
    """Why the measurement itself cannot be relied on."""
    doubts = ["the run was stopped before its end"] if measured.interrupted else []
    for side, fact in facts.items():
        if fact.client and not fact.client.valid:
            doubts.append(f"the client was the bottleneck of the {side} ({'; '.join(fact.client.reasons)})")
        for mode, figures in modes.items():
            flying = figures.side(side).in_flight
            if flying and flying.mean < IN_FLIGHT * flying.asked and flying.asked > 1:
                doubts.append(
                    f"{side}, prefix {mode}: {flying.mean:.1f} requests were in flight where {flying.asked} were "
                    "asked for"
                )
    return doubts


def first_answers(
    asked: Sequence[RequestRecord], rows: Sequence[Example]
) -> tuple[dict[SideName, list[str | None]], list[Example]]:
    """`(answers by side, rows)` of the rows that both sides were asked.

    The first answer to a row counts. A row whose first request failed was not answered (None), which is a wrong
    answer, also where a later request for the same row was answered.
    """
    answers: dict[SideName, dict[int, str | None]] = {side: {} for side in SIDES}
    for record in asked:
        answers[record.side].setdefault(record.row, record.text if record.ok else None)
    scored = sorted(answers["baseline"].keys() & answers["candidate"].keys())
    return {side: [answers[side][i] for i in scored] for side in SIDES}, [rows[i] for i in scored]


@dataclass
class _ModeBuilder:
    """From one mode's records to its part of the report."""

    job: Job
    case: Case
    prices: dict[SideName, SidePrice]
    facts: dict[SideName, SystemFacts]
    quality: Quality
    right: dict[SideName, list[float]]

    def build(self, mode: str, records: Sequence[RequestRecord], measured: Measurement) -> Mode:
        """Figures of both sides, the claim and the ratios beside it. Raises `OutsideError` below two pairs."""
        a, b = pairs(records)
        if len(a) < 2:
            kinds = sorted({f"{r.side}: {r.error}" for r in records if r.error})
            raise OutsideError(
                f"{mode}: {len(a)} requests were answered by both sides, at least 2 are needed"
                + (f" ({'; '.join(kinds[:4])})" if kinds else "")
            )
        money: dict[SideName, list[float] | None] = {}
        figures: dict[SideName, Figures] = {}
        no_cost = []
        for side, group in zip(SIDES, (a, b), strict=True):
            mine = [r for r in records if r.side == side]
            busy = busy_seconds(mine)
            money[side], why = dollars(self.prices[side], group, busy)
            no_cost += [why] if why else []
            figures[side] = summarise(
                mine, sum(busy.values()), self.case.traffic.slo, asked=self.job.concurrency
            )
            answered = max(1, figures[side].answered)
            figures[side].cost = costs(
                money[side], self.quality.correct_share[side], sum(busy.values()) / answered
            )
        return self._judge(mode, records, (a, b), figures, money, "; ".join(no_cost), measured)

    def _judge(
        self,
        mode: str,
        records: Sequence[RequestRecord],
        paired: tuple[list[RequestRecord], list[RequestRecord]],
        figures: dict[SideName, Figures],
        money: dict[SideName, list[float] | None],
        no_cost: str,
        measured: Measurement,
    ) -> Mode:
        a, b = paired
        level = measured.levels.get(mode, LEVEL)
        clusters = claims.Clusters.of(a)
        old, new = money["baseline"], money["candidate"]
        speed = claims.ratio_of(
            (old_seconds := [r.seconds for r in a]),
            (new_seconds := [r.seconds for r in b]),
            clusters,
            level=level,
        )
        cost = claims.ratio_of(old, new, clusters, level=level) if old and new else None
        errors = {
            side: claims.error_gate([r for r in records if r.side == side], self.job.max_error_rate)
            for side in SIDES
        }
        named = ("ttft", "tpot", "prompt_tokens", "output_tokens", "per_token")
        ratios = Ratios(
            **{name: claims.side_ratio(a, b, name) for name in named},
            cost_per_correct=claims.per_correct_ratio(
                (old, new),
                (self.right["baseline"], self.right["candidate"]),
                clusters,
                seed=self.case.bench.seed,
            )
            if old and new
            else None,
        )
        prompts_differ = self.job.prompts["baseline"] != self.job.prompts["candidate"]
        return Mode(
            baseline=figures["baseline"],
            candidate=figures["candidate"],
            claim=claims.check(
                speed,
                cost,
                self.case.bench.claim,
                clusters,
                errors=errors,
                no_cost=no_cost or None,
                looks=measured.looks.get(mode, 1),
                needed=claims.pairs_to_settle(old_seconds, new_seconds, clusters, self.case.bench.claim.low),
            ),
            ratios=ratios,
            split=claims.split(speed.value, claims.length_factor(a, b), self.facts, prompts_differ),
            spoilt_blocks=measured.spoilt.get(mode, 0),
            blocks=measured.blocks.get(mode, 0),
        )
