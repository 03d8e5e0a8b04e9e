"""A server as a system under test, driven in closed loop at a concurrency."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.load import Driver, drive
from bench.records import Record
from bench.schedule import Load
from bench.systems import Item, Progress
from unshot.data.prompts import Prompt
from unshot.data.rows import Message
from unshot.engines.http import Exchange, parse_url
from unshot.engines.openai import CHAT, Api, read_answer

Count = Callable[[str], int]
# Plain words of one token or two, to make prompts of any length and beginnings that no cache holds.
TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work number night point home water room mother area "
    "money story fact month lot right study book eye job word business issue side kind head house service friend"
)
WORDS = TEXT.split()


@dataclass
class Remote:
    """An OpenAI-compatible server with the prompt that goes with it.

    `count` counts an answer's tokens with the model's own tokenizer; without it the server's `usage` is taken,
    and without that the pieces of the stream, which the report says.
    """

    side: str
    api: Api
    prompt: Prompt
    max_tokens: int
    concurrency: int = 1
    timeout: float = 120.0
    count: Count | None = None
    template: Callable[[Sequence[Message]], str] | None = None
    count_prompt: Callable[[Sequence[Message]], int] | None = None
    clients: list[dict[str, Any]] = field(default_factory=list)
    pid: int | None = None

    def facts(self) -> dict[str, Any]:
        """What the report says about this side."""
        return {
            "spec": f"{'https' if self.api.address.tls else 'http'}://{self.api.address.authority}{self.api.address.path}",
            "engine": "server",
            "library": f"OpenAI-compatible, {self.api.kind}",
            "model": self.api.model,
            "bytes": None,
            "threads": None,
            "device": "of the server",
            "concurrency": self.concurrency,
            "examples_in_prompt": len(self.prompt.examples),
            "system_prompt": bool(self.prompt.system),
            "tokens_counted_by": "tokenizer" if self.count else "server",
            "client": client_facts(self.clients),
        }

    def reset(self) -> None:
        """A server's cache cannot be emptied from here; cold requests defeat it by a prefix of their own."""

    def close(self) -> None:
        """Nothing is held between blocks."""

    def payload(self, item: Item, mode: str) -> bytes:
        """The request's bytes. Without cache, words unlike those before stand in front of everything."""
        messages = self.prompt.request(item[2])
        if mode == "cache off":
            messages = defeat_cache(messages)
        if self.api.kind == CHAT:
            return self.api.request(messages, self.max_tokens)
        text = self.template(messages) if self.template else "\n\n".join(m["content"] for m in messages)
        return self.api.request(text, self.max_tokens)

    def run_block(
        self, items: Sequence[Item], *, mode: str, block: int, clock: float, progress: Progress | None = None
    ) -> list[Record]:
        """Send the items at the system's concurrency."""
        records: dict[int, Record] = {}

        def done(number: int, exchange: Exchange) -> None:
            request, row, _ = items[number]
            record = make_record(
                exchange,
                self.api,
                side=self.side,
                row=row,
                mode=mode,
                block=block,
                clock=clock,
                count=self.count,
            )
            record.extra["request"] = request
            if not record.prompt_tokens and self.count_prompt:
                record.prompt_tokens = self.count_prompt(self.prompt.request(items[number][2]))
            records[number] = record
            if progress:
                progress(record)

        run = drive(
            Driver(
                self.api.address,
                [self.payload(item, mode) for item in items],
                Load("closed", concurrency=self.concurrency),
                timeout=self.timeout,
                warm_connections=min(self.concurrency, len(items)),
            ),
            done,
        )
        self.clients.append(run.client())
        if run.interrupted:
            raise KeyboardInterrupt
        return [records[i] for i in sorted(records)]


def make_record(
    exchange: Exchange,
    api: Api,
    *,
    side: str,
    row: int,
    mode: str,
    block: int,
    clock: float,
    count: Count | None = None,
) -> Record:
    """Read an exchange; all latencies count from its scheduled time."""
    answer = read_answer(exchange, api.kind)
    start = exchange.scheduled
    times = answer.times
    ours = count(answer.text) if count and times else None
    # The stop token is generated but not in the text; counted here as the engines and most servers count it, and
    # known when the server says that the answer is finished.
    if ours is not None and answer.finish == "stop":
        ours += 1
        if answer.ended > times[-1]:
            times.append(answer.ended)
    last = max(times[-1], answer.ended) if times else exchange.ended
    tokens = ours if ours is not None else answer.output_tokens
    extra: dict[str, Any] = {
        "elapsed": exchange.ended - start,
        "connect": max(0.0, exchange.started - start) if exchange.started else None,
    }
    if ours is not None and answer.output_tokens is not None:
        extra["server_tokens"] = answer.output_tokens
    if exchange.headers.get("retry-after"):
        extra["retry_after"] = exchange.headers["retry-after"]
    return Record(
        side=side,
        mode=mode,
        row=row,
        block=block,
        scheduled=start - clock,
        start=(exchange.started or start) - clock,
        token_times=[t - start for t in times],
        e2e=last - start if answer.error is None else math.nan,
        prompt_tokens=answer.prompt_tokens or 0,
        output_tokens=tokens if tokens is not None else len(times),
        cached_tokens=answer.cached_tokens,
        text=answer.text,
        finish=answer.finish,
        error=answer.error,
        detail=answer.detail,
        extra={**extra, **({"golden": answer.golden} if answer.golden else {})},
    )


def defeat_cache(messages: Sequence[Message]) -> list[Message]:
    """The same messages with three random words in front: no cached prefix, and few tokens more."""
    first = messages[0].copy()
    first["content"] = f"{' '.join(random.choices(WORDS, k=3)).capitalize()}. {first['content']}"
    return [first, *messages[1:]]


def client_facts(clients: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The client's own state over all blocks: invalid where one block was."""
    if not clients:
        return None
    bad = [c for c in clients if not c["valid"]]
    # The worst block stands for the others.
    worst = max(bad, key=lambda c: (c["loop_lag"] or {"p99_ms": 0.0})["p99_ms"], default=None)
    reasons = [f"{len(bad)} of {len(clients)} blocks: {'; '.join(worst['reasons'])}"] if worst else []
    return {
        "valid": not bad,
        "reasons": reasons,
        "cpu_seconds": sum(c["cpu_seconds"] for c in clients),
        "connections": sum(c["connections"] for c in clients),
    }


def open_remote(
    side: str,
    url: str,
    prompt: Prompt,
    *,
    model: str,
    max_tokens: int,
    kind: str = CHAT,
    key: str | None = None,
    concurrency: int = 1,
    timeout: float = 120.0,
    tokenizer: str | None = None,
    extra: dict[str, Any] | None = None,
) -> Remote:
    """A server by its base URL (`.../v1`). Raises `InputError` for a bad URL or tokenizer."""
    api = Api(parse_url(url), model, kind, key, extra or {})
    count = template = None
    if tokenizer is not None:
        count, template = open_tokenizer(tokenizer)
    return Remote(side, api, prompt, max_tokens, concurrency, timeout, count, template)


def open_tokenizer(path: str) -> tuple[Count, Callable[[Sequence[Message]], str]]:
    """`(count, render)` of a Hugging Face model directory or hub name."""
    from unshot.models import resolve
    from unshot.text.chat import Chat, load_tokenizer

    chat = Chat(load_tokenizer(resolve(path, need_weights=False).path))
    return lambda text: len(chat.tokenizer.ids(text)), chat.render
