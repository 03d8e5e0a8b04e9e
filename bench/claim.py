"""The claim check: faster and cheaper by the claimed factor, with prefix caching and without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.records import SIDES, RequestRecord
from unshot.case import Claim
from unshot.contracts.report import (
    ErrorGate,
    Factor,
    Judged,
    Mode,
    ModeClaim,
    RatioInterval,
    SideName,
    SystemFacts,
    Verdict,
)
from unshot.metrics.intervals import INCONCLUSIVE, MET, NOT_MET, Interval, share
from unshot.metrics.ratios import log_ratio, ratio_of_means, units_to_settle

PASSED, FAILED = "passed", "failed"
# Where output lengths differ by more, the verdict says how much of the ratio they are.
LENGTHS_DIFFER = 0.10


@dataclass(frozen=True)
class Clusters:
    """What pairs have in common: the block they ran in and the row they ask."""

    blocks: list[int]
    rows: list[int]

    @classmethod
    def of(cls, records: Sequence[RequestRecord]) -> Clusters:
        """Of one side's records, in the pairs' order."""
        return cls([r.block for r in records], [r.row for r in records])

    @property
    def lonely(self) -> str | None:
        """Why the pairs' spread says nothing; None where it does."""
        if len(self.rows) < 2:
            return "one pair"
        for name, ids in (("block", self.blocks), ("row", self.rows)):
            if len(set(ids)) < 2:
                return f"all pairs are of one {name}"
        return None

    def chosen(self, keep: Sequence[bool]) -> Clusters:
        """Those of the pairs that are kept."""
        return Clusters(
            [b for b, k in zip(self.blocks, keep, strict=True) if k],
            [r for r, k in zip(self.rows, keep, strict=True) if k],
        )


def ratio_of(a: Sequence[float], b: Sequence[float], clusters: Clusters, *, level: float = 0.95) -> Interval:
    """Ratio of the means of pairs, with the interval that the noise shared in blocks and rows allows for.

    Pairs that are all of one block, or of one row, have no interval: nothing says how far another would be.
    """
    if clusters.lonely:
        value = sum(a) / sum(b)
        return Interval(value, 0.0, math.inf, level, f"no interval: {clusters.lonely}", len(a))
    return ratio_of_means(a, b, clusters.rows, clusters.blocks, level=level)


def pairs_to_settle(a: Sequence[float], b: Sequence[float], clusters: Clusters, claim: float) -> int | None:
    """How many pairs would settle on which side of the claim the ratio lies, with probability 0.8.

    If mean and spread stay as measured; None where that cannot be told, or no number up to a million would do.
    """
    if clusters.lonely:
        return None
    log = log_ratio(a, b, clusters.rows, clusters.blocks)
    units = units_to_settle(log, math.log(claim))
    return None if units is None else max(len(a) + 1, -(-units * log.pairs // log.units))


def side_ratio(
    baseline: Sequence[RequestRecord], candidate: Sequence[RequestRecord], figure: str
) -> RatioInterval | None:
    """Ratio of the means of another figure (`ttft`, `tpot`, `prompt_tokens`, ...), of pairs that both have it."""
    values = [
        tuple(math.nan if v is None else float(v) for v in (getattr(a, figure), getattr(b, figure)))
        for a, b in zip(baseline, candidate, strict=True)
    ]
    keep = [all(math.isfinite(v) and v > 0 for v in pair) for pair in values]
    if sum(keep) < 2:
        return None
    chosen = [pair for pair, k in zip(values, keep, strict=True) if k]
    clusters = Clusters.of(baseline).chosen(keep)
    return shown(ratio_of([a for a, _ in chosen], [b for _, b in chosen], clusters), clusters)


def shown(ratio: Interval, clusters: Clusters) -> RatioInterval:
    """A ratio as the report keeps it."""
    return RatioInterval(
        value=ratio.value,
        low=ratio.low,
        high=ratio.high if math.isfinite(ratio.high) else None,
        pairs=ratio.n,
        method=ratio.method,
        level=ratio.level,
        blocks=len(set(clusters.blocks)),
        rows=len(set(clusters.rows)),
    )


def per_correct_ratio(
    costs: tuple[Sequence[float], Sequence[float]],
    correct: tuple[Sequence[float], Sequence[float]],
    clusters: Clusters,
    *,
    draws: int = 4000,
    seed: int = 0,
) -> RatioInterval | None:
    """Ratio of cost per correct answer: a bootstrap over the scored rows, with the cost ratio's own spread beside it.

    Draws of the share of right answers (of rows, in pairs) are put together with draws of the log cost ratio from the
    t distribution of its clusters. None where a side has no correct answer at all: its cost per answer has no value.
    """
    right = [np.asarray(c, dtype=float) for c in correct]
    if not right[0].sum() or not right[1].sum() or clusters.lonely:
        return None
    log = log_ratio(*costs, clusters.rows, clusters.blocks)
    generator = np.random.default_rng(seed)
    spread = generator.standard_t(max(log.df, 1.0), size=draws) * math.sqrt(log.variance)
    rows = generator.integers(0, len(right[0]), size=(draws, len(right[0])))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        values = np.exp(log.value + spread) * right[1][rows].mean(axis=1) / right[0][rows].mean(axis=1)
    point = math.exp(log.value) * right[1].mean() / right[0].mean()
    # A draw without any right answer on both sides has no ratio; on one side it is 0 or infinite.
    low, high = np.quantile(values[~np.isnan(values)], [0.025, 0.975], method="nearest")
    return RatioInterval(
        value=float(point),
        low=float(low),
        high=float(high) if np.isfinite(high) else None,
        pairs=log.pairs,
        method="bootstrap of rows, clustered cost ratio",
        blocks=len(set(clusters.blocks)),
        rows=len(right[0]),
    )


def error_gate(records: Sequence[RequestRecord], limit: float) -> ErrorGate:
    """Whether one side's error rate is within `limit`.

    Failed: more often than allowed even by the lower of its one-sided 95% bounds.
    Inconclusive: above the limit, but so few requests may do that by chance.
    """
    failed, requests = sum(not r.ok for r in records), len(records)
    bounds = share(failed, requests, level=0.90) if requests else None
    low, high = (bounds.low, bounds.high) if bounds else (0.0, 1.0)
    rate = failed / requests if requests else 0.0
    verdict = PASSED if rate <= limit and requests else FAILED if low > limit else INCONCLUSIVE
    return ErrorGate(failed, requests, rate, low, high, limit, verdict)  # type: ignore[arg-type]


def check(
    speed: Interval,
    cost: Interval | None,
    claim: Claim,
    clusters: Clusters,
    *,
    errors: dict[SideName, ErrorGate],
    no_cost: str | None = None,
    looks: int = 1,
    needed: int | None = None,
) -> ModeClaim:
    """Verdict of one mode: both ratios at least `claim.low`, and no side failing more often than allowed.

    `needed` pairs would settle an interval that holds the claim.
    """

    def judged(ratio: Interval) -> Judged:
        found = shown(ratio, clusters)
        fields = {name: getattr(found, name) for name in RatioInterval.__struct_fields__}
        return Judged(**fields, verdict=ratio.verdict(claim.low))  # type: ignore[arg-type]

    ratios = [speed, cost] if cost is not None else [speed]
    verdicts = [r.verdict(claim.low) for r in ratios]
    gates = {side: gate.verdict for side, gate in errors.items()}
    verdict: Verdict
    if NOT_MET in verdicts or gates["candidate"] == FAILED:
        verdict = "not met"
    elif cost is not None and all(v == MET for v in verdicts) and all(g == PASSED for g in gates.values()):
        verdict = "met"
    else:
        verdict = "inconclusive"
    return ModeClaim(
        verdict=verdict,
        speed=judged(speed),
        cost=judged(cost) if cost is not None else None,
        no_cost=no_cost,
        errors=errors,
        looks=looks,
        pairs_to_settle=needed if INCONCLUSIVE in verdicts else None,
        above_range=cost is not None and all(r.value > claim.high for r in ratios),
    )


def length_factor(baseline: Sequence[RequestRecord], candidate: Sequence[RequestRecord]) -> float | None:
    """What the baseline's output length alone makes of the speed ratio.

    The baseline's end-to-end time over what it would take for the candidate's number of tokens: its own time to first
    token, and its own time per token for the others. None where tokens or times per token are not known.
    """
    whole = shortened = 0.0
    for a, b in zip(baseline, candidate, strict=True):
        if not a.output_tokens or not b.output_tokens:
            return None
        step = a.tpot if math.isfinite(a.tpot) else 0.0
        if a.output_tokens != b.output_tokens and not math.isfinite(a.tpot):
            return None
        whole += a.seconds
        shortened += max(a.ttft, a.seconds + step * (b.output_tokens - a.output_tokens))
    return whole / shortened if shortened > 0 else None


def split(
    ratio: float, length: float | None, systems: dict[SideName, SystemFacts], prompts_differ: bool
) -> list[Factor]:
    """The speed ratio in parts: prompt, model, engine and output length, each measured or said not to be."""
    old, new = (systems[side] for side in SIDES)
    same_engine = old.engine == new.engine and old.library == new.library and old.engine != "server"
    same_engine = same_engine or old.spec == new.spec
    same_model = old.spec == new.spec or (
        old.config is not None
        and (old.config, old.parameters, old.precision) == (new.config, new.parameters, new.precision)
    )
    rest = ratio / length if length is not None else None
    together = [
        name
        for name, same in (("prompt", not prompts_differ), ("model", same_model), ("engine", same_engine))
        if not same
    ]
    unknown = (
        f"not measured apart: {', '.join(together)} together are "
        + (f"{rest:.2f}x" if rest is not None else "the rest of the ratio")
        + "; run the candidate's model with the baseline's prompt, or both models in one engine"
    )

    def factor(name: str, same: bool, why: str) -> Factor:
        if same:
            return Factor(name, 1.0, why)  # type: ignore[arg-type]
        alone = together == [name] and rest is not None
        return Factor(name, rest if alone else None, "all else is the same" if alone else unknown)  # type: ignore[arg-type]

    return [
        factor("prompt", not prompts_differ, "both sides have the same prompt"),
        factor("model", same_model, "both sides have the same architecture, size and number format"),
        factor("engine", same_engine, "both sides have the same engine"),
        Factor(
            "output length",
            length,
            "the baseline's time over its time at the candidate's output length"
            if length is not None
            else "not measured: the tokens of an answer, or the time per token, are not known",
        ),
    ]


def length_words(mode: str, facts: Mode) -> str | None:
    """What the verdict says where output lengths differ by more than a tenth; None where they do not."""
    old, new = facts.baseline.tokens.output, facts.candidate.tokens.output
    if not old or not new or abs(math.log(old / new)) <= math.log1p(LENGTHS_DIFFER):
        return None
    length = next(f.value for f in facts.split if f.name == "output length")
    part = (
        f"that alone is {length:.2f}x of the {facts.claim.speed.value:.2f}x"
        if length
        else "how much of the ratio that is cannot be told"
    )
    token = f"; {facts.ratios.per_token.value:.2f}x per token" if facts.ratios.per_token else ""
    return f"prefix {mode}: the answers have {old:.1f} tokens against {new:.1f}, {part}{token}"


def overall(modes: dict[str, ModeClaim], gate: str | None, why: str = "") -> tuple[Verdict, list[str]]:
    """`(verdict, reasons)` over the modes and the quality gate: every mode must be met and the gate passed."""
    by_verdict: dict[str, list[str]] = {MET: [], NOT_MET: [], INCONCLUSIVE: []}
    for mode, facts in modes.items():
        by_verdict[facts.verdict].append(mode)
    met = " and ".join(by_verdict[MET])
    parts = [f"{part} with the prefix {mode}" for mode, facts in modes.items() for part in _why_not(facts)]
    if gate == FAILED:
        parts.append("the candidate's quality is worse than the baseline's beyond the margin")
    elif gate is not None and gate != PASSED:
        parts.append(f"it is not shown that the candidate's quality is not worse ({why or 'too few rows'})")
    holds = [f"speed and cost hold with the prefix {met}"] if met else []
    if not parts:
        return "met", holds
    verdict: Verdict = "not met" if by_verdict[NOT_MET] or gate == FAILED else "inconclusive"
    return verdict, parts + holds


def _why_not(facts: ModeClaim) -> list[str]:
    """What stands between one mode and `met`."""
    parts = []
    names = [("faster", facts.speed), ("cheaper", facts.cost)]
    missed = [name for name, r in names if r is not None and r.verdict == NOT_MET]
    unclear = [name for name, r in names if r is not None and r.verdict == INCONCLUSIVE]
    if missed:
        parts.append(f"not {' and '.join(missed)} enough")
    if unclear:
        parts.append(f"cannot tell whether {' and '.join(unclear)}, the interval holds the claim")
    if facts.cost is None:
        parts.append(f"no cost verdict ({facts.no_cost})")
    for side, gate in facts.errors.items():
        if gate.verdict != PASSED:
            sure = "" if gate.verdict == FAILED else " (so few requests may do that by chance)"
            parts.append(
                f"the {side} failed {gate.failed} of {gate.requests} requests, {gate.limit:.1%} are allowed{sure}"
            )
    return parts
