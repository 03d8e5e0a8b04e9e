"""One server under one load, or under a rising one: `unshot bench load` and `unshot bench sweep`."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bench.http import parse_url
from bench.load import Driver, Run, drive
from bench.openai import CHAT, Api
from bench.opening import request_extra
from bench.records import Record, summarise
from bench.remote import WORDS, Count, defeat_cache, make_record, open_tokenizer, read_key
from bench.schedule import Load, parse_load
from bench.systems import request_messages
from unshot.case import Slo
from unshot.console import Output, dumps, jsonable
from unshot.data import Message, read_examples, text_or_file, write_jsonl
from unshot.errors import InputError, OutsideError
from unshot.manifest import Manifest, describe_file, hardware, staged, write_text
from unshot.prompts import load_prompt

RAMP_PER_STREAM = 0.002


def load_run(options: dict[str, Any], out: Output) -> dict[str, Any]:
    """Measure one load; writes and returns the report. Raises `InputError`, `OutsideError`."""
    wanted = parse_load(options["load"])
    target = Target(options)
    with staged(options["final"], overwrite=options["overwrite"]) as work:
        manifest = Manifest("bench", config=jsonable(options), seeds={"seed": options["seed"]})
        manifest.inputs = target.inputs
        if options["warm_up"]:
            target.run(Load("closed", concurrency=1), options["warm_up"])
        out.log(f"{options['url']}: {options['requests']} requests, {wanted.text}")
        with manifest.timed("load"):
            run, records = target.run(wanted, options["requests"], processes=options["processes"])
        report = {
            "schema": 1,
            "kind": "load",
            "url": options["url"],
            "model": options["model"],
            "load": wanted.text,
            "partial": run.interrupted,
            "figures": figures(records, run.seconds, target.slo),
            "client": run.client(),
            "conditions": _conditions(options),
        }
        _write(work, report, records)
        manifest.write(work)
    return report


def sweep_run(options: dict[str, Any], out: Output) -> dict[str, Any]:
    """Measure closed loops of rising concurrency; writes and returns the report with the knee."""
    try:
        steps = sorted({int(part) for part in options["concurrencies"].split(",")})
    except ValueError:
        raise InputError(
            f"--concurrencies is `{options['concurrencies']}`; give whole numbers, e.g. 1,2,4,8"
        ) from None
    if not steps or steps[0] < 1:
        raise InputError("--concurrencies: each step must be at least 1")
    target = Target(options)
    with staged(options["final"], overwrite=options["overwrite"]) as work:
        manifest = Manifest("bench", config=jsonable(options), seeds={"seed": options["seed"]})
        manifest.inputs = target.inputs
        target.run(Load("closed", concurrency=1), 2)
        points, everything = [], []
        interrupted = False
        for step in steps:
            with manifest.timed(f"closed:{step}"):
                run, records = target.run(
                    Load("closed", concurrency=step, text=f"closed:{step}"),
                    max(options["requests"], 3 * step),
                )
            everything += records
            facts = figures(records, run.seconds, target.slo)
            points.append({"concurrency": step, "figures": facts, "client": run.client()})
            out.log(
                f"concurrency {step}: {facts['requests_per_second'] or 0:.2f} requests/s, "
                f"e2e p50 {_value(facts['e2e_ms'], 'p50'):.0f} ms"
            )
            interrupted = run.interrupted
            if interrupted:
                break
        report = {
            "schema": 1,
            "kind": "sweep",
            "url": options["url"],
            "model": options["model"],
            "partial": interrupted,
            "points": points,
            "knee": knee(points),
            "conditions": _conditions(options),
        }
        _write(work, report, everything)
        manifest.write(work)
    return report


class Target:
    """The server with the requests that go to it."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.api = Api(
            parse_url(options["url"]),
            options["model"],
            options["api"],
            read_key(options["api_key_env"]),
            request_extra(options["request_extra"]),
        )
        self.count: Count | None = None
        self._render = None
        if options["tokenizer"]:
            self.count, self._render = open_tokenizer(options["tokenizer"])
        self.slo = parse_slo(options["slo"])
        self.inputs = [describe_file(p) for p in (options["data"], options["prompt"]) if p and p.is_file()]
        prompt = load_prompt(options["prompt"], system=text_or_file(options["system"]))
        generator = random.Random(options["seed"])
        if options["data"]:
            rows = read_examples(options["data"], answers=False)
            self._messages = [request_messages(prompt, row) for row in rows]
        else:
            low, high = _span(options["prompt_words"])
            self._messages = [
                prompt.messages(" ".join(generator.choices(WORDS, k=generator.randint(low, high))))
                for _ in range(256)
            ]

    def payloads(self, count: int) -> list[bytes]:
        """`count` requests, the rows in turn."""
        result = []
        for number in range(count):
            messages: Sequence[Message] = self._messages[number % len(self._messages)]
            if self.options["cache"] == "off":
                messages = defeat_cache(messages)
            if self.api.kind == CHAT:
                body: Any = messages
            else:
                body = self._render(messages) if self._render else "\n\n".join(m["content"] for m in messages)
            result.append(self.api.request(body, self.options["max_tokens"]))
        return result

    def run(self, load: Load, count: int, *, processes: int = 1) -> tuple[Run, list[Record]]:
        """Drive the load; raises `OutsideError` where not one request was answered."""
        payloads = self.payloads(count)
        timeout, seed = self.options["timeout"], self.options["seed"]
        streams = load.concurrency or min(64, count)
        if processes > 1:
            run = run_processes(self.api, payloads, load, processes, timeout=timeout, seed=seed)
        else:
            run = drive(
                Driver(
                    self.api.address,
                    payloads,
                    load,
                    timeout=timeout,
                    seed=seed,
                    warm_connections=min(streams, count),
                    ramp=0.0 if streams < 8 else RAMP_PER_STREAM * streams,
                )
            )
        records = [
            make_record(
                e,
                self.api,
                side="candidate",
                row=i,
                mode=load.text,
                block=0,
                clock=run.began,
                count=self.count,
            )
            for i, e in enumerate(run.exchanges)
        ]
        if records and not any(r.ok for r in records):
            kinds = sorted({f"{r.error}: {r.detail}" for r in records})
            raise OutsideError(f"{self.options['url']}: no request was answered ({kinds[0][:160]})")
        return run, records


def run_processes(
    api: Api, payloads: Sequence[bytes], load: Load, processes: int, *, timeout: float, seed: int
) -> Run:
    """The same load from several client processes: the schedule is dealt out in turn, the results put together.

    Exchanges are merged whole, so every percentile is exact and means what it means for one process.
    """
    if load.open:
        arrivals = load.arrivals(len(payloads), seed=seed)
        loads = [Load("trace", times=tuple(arrivals[i::processes].tolist())) for i in range(processes)]
        if load.kind == "trace":
            payloads = payloads[: len(arrivals)]
    else:
        shares = [
            load.concurrency // processes + (i < load.concurrency % processes) for i in range(processes)
        ]
        loads = [Load("closed", concurrency=share) for share in shares if share]
        processes = len(loads)
    # One clock for all: perf_counter is the machine's monotonic clock on Linux.
    began = time.perf_counter() + 1.0 + 0.2 * processes
    parts = [list(payloads[i::processes]) for i in range(processes)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [
            pool.submit(_child, api, part, one, timeout, began)
            for part, one in zip(parts, loads, strict=True)
        ]
        runs = [f.result() for f in futures]
    exchanges = sorted((e for r in runs for e in r.exchanges), key=lambda e: e.scheduled)
    return Run(
        exchanges=exchanges,
        began=began,
        seconds=max((e.ended for e in exchanges), default=began) - began,
        lateness=np.concatenate([r.lateness for r in runs]),
        lag=np.concatenate([r.lag for r in runs]),
        cpu_seconds=sum(r.cpu_seconds for r in runs),
        connections=sum(r.connections for r in runs),
        interrupted=any(r.interrupted for r in runs),
        unsent=sum(r.unsent for r in runs),
    )


def _child(api: Api, payloads: list[bytes], load: Load, timeout: float, began: float) -> Run:
    streams = load.concurrency or 64
    driver = Driver(
        api.address,
        payloads,
        load,
        timeout=timeout,
        warm_connections=min(streams, len(payloads)),
        began=began,
    )
    run = asyncio.run(driver.run())
    for exchange in run.exchanges:
        exchange.done = _nothing
    return run


def _nothing(exchange: Any) -> None:
    """Stands in for the callback, which cannot travel between processes."""


def figures(records: Sequence[Record], seconds: float, slo: Slo) -> dict[str, Any]:
    """`summarise` with goodput: requests that met every bound of the SLO, per second."""
    facts = summarise(records, seconds)
    server = [r.extra["server_tokens"] - r.output_tokens for r in records if "server_tokens" in r.extra]
    facts["server_minus_our_tokens"] = (
        {"mean": float(np.mean(server)), "differ": int(np.count_nonzero(server))} if server else None
    )
    every = {"ttft": slo.ttft_ms, "tpot": slo.tpot_ms, "e2e": slo.e2e_ms}
    bounds = {k: v for k, v in every.items() if v is not None}
    if bounds:
        met = [r for r in records if r.ok and all(_within(getattr(r, k), v) for k, v in bounds.items())]
        facts["goodput"] = {
            "slo_ms": bounds,
            "requests_per_second": len(met) / seconds if seconds > 0 else None,
            "share": len(met) / len(records) if records else None,
        }
    return facts


def _within(seconds: float, bound_ms: float) -> bool:
    # A one-token answer has no TPOT and cannot miss it.
    return math.isnan(seconds) or seconds * 1000 <= bound_ms


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


def parse_slo(text: str | None) -> Slo:
    """`ttft=200,tpot=50,e2e=2000` in milliseconds. Raises `InputError`."""
    values: dict[str, float] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, _, number = part.partition("=")
        key = f"{name.strip()}_ms"
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if key not in ("ttft_ms", "tpot_ms", "e2e_ms") or not 0 < value < math.inf:
            raise InputError(f"--slo `{text}`: give e.g. ttft=200,tpot=50,e2e=2000 (milliseconds above 0)")
        values[key] = value
    return Slo(**values)


def _span(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    try:
        span = int(low), int(high or low)
    except ValueError:
        span = (0, 0)
    if not 1 <= span[0] <= span[1]:
        raise InputError(f"--prompt-words is `{text}`; give N or LOW-HIGH, at least 1")
    return span


def _conditions(options: dict[str, Any]) -> dict[str, Any]:
    kept = ("requests", "max_tokens", "cache", "data", "prompt_words", "timeout", "seed")
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
