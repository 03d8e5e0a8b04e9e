"""One server under one load, or under a rising one: `unshot bench load` and `unshot bench sweep`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import mlperf
from bench.records import Record
from bench.schedule import Load, parse_load
from bench.target import Target
from unshot.console import Output, dumps, jsonable
from unshot.contracts.manifest import Manifest, hardware, staged
from unshot.data.files import write_text
from unshot.data.rows import write_jsonl
from unshot.errors import InputError

# The automatic sweep ends where doubling the streams brings less than this.
WORTH = 0.05


def load_run(options: dict[str, Any], out: Output) -> dict[str, Any]:
    """Measure one load; writes and returns the report. Raises `InputError`, `OutsideError`."""
    wanted = parse_load(options["load"])
    target = Target(options)
    if "mlperf" in options["formats"]:
        mlperf.scenario_of(wanted, options["requests"])
    with staged(options["final"], overwrite=options["overwrite"]) as work:
        manifest = Manifest("bench", config=jsonable(options), seeds={"seed": options["seed"]})
        manifest.inputs = target.inputs
        if options["warm_up"]:
            target.run(Load("closed", concurrency=1), options["warm_up"])
        out.log(f"{options['url']}: {options['requests']} requests, {wanted.text}")
        with manifest.timed("load"):
            got = target.measure(
                wanted, options["requests"], out, processes=options["processes"], ray=options["ray"]
            )
        report = {
            "schema": 1,
            "kind": "load",
            "url": options["url"],
            "model": options["model"],
            "load": wanted.text,
            "partial": got.interrupted,
            "figures": got.figures,
            "failure": _failure(got.records),
            "client": got.client,
            "resources": got.resources,
            "conditions": _conditions(options),
        }
        _write(work, report, got.records)
        if "mlperf" in options["formats"] and got.figures["answered"]:
            mlperf.write_logs(work, report, got.records, wanted)
        manifest.finish(work)
    return report


def sweep_run(options: dict[str, Any], out: Output) -> dict[str, Any]:
    """Measure closed loops of rising concurrency; writes and returns the report with the knee."""
    target = Target(options)
    points: list[dict[str, Any]] = []
    steps = _steps(options["concurrencies"], options["most"], points)
    with staged(options["final"], overwrite=options["overwrite"]) as work:
        manifest = Manifest("bench", config=jsonable(options), seeds={"seed": options["seed"]})
        manifest.inputs = target.inputs
        target.run(Load("closed", concurrency=1), 2)
        everything: list[Record] = []
        interrupted = False
        for step in steps:
            load = Load("closed", concurrency=step, text=f"closed:{step}")
            with manifest.timed(load.text):
                got = target.measure(load, max(options["requests"], 3 * step), out)
            everything += got.records
            facts = got.figures
            points.append(
                {"concurrency": step, "figures": facts, "client": got.client, "resources": got.resources}
            )
            out.log(
                f"concurrency {step}: {facts['requests_per_second'] or 0:.2f} requests/s, "
                f"e2e p50 {_value(facts['e2e_ms'], 'p50'):.0f} ms"
            )
            interrupted = got.interrupted
            if interrupted or not facts["answered"]:
                break
        report = {
            "schema": 1,
            "kind": "sweep",
            "url": options["url"],
            "model": options["model"],
            "partial": interrupted,
            "points": points,
            "knee": knee(points),
            "failure": _failure(everything),
            "conditions": _conditions(options),
        }
        _write(work, report, everything)
        manifest.finish(work)
    return report


def _steps(text: str, most: int, points: Sequence[dict[str, Any]]) -> Iterator[int]:
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


def _doubling(most: int, points: Sequence[dict[str, Any]]) -> Iterator[int]:
    step = 1
    while step <= most:
        yield step
        rates = [p["figures"]["requests_per_second"] or 0.0 for p in points]
        # Two steps in a row that bring nothing: one alone may be chance.
        if len(rates) > 3 and max(rates[-2:]) < (1 + WORTH) * max(rates[:-2]):
            return
        step *= 2


def knee(points: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The step of greatest power, throughput / mean latency (Kleinrock 1979), and the greatest throughput.

    None below three steps. Past the knee more load brings latency and little throughput.
    """
    usable = [p for p in points if p["figures"]["requests_per_second"] and p["figures"]["e2e_ms"]["count"]]
    if len(usable) < 3:
        return None
    best = max(usable, key=lambda p: p["figures"]["requests_per_second"] / p["figures"]["e2e_ms"]["mean"])
    most = max(p["figures"]["requests_per_second"] for p in usable)
    return {
        "concurrency": best["concurrency"],
        "requests_per_second": best["figures"]["requests_per_second"],
        "e2e_p50_ms": best["figures"]["e2e_ms"]["p50"]["value"],
        "most_requests_per_second": most,
        "share_of_most": best["figures"]["requests_per_second"] / most,
        "saturated": best is not usable[-1],
    }


def _failure(records: Sequence[Record]) -> str | None:
    """Why not one request was answered, by the first of the reasons; None where one was."""
    if not records or any(r.ok for r in records):
        return None
    return f"no request was answered ({min(f'{r.error}: {r.detail}' for r in records)[:160]})"


def _conditions(options: dict[str, Any]) -> dict[str, Any]:
    kept = ("requests", "max_tokens", "cache", "data", "prompt_words", "warm_up", "timeout", "seed")
    return {
        **{k: options.get(k) for k in kept},
        "hardware": hardware(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _write(work: Path, report: dict[str, Any], records: Sequence[Record]) -> None:
    from bench.single_page import render

    write_jsonl(work / "records.jsonl", [jsonable(r) for r in records])
    write_text(work / "report.json", dumps(report) + "\n")
    write_text(work / "report.html", render(report, records))


def _value(facts: dict[str, Any], name: str) -> float:
    return facts[name]["value"] if facts.get("count") else math.nan
