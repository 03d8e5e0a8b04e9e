"""`--format mlperf`: the run in the form of MLPerf LoadGen's summary and detail logs.

Names, order and rules are LoadGen's (mlcommons/inference, loadgen/results.cc, token latencies on): a percentile is the
order statistic at rank floor(n p), QPS counts n - 1 samples. It is not an MLPerf result, and the summary says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.records import RequestRecord
from bench.schedule import Load
from unshot.contracts.report import LoadReport
from unshot.data.files import write_text
from unshot.errors import InputError

# MLPerf inference's own (mlperf.conf and TestSettings): a run shorter than that is INVALID there.
MIN_DURATION_MS, MIN_QUERIES = 600_000, 100
PERCENTILES = (0.50, 0.90, 0.95, 0.97, 0.99, 0.999)
TARGET = {"SingleStream": 0.90, "Server": 0.99, "Offline": 0.99}
CONFIDENCE = 0.99
RULE = "=" * 48


def scenario_of(load: Load, requests: int) -> str:
    """LoadGen's name for the load. Raises `InputError` for a load it does not have."""
    if load.kind == "closed" and load.concurrency == 1:
        return "SingleStream"
    if load.kind == "closed" and load.concurrency >= requests:
        return "Offline"
    if load.kind == "poisson":
        return "Server"
    raise InputError(
        f"--format mlperf: LoadGen has no load like {load.text}; it has closed:1 (SingleStream), poisson:RATE (Server) "
        f"and all requests at once (Offline, here closed:{requests})"
    )


def write_logs(folder: Path, report: LoadReport, records: Sequence[RequestRecord], load: Load) -> None:
    """Write `mlperf_log_summary.txt` and `mlperf_log_detail.txt`."""
    scenario = scenario_of(load, report.conditions.requests)
    bounds = report.figures.goodput.slo_ms if report.figures.goodput else {}
    run = _LoadGen(scenario, sorted(records, key=lambda r: r.scheduled), bounds, load)
    write_text(folder / "mlperf_log_summary.txt", "\n".join(run.summary(report)) + "\n")
    write_text(folder / "mlperf_log_detail.txt", "\n".join(run.detail()) + "\n")


def queries_to_pass(late: int, percentile: float) -> int:
    """How many queries must be on time beside `late` ones, to be 99% sure that the percentile is within its bound.

    The smallest h with P(at most `late` of h + `late` are late) at most 1%, where one in 1 - percentile is late
    (early_stopping.cc; 64 queries in all at the 90th percentile with one late, 662 at the 99th).
    """
    from scipy.special import bdtr

    high = 1
    while bdtr(late, high + late, 1 - percentile) > 1 - CONFIDENCE:
        high *= 2
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        if bdtr(late, middle + late, 1 - percentile) <= 1 - CONFIDENCE:
            high = middle
        else:
            low = middle
    return high


class _LoadGen:
    """One run in LoadGen's terms; latencies are whole nanoseconds from the scheduled time."""

    def __init__(
        self, scenario: str, records: Sequence[RequestRecord], bounds: dict[str, float], load: Load
    ) -> None:
        self.scenario, self.load, self.bounds = scenario, load, bounds
        self.good = [r for r in records if r.ok]
        self.failed = len(records) - len(self.good)
        self.count = len(self.good)
        first = min(r.scheduled for r in records)
        self.scheduled = float(max(r.scheduled for r in records) - first)
        self.done = float(max(r.end for r in self.good) - first)
        self.latency = _nanoseconds(r.seconds for r in self.good)
        self.first_token = _nanoseconds(r.ttft for r in self.good)
        self.per_token = _nanoseconds(0.0 if math.isnan(r.tpot) else r.tpot for r in self.good)
        self.tokens = sum(r.output_tokens or 0 for r in self.good)
        self.target = TARGET[scenario]
        reached = self.done if scenario == "Offline" else self.scheduled
        self.long_enough = reached * 1000 >= MIN_DURATION_MS
        self.enough = self.count >= MIN_QUERIES
        self.stops = {name: self._stopping(name, values) for name, values in self._bounded().items()}
        self.in_bounds = scenario != "Server" or all(
            self._at(values, self.target) <= self._bound(name) for name, values in self._bounded().items()
        )
        self.valid = (
            self.long_enough
            and self.in_bounds
            and not self.failed
            and all(ok for ok, _ in self.stops.values())
        )

    def _bounded(self) -> dict[str, list[int]]:
        return {"TTFT": self.first_token, "TPOT": self.per_token}

    def _bound(self, name: str) -> float:
        return self.bounds.get(name.lower(), math.inf) * 1e6

    @staticmethod
    def _at(values: Sequence[int], share: float) -> int:
        return values[min(int(len(values) * share), len(values) - 1)]

    def _stopping(self, name: str, values: Sequence[int]) -> tuple[bool, str]:
        """LoadGen's early stopping: whether the queries are enough for the percentile, and what it says of it."""
        if self.scenario == "Offline":
            return True, ""
        late = 1
        if self.scenario == "Server":
            late = sum(v > self._bound(name) for v in values)
        needed = queries_to_pass(late, self.target) + late
        if self.count >= needed:
            return True, " * Run successful."
        return (
            False,
            f" * Only processed {self.count} queries.\n * Need to process at least {needed} queries.",
        )

    def rates(self) -> dict[str, float]:
        """Samples and tokens a second, as LoadGen counts them."""
        return {
            "scheduled": _ratio(self.count - 1, self.scheduled),
            "completed": _ratio(self.count - 1, self.done),
            "offline": _ratio(self.count, self.done),
            "tokens": _ratio(self.tokens, self.done),
        }

    def summary(self, report: LoadReport) -> list[str]:
        """`mlperf_log_summary.txt`."""
        rates, percent = self.rates(), f"{self.target * 100:.0f}th"
        lines = [
            "Written by `unshot bench load` in the form of MLPerf LoadGen's summary. This is not an MLPerf result.",
            "",
            *_heading("MLPerf Results Summary"),
            f"SUT name : {report.model} at {report.url}",
            f"Scenario : {self.scenario}",
            "Mode     : PerformanceOnly",
        ]
        if self.scenario == "SingleStream":
            lines += [
                f"{percent} percentile latency (ns) : {self._at(self.latency, self.target)}",
                f"{percent} first token percentile latency (ns) : {self._at(self.first_token, self.target)}",
            ]
        elif self.scenario == "Server":
            lines.append(f"Completed samples per second    : {rates['completed']:.2f}")
        else:
            lines += [f"Samples per second: {rates['offline']:g}", f"Tokens per second: {rates['tokens']:g}"]
        lines.append(f"Result is : {'VALID' if self.valid else 'INVALID'}")
        if self.scenario == "Server":
            lines.append(f"  Performance constraints satisfied : {_yes(self.in_bounds)}")
        lines += [
            f"  Min duration satisfied : {_yes(self.long_enough)}",
            f"  Min queries satisfied : {_yes(self.enough)}",
            f"  Early stopping satisfied: {_yes(all(ok for ok, _ in self.stops.values()))}",
        ]
        if self.failed:
            lines.append(f"  {self.failed} requests failed and are in no figure (LoadGen knows no failures)")
        if self.scenario != "Offline":
            for name, (_, words) in self.stops.items():
                lines += [f"{name} Early Stopping Result:", words]
        lines += ["", *_heading("Additional Stats")]
        if self.scenario == "SingleStream":
            mean = sum(self.latency) / self.count / 1e9
            lines += [
                f"QPS w/ loadgen overhead         : {_ratio(self.count - 1, self.scheduled):.2f}",
                f"QPS w/o loadgen overhead        : {_ratio(1, mean):.2f}",
                "",
            ]
        elif self.scenario == "Server":
            lines += [f"Scheduled samples per second : {rates['scheduled']:.2f}", ""]
        lines += _distribution("latency (ns)", "latency (ns)   ", self.latency)
        if self.scenario != "Offline":
            lines += ["", f"Completed tokens per second                 : {rates['tokens']:.2f}"]
            lines += _distribution("First Token latency (ns)", "first token latency (ns)  ", self.first_token)
            lines.append("")
            lines += _distribution("Time to Output Token (ns)", "time to output token (ns)  ", self.per_token)
        return [*lines, "", *_heading("Test Parameters Used"), *self._parameters(report)]

    def _parameters(self, report: LoadReport) -> list[str]:
        seed = report.conditions.seed
        values: dict[str, int | str] = {
            "samples_per_query": self.count if self.scenario == "Offline" else 1,
            "target_qps": f"{self.load.rate:g}",
            "ttft_latency (ns)": _or_zero(self._bound("TTFT")),
            "tpot_latency (ns)": _or_zero(self._bound("TPOT")),
            "max_async_queries": self.load.concurrency,
            "min_duration (ms)": MIN_DURATION_MS,
            "max_duration (ms)": 0,
            "min_query_count": MIN_QUERIES,
            "max_query_count": report.conditions.requests,
            "schedule_rng_seed": seed,
            "sample_index_rng_seed": seed,
        }
        return [f"{name} : {value}" for name, value in values.items()]

    def detail(self) -> list[str]:
        """`mlperf_log_detail.txt`: one `:::MLLOG` line a value."""
        rates = self.rates()
        values: dict[str, str | int | float | bool] = {
            "effective_scenario": self.scenario,
            "effective_test_mode": "PerformanceOnly",
            "effective_min_duration_ms": MIN_DURATION_MS,
            "effective_min_query_count": MIN_QUERIES,
            "result_validity": "VALID" if self.valid else "INVALID",
            "result_min_duration_met": self.long_enough,
            "result_min_queries_met": self.enough,
            "early_stopping_met": all(ok for ok, _ in self.stops.values()),
            "result_query_count": self.count,
        }
        if self.scenario == "Server":
            values["result_perf_constraints_met"] = self.in_bounds
            values["result_scheduled_samples_per_sec"] = rates["scheduled"]
            values["result_completed_samples_per_sec"] = rates["completed"]
            values["result_completed_tokens_per_second"] = rates["tokens"]
        elif self.scenario == "Offline":
            values["result_samples_per_second"] = rates["offline"]
            values["result_tokens_per_second"] = rates["tokens"]
        else:
            values["result_qps_with_loadgen_overhead"] = _ratio(self.count - 1, self.scheduled)
            values["result_qps_without_loadgen_overhead"] = _ratio(self.count * 1e9, sum(self.latency))
        values |= _named("result_{}_latency_ns", self.latency)
        if self.scenario != "Offline":
            values |= _named("result_first_token_{}_latency_ns", self.first_token)
            values |= _named("result_time_per_output_token_{}_ns", self.per_token)
        return [
            ":::MLLOG "
            + json.dumps(
                {
                    "key": key, "value": value, "time_ms": round(self.done * 1000, 3), "namespace": "unshot",
                    "event_type": "POINT_IN_TIME", "metadata": {"is_error": False, "is_warning": False},
                }
            )
            for key, value in values.items()
        ]  # fmt: skip


def _nanoseconds(values: Iterable[float]) -> list[int]:
    return sorted(round(v * 1e9) for v in values)


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0


def _or_zero(value: float) -> int:
    return round(value) if math.isfinite(value) else 0


def _yes(value: bool) -> str:
    return "Yes" if value else "NO"


def _heading(text: str) -> list[str]:
    return [RULE, text, RULE]


def _distribution(name: str, percentile_name: str, values: Sequence[int]) -> list[str]:
    facts = {"Min": values[0], "Max": values[-1], "Mean": sum(values) // len(values)}
    lines = [f"{k} {name}                : {v}" for k, v in facts.items()]
    return lines + [
        f"{p * 100:.2f} percentile {percentile_name}: {_LoadGen._at(values, p)}" for p in PERCENTILES
    ]


def _named(form: str, values: Sequence[int]) -> dict[str, int]:
    facts = {"min": values[0], "max": values[-1], "mean": sum(values) // len(values)}
    facts |= {f"{p * 100:.2f}_percentile": _LoadGen._at(values, p) for p in PERCENTILES}
    return {form.format(k): v for k, v in facts.items()}
