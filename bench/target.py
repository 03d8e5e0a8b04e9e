"""A server with the requests that go to it, driven by one client process, several, or clients on Ray."""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.conversation import Conversation, Talk, of_log, of_rows, parse_think, talk_warnings, undated
from bench.counters import counted, read_counters
from bench.load import Driver, LoadResult, drive
from bench.processes import run_processes
from bench.records import RequestRecord, answered_tokens, in_flight, steady_window, summarise
from bench.resources import Monitor, energy_per_request
from bench.schedule import Load
from bench.sides import first_adapted, make_record
from bench.traffic import (
    WORDS,
    Fresh,
    ServerOptions,
    cache_warning,
    digest,
    fresh_input,
    meet,
    prompt_of,
    sentence,
    shared_share,
    side_warnings,
    uncached,
    warm_warning,
)
from unshot.case import Slo
from unshot.console import Output
from unshot.contracts.figures import Client, Figures, Resources
from unshot.contracts.manifest import describe_file
from unshot.data.prompts import load_prompt
from unshot.data.rows import Message, read_examples
from unshot.engines.http import Exchange
from unshot.errors import InputError

RAMP_PER_STREAM = 0.002


@dataclass(frozen=True)
class LoadOptions:
    """A server and what is sent to it, as the command line says it."""

    url: str
    server: ServerOptions = field(default_factory=ServerOptions)
    data: Path | None = None
    prompt: Path | None = None
    system: str | None = None
    prompt_words: str = "64"
    max_tokens: str = "64"
    cache: str = "on"
    repeat: int = 0
    slo: Slo = field(default_factory=Slo)
    seed: int = 0
    turns: int = 1
    think_time: str | None = None


@dataclass
class Outcome:
    """One load measured. From clients on Ray, `records` are a sample of the requests and the figures are of all."""

    figures: Figures
    client: Client
    records: list[RequestRecord]
    interrupted: bool
    resources: Resources | None = None
    warnings: list[str] = field(default_factory=list)
    # Of conversations, the figures of each turn.
    turns: list[Figures] = field(default_factory=list)
    # Whether the figures are of the steady state.
    steady: bool = False


class Target:
    """The server with the requests that go to it.

    Each request is sent once: across warm-up, steps and runs every one begins (or, behind a shared prompt, its input
    begins) with words of its own. With `repeat` the same so many requests are sent over and over, in every run.
    """

    def __init__(self, options: LoadOptions) -> None:
        self.options = options
        self.api, self.counter = meet(options.server.open(options.url), options.server.tokenizer)
        self.inputs = [describe_file(p) for p in (options.data, options.prompt) if p and p.is_file()]
        self._prompt = load_prompt(options.prompt, system=options.system)
        self._words = parse_span(options.prompt_words, "--prompt-words")
        self._lengths = parse_span(options.max_tokens, "--max-tokens")
        self._examples = read_examples(options.data, answers=False) if options.data else []
        self._rows = [self._prompt.request(row) for row in self._examples] or None
        self._fresh = Fresh(f"seed {options.seed}" if options.repeat else None)
        self._uncached = Fresh()
        self._sent = 0
        # A request log that is replayed, and the number of its first request.
        self._replayed: tuple[str | list[Message], ...] = ()
        self._first = 0
        self._talk: Talk | None = None
        # What to say of the warm-up.
        self.cold: str | None = None

    @property
    def repeats(self) -> int:
        """After so many requests the same ones come again; 0: never."""
        if not self.options.repeat:
            return 0
        return min(self.options.repeat, len(self._rows)) if self._rows else self.options.repeat

    @property
    def prompt_digest(self) -> str:
        """A short hash of the prompt's own text."""
        return digest(self._prompt)

    @property
    def think_time(self) -> str | None:
        """Of conversations, how long their users think."""
        return self._talk.pause if self._talk else None

    @property
    def prompts(self) -> str:
        """What the requests are, for the report."""
        if self._talk:
            return (
                f"conversations of {self._talk.what} with the answers that came, at most {self.options.turns} turns, "
                f"think time {self._talk.pause}"
            )
        if self._replayed:
            return f"{len(self._replayed)} requests of the log, as they were asked"
        what = "rows of the data" if self._rows else f"random words ({self.options.prompt_words} a prompt)"
        if self.repeats:
            return f"{self.repeats} {what}, sent over and over (--repeat)"
        return f"{what}, each with words of its own, sent once"

    def messages(self, number: int) -> list[Message]:
        """Request `number` of all that this target ever sends; of a conversation, its first."""
        if self._talk:
            return self._talk.messages(number)
        if self._replayed:
            said = self._replayed[(number - self._first) % len(self._replayed)]
            return self._prompt.messages(said) if isinstance(said, str) else said
        which = number % self.repeats if self.repeats else number
        generator = self._fresh.generator(which)
        if self._rows is None:
            messages = self._prompt.messages(self._text(generator))
        else:
            messages = self._rows[which % len(self._rows)]
            if not self.repeats:
                messages = fresh_input(messages, sentence(generator))
        if self.options.cache == "off":
            return uncached(messages, sentence(self._uncached.generator(number)))
        return messages

    def _text(self, generator: random.Random) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(*self._words)))

    def converse(self, load: Load, requests: int | None) -> tuple[Load, int | None]:
        """From now on send conversations: `(the load of their first turns, how many there are)`.

        They are a replayed log's, the rows', or of random words. `requests` None: all of a log's or a trace's, else as
        many as come. Raises `InputError` for a log without conversations.
        """
        options, first = self.options, self._sent
        think = parse_think(options.think_time)
        timed = options.think_time is not None
        said: list[Conversation] = []
        logged = bool(load.requests)
        if logged:
            load, said = of_log(load, self._prompt, options.turns, timed=timed)
        elif self._examples:
            said = of_rows(self._examples, self._prompt, options.turns)

        def script(number: int) -> Conversation:
            if logged:
                return said[number - first]
            which = number % options.repeat if options.repeat else number
            generator = self._fresh.generator(which)
            if not said:
                texts = [self._text(generator) for _ in range(options.turns)]
                return undated(self._prompt.messages(texts[0]), texts[1:])
            found = said[which % len(said)]
            words = sentence(generator)
            return found if options.repeat else replace(found, first=fresh_input(found.first, words))

        def request(messages: Sequence[Message], number: int, turn: int) -> bytes:
            prompt = prompt_of(self.api, messages, self.counter)
            return self.api.wrap(self.api.body(prompt, self._length(number, turn)))

        what = "the log" if logged else "the rows" if said else "random words"
        pause = "as in the log" if logged and not timed else f"{options.think_time or 0} s"
        self._talk = Talk(script, request, self.api.kind, think, options.seed, first, what, pause)
        if requests is None:
            return load, len(load.times) or None
        return load, self._talk.count(requests, len(said) if logged else None)

    def _length(self, number: int, turn: int = 0) -> int:
        """The longest answer to a request, drawn by the seed."""
        which = f"{number}:{turn}" if turn else f"{number}"
        return random.Random(f"{self.options.seed}:{which}").randint(*self._lengths)

    def body(self, number: int) -> bytes:
        """The JSON of request `number`."""
        prompt = prompt_of(self.api, self.messages(number), self.counter)
        return self.api.body(prompt, self._length(number))

    def bodies(self, count: int) -> list[bytes]:
        """The next `count` requests without their headers."""
        first, self._sent = self._sent, self._sent + count
        return [self.body(first + i) for i in range(count)]

    def asked_share(self) -> float:
        """The part of its tokens that a request may find in a cache, by what was asked for."""
        if self.options.cache == "off":
            return 0.0
        return 1.0 if self.repeats or self._replayed else shared_share([self.messages(n) for n in range(20)])

    def warm_up(self, count: int) -> None:
        """Send `count` requests that are measured nowhere; learn which fields of a request the server refuses."""
        while count:
            run, records = self.run(Load("closed", concurrency=1), count)
            if run.interrupted:
                raise KeyboardInterrupt
            other = first_adapted(self.api, records)
            if other is None:
                failed = Counter(r.error for r in records if r.error)
                self.cold = warm_warning("warm-up", failed, count)
                return
            self.api = other

    def measure(
        self,
        load: Load,
        count: int | None,
        out: Output,
        *,
        processes: int = 1,
        ray: int = 0,
        ray_address: str | None = None,
        duration: float | None = None,
        steady: bool = False,
    ) -> Outcome:
        """Drive the load and sum it up."""
        self._replayed, self._first = () if self._talk else load.requests, self._sent
        if ray:
            return self._on_ray(load, count or 1, ray, ray_address, out)
        before = read_counters(self.api.address)
        with Monitor({"the client": os.getpid()}) as monitor:
            run, records = self.run(load, count, processes=processes, duration=duration)
        after = read_counters(self.api.address) if before else {}
        window = steady_window(records, load) if steady else None
        chosen, flow, seconds = window or (records, records, run.seconds)
        facts = summarise(chosen, seconds, self.options.slo, flow=flow)
        # Who thinks has nothing in flight.
        if not load.open and not (self._talk and self._talk.think[1]):
            facts.in_flight = in_flight(records, load.concurrency) if records else None
        facts.server = counted(before, after, least=answered_tokens(records))
        facts.energy = energy_per_request(monitor, records, "candidate", load.text, run.began)
        turns = self._by_turn(chosen, flow, seconds)
        warnings = self._warnings(load, facts, turns)
        if steady and window is None:
            warnings.append(
                f"{load.text}: {duration:g} s are too short for a steady state (each stream answers once more after "
                "its first answer): these are all requests, ramp-up and drain with them; give a longer --duration"
            )
        return Outcome(
            facts,
            run.client(),
            records,
            run.interrupted,
            monitor.facts(),
            warnings,
            turns,
            steady=window is not None,
        )

    def _by_turn(
        self, records: Sequence[RequestRecord], flow: Sequence[RequestRecord], seconds: float
    ) -> list[Figures]:
        def of(group: Sequence[RequestRecord], turn: int) -> list[RequestRecord]:
            return [r for r in group if r.turn == turn]

        turns = sorted({r.turn for r in records if r.turn is not None})
        return [summarise(of(records, t), seconds, self.options.slo, flow=of(flow, t)) for t in turns]

    def _warnings(self, load: Load, facts: Figures, turns: Sequence[Figures] = ()) -> list[str]:
        reported, repeated = facts.tokens.cached_share, bool(self.repeats)
        found = (
            talk_warnings(self._talk, turns, repeated=repeated)
            if self._talk
            else [
                cache_warning(
                    load.text, self.asked_share(), reported, repeated=repeated, tokens=facts.tokens.prompt
                )
            ]
        )
        found += side_warnings(load.text, self.api.model, facts)
        flying = facts.in_flight
        if flying and facts.requests and flying.mean < 0.9 * flying.asked > 1:
            found.append(
                f"{load.text}: {flying.mean:.1f} requests were in flight where {flying.asked} were asked for"
            )
        return [w for w in found if w]

    def run(
        self, load: Load, count: int | None, *, processes: int = 1, duration: float | None = None
    ) -> tuple[LoadResult, list[RequestRecord]]:
        """The exchanges and what they hold."""
        first, timeout, seed = self._sent, self.options.server.timeout, self.options.seed
        if processes > 1:
            payloads = [self.api.wrap(body) for body in self.bodies(count or 1)]
            run = run_processes(self.api, payloads, load, processes, timeout=timeout, seed=seed)
        else:
            streams = load.concurrency or min(64, count or 64)
            ready = None if count is None else [self.api.wrap(body) for body in self.bodies(count)]
            driver = Driver(
                self.api.address,
                ready if ready is not None else lambda n: self.api.wrap(self.body(first + n)),
                load,
                count=count,
                duration=duration,
                timeout=timeout,
                seed=seed,
                warm_connections=min(streams, count or streams),
                ramp=0.0 if streams < 8 else RAMP_PER_STREAM * streams,
                follow=self._talk.follow if self._talk else None,
            )
            run = drive(driver)
            self._sent = max(self._sent, first + len(run.exchanges))
        return run, [self._record(e, run, load, first, i) for i, e in enumerate(run.exchanges)]

    def _record(self, exchange: Exchange, run: LoadResult, load: Load, first: int, row: int) -> RequestRecord:
        number = first + (exchange.origin if self._talk else row)
        messages = self._talk.messages(number, exchange.turn) if self._talk else self.messages(number)
        limit = self.api.limit(self._length(number, exchange.turn))
        record = make_record(
            exchange, self.api, side="candidate", row=row, mode=load.text, block=0, clock=run.began,
            counter=self.counter, messages=messages, limit=limit,
        )  # fmt: skip
        record.request = first + row
        if self._talk:
            record.conversation, record.turn = exchange.origin, exchange.turn
        return record

    def _on_ray(self, load: Load, count: int, workers: int, address: str | None, out: Output) -> Outcome:
        from bench.cluster import deal, run_ray

        shares = deal(
            self.api,
            self.options.server.key_env,
            self.bodies(count),
            load,
            workers,
            timeout=self.options.server.timeout,
            seed=self.options.seed,
            tokenizer=self.options.server.tokenizer,
            slo=self.options.slo,
        )
        tally, client, records, interrupted = run_ray(shares, address, out)
        facts = tally.figures()
        return Outcome(facts, client, records, interrupted, warnings=self._warnings(load, facts))


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
    return Slo(**values)  # type: ignore[arg-type]


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
