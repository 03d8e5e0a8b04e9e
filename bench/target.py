"""A server with the requests that go to it, driven by one client process, several, or clients on Ray."""

from __future__ import annotations

import asyncio
import math
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from threading import BrokenBarrierError
from typing import Any

import numpy as np

from bench.load import Driver, Run, drive, run_loop
from bench.opening import request_extra
from bench.records import Record, summarise
from bench.remote import WORDS, Count, defeat_cache, make_record, open_tokenizer
from bench.resources import Monitor, energy_per_request
from bench.schedule import Load
from unshot.case import Slo
from unshot.console import Output
from unshot.contracts.manifest import describe_file
from unshot.data.prompts import load_prompt
from unshot.data.rows import Message, read_examples
from unshot.engines.http import parse_url, read_key
from unshot.engines.openai import CHAT, Api
from unshot.errors import InputError, OutsideError

RAMP_PER_STREAM = 0.002
# Seconds until client processes must be ready to send.
START_LIMIT = 60
_shared: tuple[Any, ...] = ()


@dataclass
class Outcome:
    """One load measured. From clients on Ray, `records` are a sample of the requests and the figures are of all."""

    figures: dict[str, Any]
    client: dict[str, Any]
    records: list[Record]
    interrupted: bool
    resources: dict[str, Any] | None = None


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
        prompt = load_prompt(options["prompt"], system=options["system"])
        generator = random.Random(options["seed"])
        if options["data"]:
            rows = read_examples(options["data"], answers=False)
            self._messages = [prompt.request(row) for row in rows]
        else:
            low, high = parse_span(options["prompt_words"], "--prompt-words")
            self._messages = [
                prompt.messages(" ".join(generator.choices(WORDS, k=generator.randint(low, high))))
                for _ in range(256)
            ]
        self._lengths = parse_span(options["max_tokens"], "--max-tokens")

    def bodies(self, count: int) -> list[bytes]:
        """`count` requests without their headers: the rows in turn, lengths drawn by the seed."""
        result = []
        lengths = random.Random(self.options["seed"])
        for number in range(count):
            messages: Sequence[Message] = self._messages[number % len(self._messages)]
            if self.options["cache"] == "off":
                messages = defeat_cache(messages)
            if self.api.kind == CHAT:
                body: Any = messages
            else:
                body = self._render(messages) if self._render else "\n\n".join(m["content"] for m in messages)
            result.append(self.api.body(body, lengths.randint(*self._lengths)))
        return result

    def measure(self, load: Load, count: int, out: Output, *, processes: int = 1, ray: int = 0) -> Outcome:
        """Drive the load and sum it up."""
        if ray:
            return self._on_ray(load, count, ray, out)
        with Monitor({"the client": os.getpid()}) as monitor:
            run, records = self.run(load, count, processes=processes)
        facts = summarise(records, run.seconds, self.slo)
        facts["energy"] = energy_per_request(monitor, records, "candidate", load.text, run.began)
        return Outcome(facts, run.client(), records, run.interrupted, monitor.facts())

    def run(self, load: Load, count: int, *, processes: int = 1) -> tuple[Run, list[Record]]:
        """The exchanges and what they hold."""
        payloads = [self.api.wrap(body) for body in self.bodies(count)]
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
        return run, records

    def _on_ray(self, load: Load, count: int, workers: int, out: Output) -> Outcome:
        from bench.cluster import deal, run_ray

        shares = deal(
            self.api,
            self.options["api_key_env"],
            self.bodies(count),
            load,
            workers,
            timeout=self.options["timeout"],
            seed=self.options["seed"],
            tokenizer=self.options["tokenizer"],
            slo=self.slo,
        )
        tally, client, records, interrupted = run_ray(shares, self.options["ray_address"], out)
        return Outcome({**tally.figures(), "energy": None}, client, records, interrupted)


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
    # One clock for all: perf_counter is the machine's monotonic clock on Linux. The start is set when all are ready.
    context = get_context("spawn")
    ready, go, start = context.Barrier(processes + 1), context.Event(), context.Value("d")
    parts = [list(payloads[i::processes]) for i in range(processes)]
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=_join, initargs=(ready, go, start)
    ) as pool:
        futures = [
            pool.submit(_child, api, part, one, timeout) for part, one in zip(parts, loads, strict=True)
        ]
        try:
            ready.wait(timeout=START_LIMIT)
        except BrokenBarrierError:
            raise OutsideError(
                f"the {processes} client processes were not ready in {START_LIMIT} s"
            ) from None
        began = start.value = time.perf_counter() + 0.1
        go.set()
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
        dns_seconds=max((r.dns_seconds for r in runs if r.dns_seconds is not None), default=None),
    )


def _join(*shared: Any) -> None:
    """What the processes share to begin together: a barrier, an event and the start time."""
    global _shared
    _shared = shared


def _child(api: Api, payloads: list[bytes], load: Load, timeout: float) -> Run:
    ready, go, start = _shared

    async def start_time() -> float:
        await asyncio.to_thread(ready.wait, START_LIMIT)
        await asyncio.to_thread(go.wait, START_LIMIT)
        return float(start.value)

    driver = Driver(
        api.address,
        payloads,
        load,
        timeout=timeout,
        warm_connections=min(load.concurrency or 64, len(payloads)),
        start_time=start_time,
    )
    run = run_loop(driver.run())
    for exchange in run.exchanges:
        exchange.done = _nothing
    return run


def _nothing(exchange: Any) -> None:
    """Stands in for the callback, which cannot travel between processes."""


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


def parse_span(text: str, flag: str) -> tuple[int, int]:
    """`N` or `LOW-HIGH`, whole numbers from 1. Raises `InputError`."""
    low, _, high = text.partition("-")
    try:
        span = int(low), int(high or low)
    except ValueError:
        span = (0, 0)
    if not 1 <= span[0] <= span[1]:
        raise InputError(f"{flag} is `{text}`; give N or LOW-HIGH, at least 1")
    return span
