"""The systems under test: an engine in this process, a server at a URL, or one that is started for the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from bench.answer import STOPPED, first_arrival, read_answer, tokens_after_first
from bench.counters import Counters, read_counters
from bench.load import Driver, LoadResult, drive
from bench.records import RequestRecord
from bench.schedule import Load
from bench.traffic import (
    Fresh,
    ServerOptions,
    digest,
    fresh_input,
    meet,
    open_tokenizer,
    prompt_of,
    uncached,
)
from unshot.console import Output
from unshot.contracts.figures import Client
from unshot.contracts.report import SideName, SystemFacts
from unshot.data.prompts import Prompt
from unshot.data.rows import Example, Message
from unshot.engines import Engine, open_engine, parse_spec
from unshot.engines.http import Exchange
from unshot.engines.openai import Api
from unshot.engines.server import SERVERS, LocalServer, free_port
from unshot.errors import InputError, nearest
from unshot.machine import usable_cores
from unshot.text.counters import TemplateCounter
from unshot.text.repair import answer_begin

CACHE_ON, CACHE_OFF = "cache on", "cache off"
MODES = (CACHE_ON, CACHE_OFF)
Progress = Callable[[RequestRecord], None]


@dataclass(frozen=True)
class Item:
    """One request to make: its number in the run, the row, and words that make it a fresh one (None: as it is)."""

    request: int
    row: int
    example: Example
    words: str | None = None

    def messages(self, prompt: Prompt, mode: str, fresh: Fresh) -> list[Message]:
        """The request. Without cache, words unlike those before stand in front of everything."""
        messages = prompt.request(self.example)
        if mode == CACHE_OFF:
            return uncached(messages, fresh.words())
        return messages if self.words is None else fresh_input(messages, self.words)


@dataclass
class BlockResult:
    """A block's records, and what the client says of itself (None: there is no client, the engine is in process)."""

    records: list[RequestRecord]
    client: Client | None = None


class System(Protocol):
    """A system that the A/B run can measure."""

    side: SideName
    prompt: Prompt
    max_tokens: int

    @property
    def concurrency(self) -> int:
        """Requests at once."""

    @property
    def pid(self) -> int | None:
        """The process that runs it, where it is one of its own on this machine."""

    @property
    def local(self) -> bool:
        """Whether it runs on this machine, whose price is known."""

    def reset(self) -> None:
        """Forget what can be forgotten of earlier requests."""

    def counters(self) -> Counters:
        """What it has counted itself so far; empty where it does not."""

    def close(self) -> None:
        """Free everything."""

    def facts(self) -> SystemFacts:
        """What the report says about it."""

    def run_block(
        self, items: Sequence[Item], *, mode: str, block: int, clock: float, progress: Progress | None = None
    ) -> BlockResult:
        """Answer the items and time them; `clock` is the run's start on `time.perf_counter()`."""


@dataclass
class EngineSystem:
    """An engine in this process with the prompt that goes with it, one request at a time."""

    side: SideName
    engine: Engine
    prompt: Prompt
    max_tokens: int
    concurrency: int = 1
    pid: int | None = None
    local: bool = True
    fresh: Fresh = field(default_factory=Fresh)

    def reset(self) -> None:
        """Forget the prefix cache."""
        self.engine.reset()

    def counters(self) -> Counters:
        """An engine counts nothing."""
        return {}

    def close(self) -> None:
        """Free the model."""
        self.engine.close()

    def run_block(
        self, items: Sequence[Item], *, mode: str, block: int, clock: float, progress: Progress | None = None
    ) -> BlockResult:
        """Answer the items one after the other."""
        records = []
        for item in items:
            record = self.answer(item, mode=mode, block=block, clock=clock)
            records.append(record)
            if progress:
                progress(record)
        return BlockResult(records)

    def answer(self, item: Item, *, mode: str, block: int, clock: float) -> RequestRecord:
        """Answer one row and time it, from the messages to the last token; `clock` is the run's start."""
        # The cache is emptied for each request: no words are needed to get past it.
        messages = self.prompt.request(item.example)
        if item.words is not None and mode == CACHE_ON:
            messages = fresh_input(messages, item.words)
        start = time.perf_counter()
        ids = self.engine.prompt_ids(messages)
        answer = self.engine.generate(ids, max_tokens=self.max_tokens, prefix_cache=mode == CACHE_ON)
        times = [t - start for t in answer.token_times]
        begin = answer_begin(answer.text)
        whole = len(answer.ids) - (answer.finish == "stop")
        # The ids whose text ends before the answer begins.
        texts = (len(self.engine.detokenize(answer.ids[: n + 1])) for n in range(whole)) if begin else ()
        thought = sum(length <= begin for length in texts)
        return RequestRecord(
            side=self.side,
            mode=mode,
            row=item.row,
            block=block,
            request=item.request,
            scheduled=start - clock,
            start=start - clock,
            token_times=times,
            first_answer=times[thought] if thought < len(times) else None,
            e2e=times[-1],
            elapsed=times[-1],
            prompt_tokens=answer.prompt_tokens,
            output_tokens=len(answer.ids),
            # Each id has its time here, the stop token's too.
            timed_tokens=len(answer.ids),
            cached_tokens=answer.cached,
            reasoning_tokens=thought or None,
            text=answer.text[begin:],
            finish=answer.finish,
        )

    def facts(self) -> SystemFacts:
        """What the report says about this side."""
        return SystemFacts(
            **self.engine.facts().plain(),
            spec=self.engine.spec,
            examples_in_prompt=len(self.prompt.examples),
            system_prompt=bool(self.prompt.system),
            prompt=digest(self.prompt),
        )


@dataclass
class ServerSystem:
    """An OpenAI-compatible server with the prompt that goes with it, driven in closed loop at a concurrency.

    `counter` counts tokens with the model's own tokenizer, answer and prompt, template included; without it the
    server's `usage` is taken, and without that the counts are not known.
    """

    side: SideName
    api: Api
    prompt: Prompt
    max_tokens: int
    concurrency: int = 1
    timeout: float = 120.0
    counter: TemplateCounter | None = None
    found: bool = False
    clients: list[Client] = field(default_factory=list)
    fresh: Fresh = field(default_factory=Fresh)
    pid: int | None = None
    local: bool = False

    def facts(self) -> SystemFacts:
        """What the report says about this side."""
        by = (
            f"{self.counter.name}{', found by the served name' if self.found else ''}"
            if self.counter
            else "server"
        )
        return SystemFacts(
            engine="server",
            library=f"OpenAI-compatible, {self.api.kind}",
            model=self.api.model,
            device="of the server",
            spec=self.api.address.base,
            concurrency=self.concurrency,
            examples_in_prompt=len(self.prompt.examples),
            system_prompt=bool(self.prompt.system),
            prompt=digest(self.prompt),
            tokens_counted_by=by,
            proxy=self.api.address.way,
            client=client_facts(self.clients),
        )

    def reset(self) -> None:
        """A server's cache cannot be emptied from here; cold requests get past it by words of their own."""

    def counters(self) -> Counters:
        """Its /metrics."""
        return read_counters(self.api.address)

    def close(self) -> None:
        """Nothing is held between blocks."""

    def run_block(
        self, items: Sequence[Item], *, mode: str, block: int, clock: float, progress: Progress | None = None
    ) -> BlockResult:
        """Send the items at the system's concurrency."""
        records: dict[int, RequestRecord] = {}
        messages = [item.messages(self.prompt, mode, self.fresh) for item in items]

        def done(number: int, exchange: Exchange) -> None:
            item = items[number]
            record = make_record(
                exchange, self.api, side=self.side, row=item.row, mode=mode, block=block, clock=clock,
                counter=self.counter, messages=messages[number], limit=self.api.limit(self.max_tokens),
            )  # fmt: skip
            record.request = item.request
            records[number] = record
            if progress:
                progress(record)

        run = self._drive(messages, done)
        while (other := first_adapted(self.api, list(records.values()))) is not None:
            self.api = other
            run = self._drive(messages, done)
        client = run.client()
        self.clients.append(client)
        if run.interrupted:
            raise KeyboardInterrupt
        return BlockResult([records[i] for i in sorted(records)], client)

    def _drive(self, requests: Sequence[list[Message]], done: Callable[[int, Exchange], None]) -> LoadResult:
        driver = Driver(
            self.api.address,
            [self.api.request(prompt_of(self.api, m, self.counter), self.max_tokens) for m in requests],
            Load("closed", concurrency=self.concurrency),
            timeout=self.timeout,
            warm_connections=min(self.concurrency, len(requests)),
        )
        return drive(driver, done)


class LocalServerSystem(ServerSystem):
    """A server that was started for the run and ends with it; `engine` is its model's file in this process."""

    server: LocalServer
    engine: Engine | None = None
    spec: str = ""
    library: str = ""
    cores: int = 1

    def facts(self) -> SystemFacts:
        facts = super().facts()
        own = self.engine.facts().plain() if self.engine else {"library": self.library}
        command = [*map(str, self.server.command)]
        return SystemFacts(
            **{**facts.plain(), **own, "spec": self.spec, "threads": self.cores, "command": command}
        )

    def close(self) -> None:
        self.server.end()
        if self.engine is not None:
            self.engine.close()


def make_record(
    exchange: Exchange,
    api: Api,
    *,
    side: SideName,
    row: int,
    mode: str,
    block: int,
    clock: float,
    counter: TemplateCounter | None = None,
    messages: Sequence[Message] | None = None,
    limit: int | None = None,
) -> RequestRecord:
    """Read an exchange; all latencies count from its scheduled time. `limit` is the longest answer asked for, tokens.

    A server's stop token is in its count and has no arrival: `timed_tokens` is without it, `output_tokens` with it.
    """
    answer = read_answer(exchange, api.kind)
    start, times = exchange.scheduled, answer.times
    arrived, output, first = answer.arrived_tokens, answer.output_tokens, None
    reasoning = answer.reasoning_tokens
    if counter is not None and times:
        thought = counter.text(answer.text_of("reasoning"))
        arrived = max(
            thought + counter.text(answer.text_of("answer")) + counter.text(answer.text_of("tool")), 1
        )
        first = counter.text(first_arrival(answer.pieces))
        # Reasoning that the server counts and keeps to itself is generated and paid for too.
        hidden = 0 if thought else reasoning or 0
        # Servers may call an answer stopped that reached its limit: there was no room for a stop token.
        stopped = answer.finish in STOPPED and (limit is None or arrived < limit)
        output = arrived + stopped + hidden
        reasoning = thought or reasoning
    prompt, least = answer.prompt_tokens, None
    if messages is not None:
        least = counter.prompt(messages) if counter else sum(len(m["content"].split()) for m in messages)
    if prompt is None and counter is not None:
        prompt = least
    last = max(times[-1], answer.ended) if times else exchange.ended
    opened = exchange.opened_connection and exchange.started
    return RequestRecord(
        side=side,
        mode=mode,
        row=row,
        block=block,
        scheduled=start - clock,
        start=(exchange.started or start) - clock,
        # What came all at once is one arrival.
        token_times=[
            t - start for t in (times if answer.streamed and times[-1:] > times[:1] else times[-1:])
        ],
        first_answer=None if answer.first_answer is None else answer.first_answer - start,
        e2e=last - start if answer.error is None else None,
        elapsed=exchange.ended - start,
        connect=exchange.started - exchange.handed if opened else None,
        prompt_tokens=prompt,
        least_prompt=least,
        model=answer.model,
        most_tokens=limit,
        least_tokens=limit if api.extra.get("ignore_eos") else None,
        output_tokens=output,
        timed_tokens=tokens_after_first(answer, arrived, first) if answer.streamed else None,
        cached_tokens=answer.cached_tokens,
        reasoning_tokens=reasoning,
        server_tokens=answer.output_tokens if counter is not None else None,
        text=answer.text,
        finish=answer.finish,
        error=answer.error,
        detail=answer.detail,
        retry_after=exchange.headers.get("retry-after"),
        golden=answer.golden if isinstance(answer.golden, dict) else None,
    )


def first_adapted(api: Api, records: Sequence[RequestRecord]) -> Api | None:
    """The API without the field that a server refused in one of these answers; None if it refused none."""
    return next((other for r in records if (other := api.adapted(r.error, r.detail)) is not None), None)


def client_facts(clients: Sequence[Client]) -> Client | None:
    """The client's own state over the blocks that count: invalid where one was; None without blocks."""
    if not clients:
        return None
    bad = [c for c in clients if not c.valid]
    # The worst block stands for the others.
    worst = max(bad, key=lambda c: c.loop_lag.p99_ms if c.loop_lag else 0.0, default=None)
    reasons = [f"{len(bad)} of {len(clients)} blocks: {'; '.join(worst.reasons)}"] if worst else []
    return Client(
        valid=not bad,
        reasons=reasons,
        cpu_seconds=sum(c.cpu_seconds for c in clients),
        connections=sum(c.connections for c in clients),
    )


def open_system(
    side: SideName,
    spec: str,
    prompt: Prompt,
    *,
    max_tokens: int,
    threads: int | None,
    concurrency: int,
    options: ServerOptions,
    server_args: Sequence[str],
    out: Output,
) -> System:
    """Open `http(s)://...`, `serve:KIND:PATH`, or an engine. Raises `InputError` or `OutsideError`."""
    if spec.startswith(("http://", "https://")):
        api, counter = meet(options.open(spec), options.tokenizer)
        return ServerSystem(
            side, api, prompt, max_tokens, concurrency, options.timeout, counter, options.tokenizer is None
        )
    if spec.startswith("serve:"):
        return _serve(
            side, spec, prompt, max_tokens=max_tokens, threads=threads, concurrency=concurrency, options=options,
            server_args=server_args, out=out,
        )  # fmt: skip
    parse_spec(spec)
    if concurrency > 1:
        raise InputError(
            f"--concurrency {concurrency}: {spec} runs in this process, one request at a time; "
            "use serve:gguf:PATH or a server's URL"
        )
    return EngineSystem(side, open_engine(spec, threads=threads), prompt, max_tokens)


def _serve(
    side: SideName,
    spec: str,
    prompt: Prompt,
    *,
    max_tokens: int,
    threads: int | None,
    concurrency: int,
    options: ServerOptions,
    server_args: Sequence[str],
    out: Output,
) -> LocalServerSystem:
    """Start the server of `serve:KIND:PATH` and wait until it answers."""
    kind, _, target = spec.removeprefix("serve:").partition(":")
    if kind not in SERVERS:
        raise InputError(
            f"{spec}: no server of the kind `{kind}` can be started; {nearest(kind, SERVERS)} "
            "(give a URL for other servers)"
        )
    if not target:
        raise InputError(f"`{spec}` names no model; give serve:{SERVERS[kind].form}")
    cores = threads or usable_cores()
    path, port = Path(target).expanduser(), free_port()
    # Also checks the file before a server dies of it; and counts tokens with the model's own tokenizer.
    engine = open_engine(f"gguf:{target}", threads=threads) if SERVERS[kind].gguf else None
    if engine is None and not path.is_dir():
        raise InputError(
            f"{spec}: {path} is no directory; give the model's directory (config.json, *.safetensors)"
        )
    try:
        command = [*SERVERS[kind].command(path, port, cores, concurrency), *server_args]
        out.log(f"{side}: starting {Path(command[0]).name} {' '.join(command[1:4])} on port {port}")
        server = LocalServer.start(spec, command, port)
    except BaseException:
        if engine is not None:
            engine.close()
        raise
    try:
        server.wait(limit=SERVERS[kind].start_limit)
        api = replace(options, api="chat", key_env=None, proxy=None).open(server.address.base)
        # llama-cpp-python's server penalises repetition by default, the labels of the prompt among it.
        extra = {**SERVERS[kind].extra, **options.extra}
        api = replace(api, model=server.served_model() or path.name, extra=extra)
        counter = open_tokenizer(str(path))
    except BaseException:
        server.end()
        if engine is not None:
            engine.close()
        raise
    system = LocalServerSystem(side, api, prompt, max_tokens, concurrency, options.timeout, counter)
    system.server, system.engine, system.spec, system.cores = server, engine, spec, cores
    system.library, system.pid, system.local = SERVERS[kind].version(), server.process.pid, True
    return system
