"""From what was measured to the report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bench import claim as claims
from bench.cost import PriceOptions, busy_seconds, costs, dollars, side_price
from bench.forecast import calibration_sides, forecast
from bench.job import Job
from bench.measure import Measurement, pairs
from bench.quality import judge
from bench.records import SIDES, RequestRecord, summarise
from bench.sides import CACHE_OFF, CACHE_ON, System, client_facts
from bench.traffic import (
    cache_warning,
    cut_warning,
    limit_warning,
    shared_share,
    side_warnings,
    warm_warning,
)
from unshot.case import Case
from unshot.contracts.figures import Figures
from unshot.contracts.manifest import hardware
from unshot.contracts.plan import PlanFile
from unshot.contracts.report import (
    BenchReport,
    Conditions,
    Mode,
    Quality,
    Ratios,
    SideName,
    SidePrice,
    SystemFacts,
)
from unshot.contracts.task import Task
from unshot.data.rows import Example
from unshot.errors import OutsideError
from unshot.machine import usable_cores
from unshot.metrics.intervals import LEVEL
from unshot.secret import hidden

# In flight less than this share of what was asked for: the figures are of another load.
IN_FLIGHT = 0.9


def build(
    job: Job,
    case: Case,
    task: Task,
    rows: Sequence[Example],
    systems: Sequence[System],
    prices: dict[SideName, SidePrice],
    measured: Measurement,
) -> BenchReport:
    """The report; docs/bench.md describes its fields."""
    facts = {s.side: s.facts() for s in systems}
    for side, fact in facts.items():
        fact.client = client_facts(measured.clients[side])
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
        # A mode that had hardly begun when the run was stopped is left out, and the others stay.
        if len(pairs(chosen)[0]) >= 2 or not measured.interrupted:
            modes[mode] = builder.build(mode, chosen, measured)
    verdict, reasons = claims.overall({m: f.claim for m, f in modes.items()}, quality.gate, quality.why)
    warnings = _warnings(job, rows, modes, facts, measured.warm, systems[0].max_tokens)
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


def side_prices(job: Job, systems: Sequence[System]) -> dict[SideName, SidePrice]:
    """What each side costs. Raises `InputError` for a plan that cannot be read or used, before anything is measured."""
    if job.plan is not None:
        PlanFile.read(job.plan)
    facts = {s.side: s.facts() for s in systems}
    cores = next((f.threads for f in facts.values() if f.threads), usable_cores())
    return {
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


def _prefix_fill(measured: Measurement, side: SideName) -> float | None:
    """What the first warm-up request took with an empty cache, milliseconds; None where it was not run."""
    # Where it failed, the second may have found what it had filled.
    first = next((r for r in measured.warm if r.side == side and r.mode == CACHE_ON), None)
    return first.seconds * 1000 if first and first.ok else None


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
        block=job.settings(CACHE_ON, case.bench, len(rows), warm=False).block,
        warm_up=job.warm_up,
        max_tokens=systems[0].max_tokens,
        modes=list(job.modes),
        margin=case.bench.margin,
        max_error_rate=job.max_error_rate,
        repeat=job.repeat,
        request_extra=hidden(dict(job.servers["baseline"].extra)) if job.servers else {},
        load=f"closed loop, {many}, interleaved A/B blocks",
        hardware=hardware(),
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def _warnings(
    job: Job,
    rows: Sequence[Example],
    modes: dict[str, Mode],
    facts: dict[SideName, SystemFacts],
    warm: Sequence[RequestRecord],
    limit: int,
) -> list[str]:
    """What a reader must know before the figures."""
    found = []
    for side in SIDES:
        warmed = [r for r in warm if r.side == side]
        found.append(warm_warning(side, Counter(r.error for r in warmed if r.error), len(warmed)))
    for mode, figures in modes.items():
        for side in SIDES:
            mine = figures.side(side)
            found.append(limit_warning(f"{side}, {mode}", mine, limit))
            requests = [job.prompts[side].request(row) for row in rows]
            asked = shared_share(requests) if mode == CACHE_ON else 0.0
            in_process = facts[side].engine != "server" and mode == CACHE_ON
            repeated = job.repeat and len(rows) < mine.requests
            if not in_process and not repeated:
                found.append(
                    cache_warning(
                        f"{side}, {mode}",
                        asked,
                        mine.tokens.cached_share,
                        repeated=False,
                        tokens=mine.tokens.prompt,
                    )
                )
            found += side_warnings(f"{side}, {mode}", str(facts[side].model), mine)
    return list(dict.fromkeys(w for w in found if w))


def _doubts(measured: Measurement, facts: dict[SideName, SystemFacts], modes: dict[str, Mode]) -> list[str]:
    """Why the measurement itself cannot be relied on."""
    doubts = ["the run was stopped before its end"] if measured.interrupted else []
    for side, fact in facts.items():
        if fact.client and not fact.client.valid:
            doubts.append(f"the client was the bottleneck of the {side} ({'; '.join(fact.client.reasons)})")
        for mode, figures in modes.items():
            cut = cut_warning(f"{side}, prefix {mode}", figures.side(side))
            doubts += [cut] if cut else []
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
            figures[side].server = measured.servers.get(mode, {}).get(side)
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
        free = [side for side, each in money.items() if each and min(each) <= 0]
        if free:
            old = new = None
            names = " and of the ".join(free)
            no_cost += f"{'; ' if no_cost else ''}requests of the {names} cost nothing at its price: there is no ratio"
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
