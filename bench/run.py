"""`unshot bench` from two specs to a report directory."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

from bench import claim as claims
from bench.build import build, side_prices
from bench.job import Job
from bench.measure import Measurement, pairs, run_mode
from bench.quality import FAILED, PASSED
from bench.records import SIDES, RequestRecord
from bench.resources import Monitor, catalog_gpu, energy_per_request
from bench.sides import System, open_system
from bench.traffic import ServerOptions
from unshot.case import Case
from unshot.console import Output, jsonable
from unshot.contracts.manifest import Gate, Manifest, describe_data, describe_there, staged
from unshot.contracts.report import BenchReport
from unshot.contracts.task import Task, derive_task, hold_metric
from unshot.data.files import write_text
from unshot.data.load import load_rows
from unshot.data.rows import Example
from unshot.data.seal import record_reading
from unshot.errors import InputError
from unshot.metrics.intervals import INCONCLUSIVE, MET, NOT_MET

DEFAULT_MAX_TOKENS = 64


def bench_run(job: Job, case: Case, out: Output, *, overwrite: bool = False) -> BenchReport:
    """Measure, judge and write the report directory `job.final`; return the report.

    Raises `InputError` for bad input. The caller turns the verdict into an exit code.
    """
    rows = _rows(job, case, out)
    task = job.task or derive_task(case.task, rows, out.log, embedder=case.tune.embedder)
    for row in rows:
        if task.label(row.answer or "") == "(invalid)":
            raise InputError(f"{row.where}: the answer {row.answer!r:.60} is none of the task's labels")
    references = [row.answer or "" for row in rows]
    hold_metric(task.metric, task.answers(references, references))
    test_set = rows
    if job.rows is not None and job.rows < len(rows):
        rows = random.Random(case.bench.seed).sample(rows, job.rows)
    with staged(job.final, overwrite=overwrite) as work:
        manifest = Manifest("bench", seeds={"seed": case.bench.seed})
        manifest.inputs = describe_there(job.inputs)
        manifest.inputs.insert(0, describe_data(job.data))
        with manifest.timed("load"):
            systems = _open(job, task, out)
        try:
            prices = side_prices(job, systems)
            # Once both sides are there and before a row is answered: a reading that breaks off counts.
            seal = record_reading(test_set, "bench", job.task_path.parent if job.task_path else job.final)
            if seal.others and (warning := seal.warning()):
                out.warn(warning)
            with Monitor(_processes(systems)) as monitor:
                measured = _Bench(job, case, rows, systems, manifest, monitor, out).measure()
            if measured.interrupted and len(pairs(measured.records)[0]) < 2:
                raise KeyboardInterrupt  # nothing to report
            report = build(job, case, task, rows, systems, prices, measured)
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
        report.engine = "llamacpp" if report.sides else None
        report.timings = dict(manifest.timings)
        lines = (r.to_json() for r in (*measured.warm, *measured.dropped, *measured.records))
        write_text(work / "records.jsonl", "".join(f"{line}\n" for line in lines))
        report.write(work)
        from bench.html import render

        write_text(work / "report.html", render(report, measured.records))
        manifest.config = {**jsonable(report.conditions), "test_seal": vars(seal)}
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
    return load_rows(
        job.data,
        job.rows_as,
        out,
        prompt=long if long.given else None,
        instruction=case.task.instruction,
        used=long.slots,
    )


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
                settings = self.job.settings(mode, self.case.bench, len(self.rows), warm=not total.warm)
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
