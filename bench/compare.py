"""`unshot bench compare OLD NEW`: what changed between two reports of the same system, and whether it is worse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from bench.cost import busy_seconds, dollars
from bench.records import RequestRecord, bounds_of, meets
from unshot.case import Slo
from unshot.contracts.manifest import Manifest, read_manifest
from unshot.contracts.record import RecordError
from unshot.contracts.report import AnyReport, BenchReport, LoadReport, read_report
from unshot.data.rows import read_text
from unshot.errors import InputError
from unshot.metrics.intervals import t_quantile
from unshot.metrics.thresholds import ERROR_RATE

LEVEL = 0.95
# Means of so many stretches of a run, one after the other: the widest interval of these counts, since nobody knows how
# long the machine's moods last (batch means, Law and Kelton 2000, sect. 9.5.3).
BATCHES = (4, 8, 16)
# With the mean of the whole run, which is shown where the requests are too few for stretches.
WHOLE_TOO = (1, *BATCHES)
REGRESSION, IMPROVEMENT, SAME, UNKNOWN = "regression", "improvement", "no change shown", "not comparable"
# Only compared where reasoning came before it in one of the reports.
THOUGHT = "first answer token"
TIMES: dict[str, Callable[[RequestRecord], float]] = {
    "end to end": lambda r: r.seconds,
    "TTFT": lambda r: r.ttft,
    THOUGHT: lambda r: r.ttft_answer,
    "TPOT": lambda r: r.tpot,
}
LENGTHS_DIFFER = 0.10
LATE = "a report is not valid"
# Conditions that change what is compared, but not the amount of work: they are named.
NAMED = ("rows", "prompts", "prompt", "block", "repeat", "window", "margin", "api", "request_extra", "timeout",
         "tokens_counted_by", "proxy", "warm_up")  # fmt: skip
MACHINE = ("cpu", "cores", "ram_bytes", "gpus")
FACTS = ("spec", "model", "engine", "library", "precision", "parameters", "device", "threads", "command", "prompt",
         "examples_in_prompt", "tokens_counted_by", "proxy")  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    """A ratio NEW / OLD with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """One figure in both reports. `unit` says what `old` and `new` are; `ratio` is None for shares and scores."""

    name: str
    old: float | None
    new: float | None
    unit: str
    verdict: str
    ratio: Bounds | None = None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Everything that was compared, and the conditions in which the reports differ."""

    old: str
    new: str
    side: str
    threshold: float
    rows: list[Change]
    warnings: list[str] = field(default_factory=list)
    # Reports that are not valid: their times say nothing, and a gate cannot pass on them.
    invalid: list[str] = field(default_factory=list)

    @property
    def worse(self) -> list[str]:
        """The figures that got worse."""
        return [row.name for row in self.rows if row.verdict == REGRESSION]


@dataclass(frozen=True)
class _Measured:
    """One report with its measured requests by mode (of one side)."""

    path: Path
    report: AnyReport
    manifest: Manifest
    modes: dict[str, list[RequestRecord]]


def compare_reports(old: Path, new: Path, *, side: str, threshold: float) -> Comparison:
    """Compare one side of two report directories.

    A regression is a time, a cost or the inverse of a throughput whose ratio NEW / OLD lies above 1 + `threshold` with
    its whole interval; an error rate or a share of requests within the SLO that is worse by more than a hundredth with
    Fisher's exact test; or a score whose interval lies below the old one's. All tests together have 5% (Bonferroni).
    Raises `InputError` for directories that are no reports, or in which something else was asked of the system.
    """
    if not 0 <= threshold < math.inf:
        raise InputError(f"--threshold is {threshold:g}; it must be 0 or more")
    a, b = (_read(path, side) for path in (old, new))
    modes = [m for m in a.modes if m in b.modes]
    if not modes:
        raise InputError(f"{new}: no mode in common with {old} ({', '.join(a.modes)} / {', '.join(b.modes)})")
    warnings = _conditions(a, b, side)
    tests = sum(len(TIMES) + 4 for _ in modes)
    alpha = (1 - LEVEL) / tests
    rows: list[Change] = []
    for mode in modes:
        rows += _mode(mode, a, b, side, threshold, alpha)
        warnings += _lengths(mode, a.modes[mode], b.modes[mode])
    invalid = [str(run.path) for run in (a, b) if not _valid(run.report)]
    if invalid:
        # What failed, failed; how long it took was the client's doing too.
        rows = [r if r.name.startswith("errors") else replace(r, verdict=UNKNOWN, note=LATE) for r in rows]
    rows += _scores(a.report, b.report, side)
    return Comparison(str(old), str(new), side, threshold, rows, warnings, invalid)


def _read(path: Path, side: str) -> _Measured:
    manifest = read_manifest(path, stage="bench")
    report = read_report(path)
    modes: dict[str, list[RequestRecord]] = {}
    for number, line in enumerate(read_text(path / "records.jsonl").splitlines(), start=1):
        try:
            record = RequestRecord.from_json(line)
        except RecordError as error:
            raise InputError(
                f"{path / 'records.jsonl'}, line {number}: {error}; run `unshot bench` again"
            ) from None
        if record.side == side and record.block >= 0:
            modes.setdefault(record.mode, []).append(record)
    return _Measured(path, report, manifest, modes)


def _conditions(a: _Measured, b: _Measured, side: str) -> list[str]:
    """What else differs, in words. Raises `InputError` where another amount of work was asked for."""
    if type(a.report) is not type(b.report):
        raise InputError(f"{a.path} is a report of `{a.report.kind}`, {b.path} one of `{b.report.kind}`")
    named: list[str] = []
    old, new = a.report.conditions.plain(), b.report.conditions.plain()
    for key in ("max_tokens", "concurrency", "cache", "prompt_words", "decoding", "turns", "think_time"):
        if old.get(key) != new.get(key):
            raise InputError(
                f"{b.path}: {key.replace('_', ' ')} is {new.get(key)}, in {a.path} it is {old.get(key)}: another "
                "amount of work; measure both under the same conditions"
            )
    for mode in a.modes.keys() ^ b.modes.keys():
        named.append(
            f"{mode} was measured in {a.path if mode in a.modes else b.path} alone and is not compared"
        )
    hardware = [r.report.conditions.hardware for r in (a, b)]
    pairs: list[tuple[str, object, object]] = [
        (name.replace("_", " "), old.get(name), new.get(name)) for name in NAMED
    ]
    pairs += [
        (f"machine ({name})", getattr(hardware[0], name), getattr(hardware[1], name)) for name in MACHINE
    ]
    facts = [_facts(r.report, side) for r in (a, b)]
    pairs += [
        (name.replace("_", " "), facts[0].get(name), facts[1].get(name)) for name in facts[0] | facts[1]
    ]
    slos = [_slos(run, side) for run in (a, b)]
    if all(slos):
        pairs.append(("SLO", slos[0], slos[1]))
    models = [_models(run.report, side) for run in (a, b)]
    if all(models):
        pairs.append(("model that answered", models[0], models[1]))
    pairs.append(("version of unshot", a.manifest.tool.get("version"), b.manifest.tool.get("version")))
    # By contents and in order: the same rows under another name are the same rows.
    inputs = [[i.sha256[:12] for i in r.manifest.inputs] for r in (a, b)]
    pairs.append(("contents of the data and prompt files", ", ".join(inputs[0]), ", ".join(inputs[1])))
    named += [f"different {name}: {x} / {y}" for name, x, y in pairs if x != y and None not in (x, y)]
    for run in (a, b):
        report = run.report
        partial = f"{run.path} is partial: it was stopped before its end" if report.partial else None
        valid = _valid(report)
        named += [
            w for w in (partial, None if valid else f"{run.path} is not valid: its client was late") if w
        ]
        named += [f"{run.path}: {w}" for w in report.warnings]
    return named


def _facts(report: AnyReport, side: str) -> dict[str, object]:
    """What answered, as far as the report knows."""
    if isinstance(report, BenchReport):
        found = report.systems[side].plain()  # type: ignore[index]
        command = found.get("command") or []
        # Without the port, which is another in every run.
        found["command"] = " ".join(
            c for i, c in enumerate(command) if "--port" not in command[max(i - 1, 0) : i + 1]
        )
        return {name: found.get(name) for name in FACTS} | {"price": report.price[side].source}  # type: ignore[index]
    return {"model": report.model}


def _models(report: AnyReport, side: str) -> str:
    """The models that the answers say they are of; empty where they say nothing."""
    if isinstance(report, BenchReport):
        figures = [mode.side(side) for mode in report.modes.values()]  # type: ignore[arg-type]
    elif isinstance(report, LoadReport):
        figures = [report.figures]
    else:
        figures = [p.figures for p in report.points]
    return ", ".join(sorted({model for f in figures for model in f.models}))


def _valid(report: AnyReport) -> bool:
    if isinstance(report, BenchReport):
        return report.valid
    if isinstance(report, LoadReport):
        return report.client.valid
    return all(p.client.valid for p in report.points)


def _lengths(mode: str, a: Sequence[RequestRecord], b: Sequence[RequestRecord]) -> list[str]:
    """Other lengths of prompts or answers, or another share of cached tokens, in words."""
    found = []
    sums: dict[str, list[float]] = {}
    for name in ("prompt_tokens", "output_tokens", "cached_tokens"):
        known = [[c for r in group if r.ok and (c := getattr(r, name)) is not None] for group in (a, b)]
        sums[name] = [sum(k) / len(k) if k else math.nan for k in known]
    for name, words in (("prompt_tokens", "prompts"), ("output_tokens", "answers")):
        old, new = sums[name]
        if old > 0 and new > 0 and abs(math.log(new / old)) > math.log1p(LENGTHS_DIFFER):
            found.append(f"{mode}: the {words} have {old:.1f} tokens in OLD and {new:.1f} in NEW")
    old, new = (
        c / p if p else math.nan for c, p in zip(sums["cached_tokens"], sums["prompt_tokens"], strict=True)
    )
    if abs(new - old) > LENGTHS_DIFFER:
        found.append(f"{mode}: {old:.0%} of the prompt tokens are from the cache in OLD and {new:.0%} in NEW")
    return found


def _mode(mode: str, a: _Measured, b: _Measured, side: str, threshold: float, alpha: float) -> list[Change]:
    old, new = a.modes[mode], b.modes[mode]
    good = [[r for r in group if r.ok] for group in (old, new)]
    rows = []
    thought = any(r.reasoning_tokens or r.ttft_answer != r.ttft for group in good for r in group)
    for name, value in TIMES.items():
        if name == THOUGHT and not thought:
            continue
        pair = [_batches(group, value) for group in good]
        rows.append(_ratio(f"{name}, {mode}", pair, 1000.0, "ms", threshold, alpha, more_is_better=False))
    rates = [_throughput(group) for group in (old, new)]
    rows.append(
        _ratio(f"requests/s, {mode}", rates, 1.0, "per second", threshold, alpha, more_is_better=True)
    )
    money = [_money(run.report, group, side) for run, group in ((a, old), (b, new))]
    if any(money):
        rows.append(
            _ratio(f"$ per 1,000, {mode}", money, 1000.0, "$", threshold, alpha, more_is_better=False)
        )
    rows.append(
        _share(f"errors, {mode}", *((sum(not r.ok for r in g), len(g)) for g in (old, new)), alpha=alpha)
    )
    bounds = [_slo(run.report, mode, side) for run in (a, b)]
    if bounds[0] and bounds[0] == bounds[1]:
        missed = [(sum(not meets(r, bounds[0]) for r in g), len(g)) for g in (old, new)]
        rows.append(_share(f"outside the SLO, {mode}", *missed, alpha=alpha))
    return rows


def _ordered(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    return sorted(records, key=lambda r: (r.block, r.scheduled))


def _split(records: Sequence[RequestRecord], count: int) -> list[list[RequestRecord]]:
    """The records in `count` stretches of equal numbers, one after the other."""
    edges = np.linspace(0, len(records), count + 1).round().astype(int)
    return [list(records[i:j]) for i, j in itertools.pairwise(edges) if j > i]


Batches = dict[int, np.ndarray]


def _least(stretches: int) -> int:
    """Requests that so many stretches need: two in each, or one in the whole run."""
    return 2 * stretches if stretches > 1 else 1


def _batches(records: Sequence[RequestRecord], value: Callable[[RequestRecord], float]) -> Batches:
    """Means of a figure in stretches of the run, by the number of stretches."""
    known = [r for r in _ordered(records) if math.isfinite(value(r))]
    return {
        count: np.array([np.mean([value(r) for r in part]) for part in _split(known, count)])
        for count in WHOLE_TOO
        if len(known) >= _least(count)
    }


def _throughput(records: Sequence[RequestRecord]) -> Batches:
    """Answered requests a second, in stretches of the run."""
    found: Batches = {}
    for count in WHOLE_TOO:
        parts = _split(_ordered(records), count)
        if len(records) < _least(count):
            continue
        rates = []
        for part, after in zip(parts, [*parts[1:], None], strict=True):
            # Up to the next stretch's first request: what is under way across the border counts once.
            same = after is not None and after[0].block == part[-1].block
            end = after[0].scheduled if after is not None and same else max(r.end for r in part)
            span = end - min(r.scheduled for r in part)
            rates.append(sum(r.ok for r in part) / span if span > 0 else math.nan)
        if all(math.isfinite(rate) for rate in rates):
            found[count] = np.array(rates)
    return found


def _money(report: AnyReport, records: Sequence[RequestRecord], side: str) -> Batches:
    """Dollars per request in stretches of the run; empty without a price."""
    if not isinstance(report, BenchReport):
        return {}
    good = [r for r in _ordered(records) if r.ok]
    each, _ = dollars(report.price[side], good, busy_seconds(records)) if good else (None, None)  # type: ignore[index]
    if not each:
        return {}
    by_request = {r.request: d for r, d in zip(good, each, strict=True)}
    return _batches(good, lambda r: by_request[r.request])


def _ratio(
    name: str,
    pair: Sequence[Batches],
    scale: float,
    unit: str,
    threshold: float,
    alpha: float,
    *,
    more_is_better: bool,
) -> Change:
    """NEW / OLD of means over stretches, with the widest of the intervals."""
    shared = sorted(pair[0].keys() & pair[1].keys() & set(BATCHES))
    means = [float(p[max(p)].mean()) if p else None for p in pair]
    shown = [None if m is None else m * scale for m in means]
    if not shared:
        missing = [name for name, m in zip(("OLD", "NEW"), means, strict=True) if m is None]
        note = f"not known in {' and '.join(missing)}" if missing else "too few requests"
        return Change(name, shown[0], shown[1], unit, UNKNOWN, note=note)
    if (
        min(float(pair[0][n].mean()) for n in shared) <= 0
        or min(float(pair[1][n].mean()) for n in shared) <= 0
    ):
        same = means[0] == means[1]
        return Change(
            name, shown[0], shown[1], unit, SAME if same else UNKNOWN, note="a mean of 0 has no ratio"
        )
    found = [_log_interval(pair[0][n], pair[1][n], alpha) for n in shared]
    value = found[-1][0]
    low, high = min(f[1] for f in found), max(f[2] for f in found)
    limit = math.log1p(threshold)
    worse, better = (high < -limit, low > limit) if more_is_better else (low > limit, high < -limit)
    verdict = REGRESSION if worse else IMPROVEMENT if better else SAME
    return Change(
        name,
        shown[0],
        shown[1],
        unit,
        verdict,
        Bounds(*(math.exp(min(v, 700.0)) for v in (value, low, high))),
    )


def _log_interval(a: np.ndarray, b: np.ndarray, alpha: float) -> tuple[float, float, float]:
    """log(mean(b) / mean(a)) with Welch's interval on the relative means (delta method)."""
    va, vb = (float(x.var(ddof=1)) / len(x) / float(x.mean()) ** 2 for x in (a, b))
    value, error = math.log(b.mean() / a.mean()), math.sqrt(va + vb)
    if error == 0:
        return value, value, value
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = t_quantile(1 - alpha / 2, max(freedom, 1.0)) * error
    return value, value - half, value + half


def _share(name: str, old: tuple[int, int], new: tuple[int, int], *, alpha: float) -> Change:
    """A share that is better when smaller, by Fisher's exact test."""
    from scipy.stats import fisher_exact

    rates = [k / n if n else 0.0 for k, n in (old, new)]
    table = [[old[0], old[1] - old[0]], [new[0], new[1] - new[0]]]
    surely = fisher_exact(table).pvalue < alpha
    change = rates[1] - rates[0]
    verdict = SAME
    if surely and abs(change) > ERROR_RATE.value:
        verdict = REGRESSION if change > 0 else IMPROVEMENT
    return Change(name, rates[0], rates[1], "share", verdict)


def _slo(report: AnyReport, mode: str, side: str) -> dict[str, float]:
    if isinstance(report, BenchReport):
        found = report.modes[mode].side(side).goodput if mode in report.modes else None
    elif isinstance(report, LoadReport):
        found = report.figures.goodput
    else:
        found = next(
            (p.figures.goodput for p in report.points if p.load == mode and p.figures.goodput),
            None,
        )
    return found.slo_ms if found else bounds_of(Slo())


def _slos(run: _Measured, side: str) -> str:
    """The bounds of all modes in words; empty where there are none."""
    found = {f"{k} {v:g} ms" for mode in run.modes for k, v in _slo(run.report, mode, side).items()}
    return ", ".join(sorted(found))


def _scores(a: AnyReport, b: AnyReport, side: str) -> list[Change]:
    if not isinstance(a, BenchReport) or not isinstance(b, BenchReport):
        return []
    if a.quality.metric != b.quality.metric:
        note = f"{a.quality.metric} in OLD, {b.quality.metric} in NEW"
        return [Change("quality", None, None, "score", UNKNOWN, note=note)]
    old, new = a.quality.side(side), b.quality.side(side)
    verdict = REGRESSION if new.high < old.low else IMPROVEMENT if new.low > old.high else SAME
    return [Change(a.quality.metric, old.score, new.score, "score", verdict)]
