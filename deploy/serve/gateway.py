"""One request's way: drawn into an arm, answered, checked, answered by the baseline where that failed, and recorded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from deploy.serve.backend import Backend, Outgoing
from deploy.serve.exchange import Asked, Attempt, Routing, Shown, abandoned
from deploy.serve.failure import Failure
from deploy.serve.metrics import Metrics
from deploy.serve.parameters import LONGEST_KEY, Json, text_of
from deploy.serve.reply import Chunk, as_chunks, mean
from deploy.serve.request_log import RequestLog
from deploy.serve.target import encode
from deploy.serve.tracing import Tracing
from unshot.contracts.request_log import Arm, LoggedMessage, Request

SHADOWS_WAITING = 16
Chunks = AsyncGenerator[list[Chunk], None]
DONE = b"data: [DONE]\n\n"
# With one of these an answer outside the task may be the request's own doing, and so may a server's error.
STEERS_ANSWER = ("logit_bias", "response_format", "stop", "tools")
STEERS_SERVER = ("logit_bias", "response_format", "tools")


class Gateway:
    """Answers requests by the routing of the moment. `record`: whole requests are logged, prompts included."""

    def __init__(
        self,
        name: str,
        metrics: Metrics,
        *,
        log: RequestLog | None,
        shadow: bool,
        logprobs: bool,
        record: bool = False,
        tracing: Tracing | None = None,
    ) -> None:
        self.name = name
        self.metrics = metrics
        self.log = log
        self.shadow = shadow
        self.logprobs = logprobs
        self.record = record
        self.tracing = tracing
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
            attempt, rest = await self._attempt(asked, arm, backend, last=last)
            if rest is not None:
                return Shown(arm, backend.label, events=self._pass_on(asked, attempt, rest))
            # What the request itself keeps from being a good answer is shown as it is.
            if attempt.error is None and (attempt.ok is not False or attempt.request_fault or last):
                self._record(asked, attempt)
                self._observe(attempt)
                self._shadow_later(asked, arm)
                return self._show(asked, attempt)
            if attempt.error is None:
                attempt.fail(Failure("schema", "the answer does not keep to the task's labels or schema"))
            self._record(asked, attempt)
            assert attempt.error is not None
            failure = attempt.error
            if not last and self._may_have_killed(asked, attempt):
                break
            if not last:
                self.metrics.fallbacks.labels(failure.kind).inc()
        raise failure

    async def _attempt(
        self, asked: Asked, arm: Arm, backend: Backend, *, last: bool
    ) -> tuple[Attempt, Chunks | None]:
        """An arm's answer, and its stream where it may pass as it comes."""
        if not backend.breaker.passes and not last:
            attempt = Attempt(arm, backend, asked.arrival)
            attempt.fail(Failure("breaker open", "its last answers all failed", status=503))
            return attempt, None
        try:
            if not asked.request.stream or self._held_back(asked, backend):
                return await self._whole(asked, arm, backend, asked.arrival), None
            attempt, rest = await self._open(asked, arm, backend, asked.arrival)
            return attempt, rest if attempt.error is None else None
        except asyncio.CancelledError:
            self._record(asked, abandoned(arm, backend, asked.arrival))
            raise

    def _held_back(self, asked: Asked, backend: Backend) -> bool:
        """Whether an answer must be whole and checked before it is shown."""
        return backend.target.checker.active or asked.schema is not None

    def _may_have_killed(self, asked: Asked, attempt: Attempt) -> bool:
        """Whether an unusual request ended our own server: then no other is given to it."""
        unusual = steers(asked, STEERS_SERVER) or not ordinary(asked.own_messages)
        return unusual and not attempt.backend.running

    def _show(self, asked: Asked, attempt: Attempt) -> Shown:
        version = attempt.backend.label
        assert attempt.completion is not None
        if not asked.request.stream:
            whole = {**attempt.completion.raw, "id": asked.id, "model": self._model(asked)}
            whole.setdefault("created", int(asked.at))
            return Shown(attempt.arm, version, whole=whole)
        return Shown(attempt.arm, version, events=self._as_events(asked, attempt))

    def _model(self, asked: Asked) -> str:
        return asked.request.model or self.name if self.record else self.name

    def _outgoing(self, asked: Asked, backend: Backend) -> Outgoing:
        request = asked.request
        if asked.checked_request is not None and not backend.target.passes_through:
            request = asked.checked_request
        return Outgoing(request, asked.own_messages, self.logprobs, asked.authorization)

    async def _whole(self, asked: Asked, arm: Arm, backend: Backend, begin: float) -> Attempt:
        """Ask an arm for a whole answer and check it; never raises a `Failure`."""
        attempt = Attempt(arm, backend, begin)
        sent: list[float] = []
        try:
            deadline = asyncio.get_running_loop().time() + backend.timeout
            completion = await backend.whole(self._outgoing(asked, backend), deadline, sent)
        except Failure as failure:
            self._blame(asked, attempt, failure)
            return attempt
        finally:
            attempt.queued = sent[0] - begin if sent else None
            attempt.e2e = time.perf_counter() - begin
        attempt.ttft = attempt.e2e
        # More answers than one were not asked for, and are not checked.
        if "n" not in asked.request.parameters:
            del completion.raw["choices"][1:]  # type: ignore[attr-defined]
        attempt.completion, attempt.text = completion, completion.text
        attempt.usage, attempt.logprob = completion.usage, completion.logprob
        if self.logprobs and not asked.request.parameters.get("logprobs"):
            for choice in completion.raw["choices"]:  # type: ignore[attr-defined]
                choice.pop("logprobs", None)
        self._judge(asked, attempt, completion.finish, calls_tools=completion.calls_tools)
        return attempt

    def _judge(self, asked: Asked, attempt: Attempt, finish: str | None, *, calls_tools: bool) -> None:
        """Check an answer that came, and tell the breaker: one that never keeps to the task is out of order too."""
        if not calls_tools:
            checker = attempt.backend.target.checker.with_schema(asked.schema)
            attempt.ok, attempt.label = checker.check(attempt.text)
        if attempt.ok is not False:
            attempt.backend.breaker.success()
            return
        limit = asked.request.limit
        cut = limit is not None and (finish == "length" or (attempt.usage.answer or 0) >= limit)
        attempt.request_fault = cut or heated(asked) or steers(asked, STEERS_ANSWER)
        if not attempt.request_fault:
            attempt.backend.breaker.failure()

    def _blame(self, asked: Asked, attempt: Attempt, failure: Failure) -> None:
        """Note a failure; the breaker hears of those that are the back end's. A server that asks for patience works."""
        unusual = steers(asked, STEERS_SERVER) or not ordinary(asked.own_messages)
        if unusual and failure.kind.startswith("http 5"):
            failure.request_fault = True
        attempt.fail(failure)
        if not failure.request_fault and failure.kind != "http 429":
            attempt.backend.breaker.failure()

    async def _open(self, asked: Asked, arm: Arm, backend: Backend, begin: float) -> tuple[Attempt, Chunks]:
        """Start a streamed answer up to its first token: until then it can still be the baseline's."""
        attempt = Attempt(arm, backend, begin)
        sent: list[float] = []
        deadline = asyncio.get_running_loop().time() + backend.timeout
        chunks = backend.pieces(self._outgoing(asked, backend), deadline, sent)
        first: list[Chunk] = []
        try:
            async for batch in chunks:
                first += batch
                if any(c.begun or c.finished for c in batch):
                    break
            attempt.ttft = time.perf_counter() - begin
        except Failure as failure:
            attempt.e2e = time.perf_counter() - begin
            self._blame(asked, attempt, failure)
        attempt.queued = sent[0] - begin if sent else None

        async def rest() -> Chunks:
            async with aclosing(chunks) as more:
                yield first
                async for batch in more:
                    yield batch

        return attempt, rest()

    async def _pass_on(self, asked: Asked, attempt: Attempt, chunks: Chunks) -> AsyncGenerator[bytes, None]:
        """Hand a stream on as it comes. One that breaks off ends with an error event: half of it was shown."""
        texts: list[str] = []
        logprobs: list[float] = []
        try:
            async with aclosing(chunks):
                async for batch in chunks:
                    for chunk in batch:
                        texts.append(chunk.text)
                        logprobs += chunk.logprobs
                        attempt.usage = chunk.usage or attempt.usage
                    if shown := b"".join(event(c.raw) for c in batch if self._own(c, asked)):
                        yield shown
            attempt.text = "".join(texts)
            attempt.e2e = time.perf_counter() - attempt.begin
            self._judge(asked, attempt, None, calls_tools=False)
            yield DONE
        except Failure as failure:
            self._blame(asked, attempt, failure)
            yield event(failure.body()) + DONE
        except (GeneratorExit, asyncio.CancelledError):
            attempt.fail(Failure("client gone", status=499))
            raise
        finally:
            attempt.text = attempt.text or "".join(texts)
            attempt.logprob = mean(logprobs)
            attempt.e2e = attempt.e2e or time.perf_counter() - attempt.begin
            self._record(asked, attempt)
            if attempt.error is None:
                self._observe(attempt)
                self._shadow_later(asked, attempt.arm)

    def _own(self, chunk: Chunk, asked: Asked) -> bool:
        """Make a chunk the gateway's own; whether the user gets it."""
        raw = chunk.raw
        raw["id"], raw["model"], raw["object"] = asked.id, self._model(asked), "chat.completion.chunk"
        if "n" not in asked.request.parameters:
            raw["choices"] = [c for c in raw["choices"] if c["index"] == 0]  # type: ignore[attr-defined]
        if self.logprobs and not asked.request.parameters.get("logprobs"):
            for choice in raw["choices"]:  # type: ignore[attr-defined]
                choice.pop("logprobs", None)
        if "usage" in raw and not asked.request.include_usage:
            del raw["usage"]
            return chunk.has_choices
        return True

    async def _as_events(self, asked: Asked, attempt: Attempt) -> AsyncGenerator[bytes, None]:
        """A checked answer as the stream that was asked for."""
        assert attempt.completion is not None
        raw = attempt.completion.raw
        head: Json = {
            "id": asked.id,
            "object": "chat.completion.chunk",
            "created": raw.get("created") or int(asked.at),
            "model": self._model(asked),
        }
        out = as_chunks(attempt.completion, head)
        if asked.request.include_usage:
            out.append({**head, "choices": [], "usage": raw.get("usage")})
        yield b"".join(event(chunk) for chunk in out) + DONE

    def _shadow_later(self, asked: Asked, shown: Arm) -> None:
        """Run the other arm when the answer is on its way; what there is no room for is dropped and counted."""
        other: Arm = "candidate" if shown == "baseline" else "baseline"
        backend = asked.routing.of(other)
        if not self.shadow or backend is None or shown != asked.assigned or not asked.drawn:
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
                attempt = await self._whole(asked, arm, backend, time.perf_counter())
            if attempt.ok is False:
                attempt.kind = attempt.kind or "schema"
            self._record(asked, attempt, shadow=True)
            self.metrics.shadows.labels(arm, attempt.kind or "ok").inc()
        finally:
            backend.leave()

    async def settle(self) -> None:
        """Give up the shadows that wait; for the end."""
        for task in list(self._shadows):
            task.cancel()
        await asyncio.gather(*self._shadows, return_exceptions=True)

    def _observe(self, attempt: Attempt) -> None:
        self.metrics.ttft.labels(attempt.arm).observe(attempt.ttft or 0.0)
        self.metrics.e2e.labels(attempt.arm).observe(attempt.e2e or 0.0)
        if attempt.queued is not None:
            self.metrics.queue.labels(attempt.arm).observe(attempt.queued)

    def _record(self, asked: Asked, attempt: Attempt, *, shadow: bool = False) -> None:
        """Count an answer and write its line."""
        usage, metrics = attempt.usage, self.metrics
        price, cost = attempt.backend.target.price, None
        if price is not None and attempt.error is None:
            seconds = (attempt.e2e or 0.0) - (attempt.queued or 0.0)
            cost = price.of(usage.prompt, usage.cached, usage.answer, seconds)
            metrics.cost.labels(attempt.arm).inc(cost)
        metrics.answers.labels(attempt.arm, attempt.backend.label, attempt.kind or "ok").inc()
        for kind, count in (("prompt", usage.prompt), ("answer", usage.answer)):
            if count:
                metrics.tokens.labels(attempt.arm, kind).inc(count)
        if self.tracing is not None:
            self.tracing.record(asked, attempt, shadow=shadow)
        if self.log is None:
            return
        messages = None
        if self.record:
            messages = [
                LoggedMessage(str(m["role"])[:LONGEST_KEY], text_of(m)) for m in asked.request.messages
            ]
        line = Request(
            id=asked.id,
            time=asked.at,
            arm=attempt.arm,
            version=attempt.backend.label,
            unit=asked.unit,
            assigned=asked.assigned,
            share=asked.share,
            shadow=shadow,
            fallback=not shadow and attempt.arm != asked.assigned,
            error=attempt.kind,
            request_fault=attempt.request_fault,
            schema_ok=attempt.ok,
            label=attempt.label,
            input=asked.text,
            answer=attempt.text,
            messages=messages,
            input_words=len(asked.text.split()),
            prompt_tokens=usage.prompt,
            cached_tokens=usage.cached,
            completion_tokens=usage.answer,
            queue_s=rounded(attempt.queued),
            ttft_s=rounded(attempt.ttft),
            e2e_s=rounded(attempt.e2e),
            cost_usd=cost,
            logprob=attempt.logprob,
            slice=asked.slice,
        )
        self.log.put(line, known_label=attempt.backend.target.checker.closed)


def steers(asked: Asked, names: tuple[str, ...]) -> bool:
    """Whether a request sets one of these parameters."""
    return any(name in asked.request.parameters for name in names)


def heated(asked: Asked) -> bool:
    """Whether a request asks for less likely tokens than the model's own."""
    given = asked.request.parameters
    heat = given.get("temperature", 0)
    hot = isinstance(heat, int | float) and heat > 1
    return hot or any(given.get(n) not in (None, 0) for n in ("frequency_penalty", "presence_penalty"))


def ordinary(messages: list[Json]) -> bool:
    """Whether messages are what every chat template takes: user and assistant in turn, a user's text first and last."""
    roles = [m.get("role") for m in messages]
    if roles[:1] in (["system"], ["developer"]):
        roles = roles[1:]
    return bool(roles) and roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def event(value: object) -> bytes:
    """One server-sent event."""
    return f"data: {encode(value)}\n\n".encode("utf-8", "replace")


def rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
