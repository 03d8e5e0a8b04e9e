"""One server under one load, or under a rising one: `unshot bench load` and `unshot bench sweep`."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import mlperf
from bench.records import RequestRecord, bounds_of
from bench.schedule import Load, parse_load
from bench.summary import number
from bench.target import LoadOptions, Target
from unshot.console import Output, jsonable
from unshot.contracts.figures import Figures
from unshot.contracts.manifest import Manifest, hardware, staged
from unshot.contracts.report import Knee, LoadConditions, LoadReport, SloKnee, Step, SweepReport
from unshot.data.files import write_text
from unshot.errors import InputError
from unshot.metrics.thresholds import ERROR_RATE
from unshot.secret import hidden

# The automatic sweep ends where doubling the streams brings less than this.
WORTH = 0.05
# Requests of a load that says nothing of its length.
REQUESTS = 100
# A rate is within the SLO where so many of its requests are; the search ends where the rates are this close.
WITHIN, CLOSE, MOST_RATES = 0.99, 1.1, 20
# Requests under way on average, below which they hardly meet.
ALONE = 0.1


@dataclass(frozen=True)
class LoadJob:
    """One load: how many requests or for how long, and from how many clients."""

    target: LoadOptions
    final: Path
    load: str
    requests: int | None
    warm_up: int = 4
    duration: float | None = None
    processes: int = 1
    ray: int = 0
    ray_address: str | None = None
    formats: tuple[str, ...] = ()
    overwrite: bool = False


@dataclass(frozen=True)
class SweepJob:
    """Rising closed loops: the steps, or the highest of an automatic sweep; or rising rates, with an SLO."""

    target: LoadOptions
    final: Path
    concurrencies: str
    most: int
    requests: int
    rates: str | None = None
    warm_up: int = 2
    overwrite: bool = False


def load_run(job: LoadJob, out: Output) -> LoadReport:
    """Measure one load; writes and returns the report. Raises `InputError`, `OutsideError`."""
    wanted = parse_load(job.load)
    target = Target(job.target)
    if "mlperf" in job.formats:
        mlperf.scenario_of(wanted, job.requests or 0)
    with staged(job.final, overwrite=job.overwrite) as work:
        manifest = Manifest("bench", config=jsonable(job), seeds={"seed": job.target.seed})
        manifest.inputs = target.inputs
        target.warm_up(job.warm_up)
        requests = job.requests
        if requests is None and job.duration is None and wanted.kind != "trace":
            requests = REQUESTS
        unit = "requests"
        if job.target.turns > 1:
            (wanted, requests), unit = target.converse(wanted, requests), "conversations"
        elif wanted.kind == "trace" and requests is None and job.duration is None:
            requests = len(wanted.times)
        many = f"{job.duration:g} s" if job.duration is not None else f"{requests} {unit}"
        out.log(f"{job.target.url}: {many}, {wanted.text}")
        with manifest.timed("load"):
            got = target.measure(
                wanted,
                requests,
                out,
                processes=job.processes,
                ray=job.ray,
                ray_address=job.ray_address,
                duration=job.duration,
                steady=job.duration is not None,
            )
        report = LoadReport(
            url=job.target.url,
            model=job.target.server.model,
            load=wanted.text,
            warnings=[*([target.cold] if target.cold else []), *got.warnings],
            partial=got.interrupted,
            figures=got.figures,
            turns=got.turns,
            failure=_failure(got.records),
            client=got.client,
            resources=got.resources,
            conditions=_conditions(target, got.figures.requests, job.warm_up, steady=got.steady),
        )
        _write(work, report, got.records)
        if "mlperf" in job.formats and got.figures.answered:
            mlperf.write_logs(work, report, got.records, wanted)
        manifest.finish(work)
    return report


def sweep_run(job: SweepJob, out: Output) -> SweepReport:
    """Measure closed loops of rising concurrency, or rising rates; writes and returns the report with the knee."""
    target = Target(job.target)
    points: list[Step] = []
    loads = _loads(job, points)
    with staged(job.final, overwrite=job.overwrite) as work:
        manifest = Manifest("bench", config=jsonable(job), seeds={"seed": job.target.seed})
        manifest.inputs = target.inputs
        target.warm_up(job.warm_up)
        everything: list[RequestRecord] = []
        warnings: list[tuple[str, str]] = []
        interrupted = False
        for load in loads:
            # Three rounds of every stream; ten seconds of a rate.
            least = 3 * load.concurrency if not load.open else math.ceil(10 * load.rate)
            with manifest.timed(load.text):
                got = target.measure(load, max(job.requests, least), out)
            everything += got.records
            facts = got.figures
            rate = load.rate if load.open else None
            points.append(Step(load.concurrency, facts, got.client, got.resources, rate))
            label = points[-1].label
            warnings += [(label, w.removeprefix(f"{load.text}: ")) for w in got.warnings]
            if doubt := _doubt(points[-1]):
                warnings.append((label, f"{doubt}: this step does not count for the knee"))
            p50 = f"e2e p50 {facts.e2e_ms.p50.value:.0f} ms" if facts.e2e_ms.p50 else "none answered"
            out.log(f"{points[-1].label}: {number(facts.requests_per_second, '.2f')} requests/s, {p50}")
            interrupted = got.interrupted
            if interrupted or not facts.answered:
                break
        report = SweepReport(
            url=job.target.url,
            model=job.target.server.model,
            warnings=[*([target.cold] if target.cold else []), *gathered(warnings)],
            partial=interrupted,
            points=points,
            knee=knee(points) if job.rates is None else None,
            slo_knee=slo_knee(points) if job.rates is not None else None,
            failure=_failure(everything),
            conditions=_conditions(target, job.requests, job.warm_up),
        )
        _write(work, report, everything)
        manifest.finish(work)
    return report


def gathered(found: Sequence[tuple[str, str]]) -> list[str]:
    """The warnings of steps, `(step, words)`: those that differ in their numbers alone are one, in the last's words."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for label, words in found:
        kinds.setdefault(re.sub(r"[\d.]+", "#", words), []).append((label, words))
    lines = []
    for group in kinds.values():
        labels = ", ".join(label for label, _ in group)
        lines.append(f"{labels}: {'at the last, ' if len(group) > 1 else ''}{group[-1][1]}")
    return lines


def _loads(job: SweepJob, points: Sequence[Step]) -> Iterator[Load]:
    """The loads of a sweep; an automatic one looks at `points`, which grows meanwhile."""
    if job.rates is None:
        steps = _steps(job.concurrencies, job.most, points)
        return (Load("closed", concurrency=step, text=f"closed:{step}") for step in steps)
    if not bounds_of(job.target.slo):
        raise InputError(
            "--rates looks for the greatest rate within the SLO; give --slo, e.g. ttft=200,tpot=50"
        )
    rates: Iterator[float] = _rising(points)
    if job.rates != "auto":
        try:
            found = sorted({float(part) for part in job.rates.split(",")})
        except ValueError:
            found = [0.0]
        if not 0 < found[0] <= found[-1] < math.inf:
            raise InputError(f"--rates is `{job.rates}`; give auto, or requests a second above 0, e.g. 1,2,4")
        rates = iter(found)
    return (Load("poisson", rate=rate, text=f"poisson:{rate:g}") for rate in rates)


def _rising(points: Sequence[Step]) -> Iterator[float]:
    """Rates to the SLO's knee: doubled while they are within it (halved while the first is not), then closed in on."""
    low, high, rate = 0.0, math.inf, 1.0
    for _ in range(MOST_RATES):
        yield rate
        if _within(points[-1]):
            low = rate
        else:
            high = rate
        # Where requests hardly meet, sending fewer of them cannot help.
        alone = rate * (points[-1].figures.e2e_ms.mean or math.inf) / 1000 < ALONE
        if high <= low * CLOSE or (not low and alone):
            return
        rate = 2 * rate if high == math.inf else rate / 2 if not low else round(math.sqrt(low * high), 3)


def _within(point: Step) -> bool:
    good = point.figures.goodput
    return point.client.valid and good is not None and (good.share or 0.0) >= WITHIN


def slo_knee(points: Sequence[Step]) -> SloKnee:
    """The greatest rate that is within the SLO as every lower one is; a rate at which the client was late is not."""
    ordered = sorted(points, key=lambda p: p.rate or 0.0)
    bad = next((i for i, p in enumerate(ordered) if not _within(p)), len(ordered))
    best = ordered[bad - 1] if bad else None
    worse = ordered[bad] if bad < len(ordered) else None
    return SloKnee(
        rate=best.rate if best else None,
        goodput=best.figures.goodput.requests_per_second if best and best.figures.goodput else None,
        share=WITHIN,
        next_rate=worse.rate if worse else None,
        # Where the client was late the share is not the server's.
        next_share=worse.figures.goodput.share
        if worse and worse.client.valid and worse.figures.goodput
        else None,
    )


def _steps(text: str, most: int, points: Sequence[Step]) -> Iterator[int]:
    """The concurrencies given, or 1, 2, 4, ... until `points`, which grows meanwhile, shows saturation."""
    if text != "auto":
        try:
            steps = sorted({int(part) for part in text.split(",")})
        except ValueError:
            steps = [0]
        if steps[0] < 1:
            raise InputError(f"--concurrencies is `{text}`; give auto, or whole numbers from 1, e.g. 1,2,4,8")
        return iter(steps)
    return _doubling(most, points)


def _doubling(most: int, points: Sequence[Step]) -> Iterator[int]:
    step = 1
    while step <= most:
        yield step
        rates = [0.0 if _failing(p.figures) else p.figures.requests_per_second or 0.0 for p in points]
        # Two steps in a row that bring nothing: one alone may be chance.
        if len(rates) > 3 and max(rates[-2:]) < (1 + WORTH) * max(rates[:-2]):
            return
        step *= 2


def _failing(facts: Figures) -> bool:
    # Those that Ctrl-C ended did not fail.
    failed = sum(n for kind, n in facts.errors.items() if kind != "interrupted")
    return failed > ERROR_RATE.value * facts.requests


def _doubt(point: Step) -> str | None:
    """Why a step says nothing of the knee: it failed more often than is allowed, or the client was late."""
    facts = point.figures
    if _failing(facts):
        return f"{facts.requests - facts.answered} of {facts.requests} requests failed"
    return None if point.client.valid else f"the client itself was late ({'; '.join(point.client.reasons)})"


def knee(points: Sequence[Step]) -> Knee | None:
    """The step of greatest power, throughput / mean latency (Kleinrock 1979), and the greatest throughput.

    Steps that failed, or in which the client was late, do not count. None below three steps that do. Past the knee
    more load brings latency and little throughput, or failures.
    """
    usable = [
        (p.figures.requests_per_second, p.figures.e2e_ms.mean, p)
        for p in points
        if p.figures.requests_per_second and p.figures.e2e_ms.mean and not _doubt(p)
    ]
    if len(usable) < 3:
        return None
    rate, _, best = max(usable, key=lambda u: u[0] / u[1])
    most = max(r for r, _, _ in usable)
    p50 = best.figures.e2e_ms.p50
    return Knee(
        concurrency=best.concurrency,
        requests_per_second=rate,
        e2e_p50_ms=p50.value if p50 else float("nan"),
        most_requests_per_second=most,
        share_of_most=rate / most,
        saturated=best is not usable[-1][2]
        or any(p.concurrency > best.concurrency and _failing(p.figures) for p in points),
    )


def _failure(records: Sequence[RequestRecord]) -> str | None:
    """Why not one request was answered, by the first of the reasons; None where one was."""
    if not records or any(r.ok for r in records):
        return None
    return f"no request was answered ({min(f'{r.error}: {r.detail}' for r in records)[:160]})"


def _conditions(target: Target, requests: int, warm_up: int, *, steady: bool = False) -> LoadConditions:
    options = target.options
    return LoadConditions(
        requests=requests,
        max_tokens=options.max_tokens,
        cache=options.cache,
        prompts=target.prompts,
        data=str(options.data) if options.data else None,
        prompt_words=options.prompt_words,
        warm_up=warm_up,
        timeout=options.server.timeout,
        api=options.server.api,
        request_extra=hidden(dict(options.server.extra)),
        turns=options.turns if options.turns > 1 else None,
        think_time=target.think_time,
        tokens_counted_by=target.counter.name if target.counter else "server",
        prompt=target.prompt_digest,
        proxy=target.api.address.way,
        seed=options.seed,
        window="steady state: from every stream's first answer to the last request sent"
        if steady
        else "all requests",
        hardware=hardware(),
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def _write(work: Path, report: LoadReport | SweepReport, records: Sequence[RequestRecord]) -> None:
    from bench.single_page import render

    write_text(work / "records.jsonl", "".join(f"{r.to_json()}\n" for r in records))
    report.write(work)
    write_text(work / "report.html", render(report, records))
