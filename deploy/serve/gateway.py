"""One request's way: drawn into an arm, answered, checked, answered by the baseline where that failed, and recorded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from deploy.serve.backend import Backend, Failure
from deploy.serve.exchange import Asked, Routing, Shown, Try, left
from deploy.serve.journal import Journal
from deploy.serve.metrics import Metrics
from deploy.serve.target import encode
from unshot.contracts.request_log import Arm, Request

SHADOWS_WAITING = 16
Chunks = AsyncGenerator[list[dict[str, Any]], None]
DONE = b"data: [DONE]\n\n"


class Gateway:
    """Answers requests by the routing of the moment."""

    def __init__(
        self, name: str, metrics: Metrics, *, journal: Journal | None, shadow: bool, logprobs: bool
    ) -> None:
        self.name = name
        self.metrics = metrics
        self.journal = journal
        self.shadow = shadow
        self.logprobs = logprobs
        self.routing = Routing()
        self._shadow_turn = asyncio.Semaphore(1)
        self._shadows: set[asyncio.Task[None]] = set()

    async def answer(self, asked: Asked, ended: Callable[[], None]) -> Shown:
        """Answer a request; `ended` is called once when nothing more of it is under way. Raises `Failure`."""
        held = [b for b in (asked.routing.baseline, asked.routing.candidate) if b is not None]
        for backend in held:
            backend.enter()

        def over() -> None:
            for backend in held:
                backend.leave()
            ended()

        try:
            shown = await self._answer(asked)
        except BaseException:
            over()
            raise
        if shown.events is None:
            over()
        else:
            shown.over = over
        return shown

    async def _answer(self, asked: Asked) -> Shown:
        failure = Failure("no back end", "no version is promoted and no baseline is given", status=503)
        arms: tuple[Arm, ...] = ("candidate", "baseline") if asked.assigned == "candidate" else ("baseline",)
        there = [(arm, b) for arm in arms if (b := asked.routing.of(arm)) is not None]
        for number, (arm, backend) in enumerate(there):
            last = number == len(there) - 1
            begin = asked.arrival
            if not backend.breaker.passes and not last:
                tried = Try(arm, backend, begin)
                tried.fail(Failure("breaker open", "its last answers all failed", status=503))
            else:
                try:
                    tried, rest = await self._ask(asked, arm, backend, begin)
                except asyncio.CancelledError:
                    self._record(asked, left(arm, backend, begin))
                    raise
                if rest is not None:
                    return Shown(arm, backend.label, events=self._pass(asked, tried, rest))
            if tried.error is None and (tried.ok is not False or last):
                self._record(asked, tried)
                self._observe(tried)
                self._shadow_later(asked, arm)
                return self._show(asked, tried)
            if tried.error is None:
                tried.fail(Failure("schema", "the answer does not keep to the task's labels or schema"))
            self._record(asked, tried)
            assert tried.error is not None
            failure = tried.error
            if not last:
                self.metrics.fallbacks.labels(failure.kind).inc()
        raise failure

    async def _ask(self, asked: Asked, arm: Arm, backend: Backend, begin: float) -> tuple[Try, Chunks | None]:
        """An arm's answer, and its stream where it may pass as it comes."""
        if not asked.stream or backend.target.checker.active:
            return await self._whole(asked, arm, backend, begin), None
        tried, rest = await self._open(asked, arm, backend, begin)
        return tried, rest if tried.error is None else None

    def _show(self, asked: Asked, tried: Try) -> Shown:
        version = tried.backend.label
        if not asked.stream:
            return Shown(tried.arm, version, whole={**tried.raw, "id": asked.id, "model": self.name})
        return Shown(tried.arm, version, events=self._as_events(asked, tried))

    async def _whole(self, asked: Asked, arm: Arm, backend: Backend, begin: float) -> Try:
        """Ask an arm for a whole answer and check it; never raises a `Failure`."""
        tried = Try(arm, backend, begin)
        sent: list[float] = []
        try:
            body = backend.body(self._wanted(asked), stream=False)
            deadline = asyncio.get_running_loop().time() + backend.timeout
            tried.raw = await backend.whole(body, deadline, sent)
        except Failure as failure:
            self._blame(tried, failure)
            return tried
        finally:
            tried.queued = sent[0] - begin if sent else None
            tried.e2e = time.perf_counter() - begin
        tried.ttft = tried.e2e
        choice = tried.raw["choices"][0]
        tried.text = choice["message"].get("content") or ""
        tried.usage = tried.raw.get("usage") or {}
        tried.logprob = mean_logprob(choice.get("logprobs"))
        if self.logprobs and not asked.request.get("logprobs"):
            choice.pop("logprobs", None)
        self._judge(tried)
        return tried

    def _judge(self, tried: Try) -> None:
        """Check an answer that came, and tell the breaker: one that never keeps to the task is out of order too."""
        tried.ok, tried.label = tried.backend.target.checker.check(tried.text)
        if tried.ok is False:
            tried.backend.breaker.failure()
        else:
            tried.backend.breaker.success()

    def _blame(self, tried: Try, failure: Failure) -> None:
        tried.fail(failure)
        # A server that asks for patience works.
        if failure.theirs and failure.status != 429:
            tried.backend.breaker.failure()

    def _wanted(self, asked: Asked) -> dict[str, Any]:
        return {**asked.request, "logprobs": True} if self.logprobs else asked.request

    async def _open(self, asked: Asked, arm: Arm, backend: Backend, begin: float) -> tuple[Try, Chunks]:
        """Start a streamed answer up to its first text: until then it can still be the baseline's."""
        tried = Try(arm, backend, begin)
        sent: list[float] = []
        body = backend.body(self._wanted(asked), stream=True)
        deadline = asyncio.get_running_loop().time() + backend.timeout
        chunks = backend.pieces(body, deadline, sent)
        first: list[dict[str, Any]] = []
        try:
            async for batch in chunks:
                first += batch
                choices = [c for chunk in batch for c in chunk.get("choices") or ()]
                if any(_content(c) or c.get("finish_reason") for c in choices):
                    break
            tried.ttft = time.perf_counter() - begin
        except Failure as failure:
            tried.e2e = time.perf_counter() - begin
            self._blame(tried, failure)
        tried.queued = sent[0] - begin if sent else None

        async def rest() -> Chunks:
            async with aclosing(chunks) as more:
                yield first
                async for batch in more:
                    yield batch

        return tried, rest()

    async def _pass(self, asked: Asked, tried: Try, chunks: Chunks) -> AsyncGenerator[bytes, None]:
        """Hand a stream on as it comes. One that breaks off ends with an error event: half of it was shown."""
        texts: list[str] = []
        try:
            async with aclosing(chunks):
                async for batch in chunks:
                    shown = b"".join(event(c) for c in batch if self._own(c, asked, tried, texts))
                    if shown:
                        yield shown
            tried.text = "".join(texts)
            tried.e2e = time.perf_counter() - tried.begin
            self._judge(tried)
            yield DONE
        except Failure as failure:
            self._blame(tried, failure)
            yield event({"error": problem(failure)}) + DONE
        except (GeneratorExit, asyncio.CancelledError):
            tried.fail(Failure("client gone", status=499))
            raise
        finally:
            tried.text = tried.text or "".join(texts)
            tried.e2e = tried.e2e or time.perf_counter() - tried.begin
            self._record(asked, tried)
            if tried.error is None:
                self._observe(tried)
                self._shadow_later(asked, tried.arm)

    def _own(self, chunk: dict[str, Any], asked: Asked, tried: Try, texts: list[str]) -> bool:
        """Make a chunk the gateway's own and note what it says; whether the user gets it."""
        chunk["id"], chunk["model"] = asked.id, self.name
        choices = chunk.get("choices") or []
        texts += [text for c in choices if c.get("index", 0) == 0 and (text := _content(c))]
        if chunk.get("usage"):
            tried.usage = chunk["usage"]
            if not asked.usage:
                del chunk["usage"]
                return bool(choices)
        return True

    async def _as_events(self, asked: Asked, tried: Try) -> AsyncGenerator[bytes, None]:
        """A checked answer as the stream that was asked for."""
        head = {
            "id": asked.id,
            "object": "chat.completion.chunk",
            "created": tried.raw.get("created") or int(asked.at),
            "model": self.name,
        }
        out = []
        for number, choice in enumerate(tried.raw["choices"]):
            message = choice.get("message") or {}
            delta = {"role": "assistant", "content": message.get("content") or ""}
            start = {"index": number, "delta": delta, "finish_reason": None}
            if choice.get("logprobs"):
                start["logprobs"] = choice["logprobs"]
            end: dict[str, Any] = {
                "index": number,
                "delta": {},
                "finish_reason": choice.get("finish_reason") or "stop",
            }
            out += [{**head, "choices": [start]}, {**head, "choices": [end]}]
        if asked.usage:
            out.append({**head, "choices": [], "usage": tried.usage or None})
        yield b"".join(event(chunk) for chunk in out) + DONE

    def _shadow_later(self, asked: Asked, shown: Arm) -> None:
        """Run the other arm when the answer is on its way; what there is no room for is dropped and counted."""
        other: Arm = "candidate" if shown == "baseline" else "baseline"
        backend = asked.routing.of(other)
        if not self.shadow or backend is None or shown != asked.assigned:
            return
        if len(self._shadows) >= SHADOWS_WAITING or not backend.breaker.passes:
            self.metrics.shadows.labels(other, "dropped").inc()
            return
        backend.enter()
        task = asyncio.get_running_loop().create_task(self._run_shadow(asked, other, backend))
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def _run_shadow(self, asked: Asked, arm: Arm, backend: Backend) -> None:
        try:
            async with self._shadow_turn:
                tried = await self._whole(asked, arm, backend, time.perf_counter())
            if tried.ok is False:
                tried.kind = tried.kind or "schema"
            self._record(asked, tried, shadow=True)
            self.metrics.shadows.labels(arm, tried.kind or "ok").inc()
        finally:
            backend.leave()

    async def settle(self) -> None:
        """Give up the shadows that wait; for the end."""
        for task in list(self._shadows):
            task.cancel()
        await asyncio.gather(*self._shadows, return_exceptions=True)

    def _observe(self, tried: Try) -> None:
        self.metrics.ttft.labels(tried.arm).observe(tried.ttft or 0.0)
        self.metrics.e2e.labels(tried.arm).observe(tried.e2e or 0.0)
        if tried.queued is not None:
            self.metrics.queue.labels(tried.arm).observe(tried.queued)

    def _record(self, asked: Asked, tried: Try, *, shadow: bool = False) -> None:
        """Count an answer and write its line."""
        usage, metrics = tried.usage, self.metrics
        prompt, answer = whole(usage.get("prompt_tokens")), whole(usage.get("completion_tokens"))
        details = usage.get("prompt_tokens_details")
        cached = whole(details.get("cached_tokens")) if isinstance(details, dict) else None
        price, cost = tried.backend.target.price, None
        if price is not None and tried.error is None:
            cost = price.of(prompt, cached, answer, (tried.e2e or 0.0) - (tried.queued or 0.0))
            metrics.cost.labels(tried.arm).inc(cost)
        metrics.answers.labels(tried.arm, tried.backend.label, tried.kind or "ok").inc()
        for kind, count in (("prompt", prompt), ("answer", answer)):
            if count:
                metrics.tokens.labels(tried.arm, kind).inc(count)
        if self.journal is None:
            return
        self.journal.put(
            Request(
                id=asked.id,
                time=asked.at,
                arm=tried.arm,
                version=tried.backend.label,
                unit=asked.unit,
                assigned=asked.assigned,
                shadow=shadow,
                fallback=not shadow and tried.arm != asked.assigned,
                error=tried.kind,
                schema_ok=tried.ok,
                label=tried.label,
                input=asked.text,
                answer=tried.text,
                input_words=len(asked.text.split()),
                prompt_tokens=prompt,
                cached_tokens=cached,
                completion_tokens=answer,
                queue_s=rounded(tried.queued),
                ttft_s=rounded(tried.ttft),
                e2e_s=rounded(tried.e2e),
                cost_usd=cost,
                logprob=tried.logprob,
                slice=asked.slice,
            )
        )


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {encode(value)}\n\n".encode()


def problem(failure: Failure) -> dict[str, Any]:
    """An error as the OpenAI API words it."""
    kind = "invalid_request_error" if 400 <= failure.status < 500 else "server_error"
    return {"message": failure.detail, "type": kind, "param": None, "code": failure.kind.replace(" ", "_")}


def mean_logprob(logprobs: Any) -> float | None:
    """Mean log-probability of an answer's tokens, where the back end gave them."""
    try:
        values = [float(item["logprob"]) for item in logprobs["content"]]
    except (TypeError, KeyError, ValueError):
        return None
    return sum(values) / len(values) if values else None


def whole(value: Any) -> int | None:
    """A server's count, None where it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _content(choice: Any) -> str:
    delta = choice.get("delta") if isinstance(choice, dict) else None
    text = (delta or {}).get("content")
    return text if isinstance(text, str) else ""
