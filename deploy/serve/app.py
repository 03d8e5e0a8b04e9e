"""The gateway's HTTP side: OpenAI-compatible routes, feedback, health and metrics, and what is refused at the door."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from deploy.serve.backend import Failure
from deploy.serve.exchange import Asked, Shown, unit_of
from deploy.serve.gateway import Gateway, problem
from deploy.serve.metrics import BREAKER
from deploy.serve.target import encode
from unshot.contracts.record import Record, RecordError
from unshot.contracts.request_log import Feedback

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
LONGEST_KEY = 256


@dataclass(frozen=True)
class Limits:
    """What the gateway takes. `body` in bytes."""

    body: int = 1 << 20
    concurrency: int = 64
    key: str | None = None


class Given(Record):
    """The body of POST /v1/feedback."""

    id: Annotated[str, Meta(min_length=1, max_length=100)]
    correct: bool | None = None
    correction: Annotated[str, Meta(max_length=100_000)] | None = None
    by: Annotated[str, Meta(max_length=100)] = "user"


class Events(StreamingResponse):
    """A stream that is closed and counted as over however it ends, also where it never began."""

    def __init__(self, shown: Shown, headers: dict[str, str]) -> None:
        assert shown.events is not None and shown.over is not None
        super().__init__(shown.events, headers=headers, media_type="text/event-stream")
        self._events, self._over = shown.events, shown.over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            self._over()


class Door:
    """The routes of one gateway."""

    def __init__(self, gateway: Gateway, limits: Limits, health: Callable[[], dict[str, Any]]) -> None:
        self.gateway = gateway
        self.limits = limits
        self.health = health
        self.active = 0

    def app(self, lifespan: Callable[[Any], AbstractAsyncContextManager[None]]) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/feedback", self.feedback, methods=["POST"]),
            Route("/metrics", self.show_metrics),
            Route("/healthz", self.healthz),
        ]
        handlers: dict[Any, Any] = {404: _not_found, 405: _not_found, Failure: self.refuse}
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        arrival = time.perf_counter()
        self._check_key(request)
        if self.active >= self.limits.concurrency:
            raise self._rejected("busy", f"{self.active} requests are under way; try again", 429, "1")
        self.active += 1
        self.gateway.metrics.active.set(self.active)
        begun = False
        try:
            body = self._body(await self._read(request))
            number = f"chatcmpl-{uuid.uuid4().hex}"
            key = request.headers.get("x-unshot-user") or body.get("user") or number
            asked = Asked(
                number,
                body,
                unit_of(str(key)[:LONGEST_KEY]),
                self.gateway.routing,
                arrival,
                slice=(request.headers.get("x-unshot-slice") or "")[:LONGEST_KEY] or None,
            )
            begun = True
            shown = await while_there(request, self.gateway.answer(asked, self._ended))
        except Failure as failure:
            if begun:
                self.gateway.metrics.failed.labels(failure.kind).inc()
            raise
        finally:
            if not begun:
                self._ended()
        headers = {"x-unshot-version": shown.version, "x-unshot-arm": shown.arm, "x-request-id": asked.id}
        if shown.events is not None:
            headers["cache-control"] = "no-cache"
            return Events(shown, headers)
        return answer(shown.whole, headers=headers)

    def _ended(self) -> None:
        self.active -= 1
        self.gateway.metrics.active.set(self.active)

    async def _read(self, request: Request) -> bytes:
        """The body, refused as soon as it is too long."""
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self.limits.body:
                raise self._rejected("too long", f"the body has more than {self.limits.body} bytes", 413)
            parts.append(part)
        return b"".join(parts)

    def _body(self, raw: bytes) -> dict[str, Any]:
        """A request that an arm can take. Raises `Failure` 400."""
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            raise self._bad("the body is not JSON") from None
        if not isinstance(body, dict):
            raise self._bad("the body is not a JSON object")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise self._bad("`messages` must be a list with at least one message")
        for message in messages:
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                raise self._bad(f"each message needs a `role` ({', '.join(ROLES)}) and a `content`")
            if message["role"] in ("system", "developer") and self._brings_prompt():
                raise self._bad(
                    "send the user's own messages only: the gateway puts the task's prompt in front"
                )
            if not isinstance(message.get("content"), str | list) and message["role"] != "assistant":
                raise self._bad("a message's `content` must be a text or a list of parts")
        if body.get("n") not in (None, 1):
            raise self._bad("`n` must be 1")
        name = body.get("model")
        if name not in (None, self.gateway.name):
            raise self._rejected(
                "model", f"no model `{str(name)[:80]}` here; ask for `{self.gateway.name}`", 404
            )
        return body

    def _brings_prompt(self) -> bool:
        routing = self.gateway.routing
        return any(b and b.target.brings_prompt for b in (routing.baseline, routing.candidate))

    def _bad(self, message: str) -> Failure:
        return self._rejected("bad request", message, 400)

    def _rejected(self, reason: str, message: str, status: int, retry_after: str | None = None) -> Failure:
        self.gateway.metrics.rejected.labels(reason).inc()
        return Failure(reason, message, status=status, retry_after=retry_after)

    def _check_key(self, request: Request) -> None:
        key = self.limits.key
        if key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise self._rejected("key", "the API key is missing or wrong", 401)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        self._check_key(request)
        return answer({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        self._check_key(request)
        name = request.path_params["name"]
        if name != self.gateway.name:
            raise Failure("model", f"no model `{name[:80]}` here; ask for `{self.gateway.name}`", status=404)
        return answer(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self.gateway.name, "object": "model", "created": 0, "owned_by": "unshot"}

    async def feedback(self, request: Request) -> Response:
        """POST /v1/feedback."""
        self._check_key(request)
        if self.gateway.journal is None:
            raise Failure("no log", "feedback needs a log; start the gateway with --log DIR", status=409)
        try:
            given = Given.from_json(await self._read(request))
        except RecordError as error:
            raise self._bad(str(error)) from None
        if given.correct is None and given.correction is None:
            raise self._bad("give `correct`, `correction`, or both")
        self.gateway.journal.put(Feedback(time=time.time(), **given.plain()))
        self.gateway.metrics.feedback.labels(str(given.correct).lower()).inc()
        return answer({"id": given.id, "recorded": True})

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics."""
        metrics, routing = self.gateway.metrics, self.gateway.routing
        metrics.share.set(routing.share if routing.candidate is not None else 0.0)
        metrics.version.clear()
        for arm in ("baseline", "candidate"):
            backend = routing.of(arm)
            metrics.up.labels(arm).set(backend is not None and backend.up)
            if backend is not None:
                metrics.breaker.labels(arm).set(BREAKER[backend.breaker.state])
                metrics.version.labels(arm, backend.label).set(1)
        return Response(metrics.text(), media_type=metrics.content_type)

    async def healthz(self, request: Request) -> Response:
        """GET /healthz: 503 where no arm has a server that runs."""
        facts = self.health()
        return answer(facts, status=200 if facts["status"] == "ok" else 503)

    async def refuse(self, request: Request, failure: Exception) -> Response:
        """A `Failure` as the OpenAI API words it."""
        assert isinstance(failure, Failure)
        headers = {}
        if failure.retry_after or failure.status in (429, 503):
            headers["retry-after"] = failure.retry_after or "1"
        return answer({"error": problem(failure)}, status=failure.status, headers=headers)


async def while_there(request: Request, work: Coroutine[Any, Any, Shown]) -> Shown:
    """Do the work, or give it up where the client leaves: a back end should not answer nobody."""
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    gone: asyncio.Task[Any] = loop.create_task(request.receive())  # type: ignore[arg-type]
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Failure):
                shown = await task
                if shown.events is not None and shown.over is not None:  # it was just about to begin
                    await shown.events.aclose()
                    shown.over()
            raise Failure("client gone", status=499)
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _not_found(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    failure = Failure("not found", f"no {request.method} {request.url.path} here", status=status)
    return answer({"error": problem(failure)}, status=status)


def answer(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(encode(value), status_code=status, headers=headers, media_type="application/json")
