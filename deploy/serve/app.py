"""The gateway's HTTP side: OpenAI-compatible routes, feedback, health, metrics, and what is refused before an arm."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import math
import time
import urllib.parse
import uuid
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Annotated, Any

from msgspec import Meta
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from deploy.serve.exchange import Asked, Shown, position_of
from deploy.serve.failure import Failure
from deploy.serve.gateway import Gateway
from deploy.serve.metrics import BREAKER, gauge
from deploy.serve.parameters import LONGEST_KEY, ChatRequest, bad, checked, decoded, passed_on
from deploy.serve.shared import ACTIVE, Cell, Rates, Shared
from deploy.serve.target import encode, own_messages
from deploy.serve.tracing import context_of
from unshot.contracts.record import Record, RecordError
from unshot.contracts.request_log import USER, Arm, Feedback
from unshot.data.prompts import Prompt

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OUT_OF_SCOPE = {
    "responses": "the responses API", "embeddings": "embeddings", "completions": "the old completions API",
    "images": "images", "audio": "audio", "files": "files", "batches": "batches", "moderations": "moderations",
    "assistants": "assistants", "threads": "threads", "fine_tuning": "fine-tuning", "vector_stores": "vector stores",
    "uploads": "uploads", "realtime": "the realtime API", "conversations": "conversations",
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What the gateway takes. `body` in bytes, `read_timeout` seconds for a request to have come whole.

    `host` is the address that it listens on, `hosts` the names that it goes by, `origins` the pages that may ask it.
    `unknown` says what happens to parameters that are not passed on: `refuse` or `drop`.
    """

    body: int = 1 << 20
    concurrency: int = 64
    # Users' keys, separated by commas, and how many requests a minute each may send.
    key: str | None = field(default=None, repr=False)
    rate: float | None = None
    reviewer_key: str | None = field(default=None, repr=False)
    read_timeout: float = 10.0
    host: str = "127.0.0.1"
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    unknown: str = "refuse"


class FeedbackBody(Record):
    """The body of POST /v1/feedback. `token` is what the answer came with (`x-unshot-feedback-token`)."""

    id: Annotated[str, Meta(min_length=1, max_length=100)]
    correct: bool | None = None
    correction: Annotated[str, Meta(max_length=100_000)] | None = None
    by: Annotated[str, Meta(min_length=1, max_length=100)] | None = None
    token: Annotated[str, Meta(max_length=100)] | None = None


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


class Api:
    """The routes of one gateway. `known_prompt` is the long prompt that clients may send themselves."""

    def __init__(
        self,
        gateway: Gateway,
        limits: Limits,
        health: Callable[[], object],
        *,
        known_prompt: Prompt | None = None,
        shared: Shared | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.gateway = gateway
        self.limits = limits
        self.health = health
        self.known_prompt = known_prompt
        self.warn = warn
        # Requests under way of this process, and in `cell` of all.
        self.active = 0
        self.cell = shared.cell("gateway") if shared is not None else Cell()
        self._keys = [key.strip().encode() for key in (limits.key or "").split(",") if key.strip()]
        folder = shared.folder / "rates" if shared is not None else None
        self._rates = Rates(limits.rate, folder) if limits.rate is not None else None
        self._stopping = False
        self._reading: set[asyncio.Timeout] = set()

    def app(self, lifespan: Callable[[Any], AbstractAsyncContextManager[None]] | None = None) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
            Route("/v1/models", self._guarded(self.models)),
            Route("/v1/models/{name:path}", self._guarded(self.model)),
            Route("/v1/feedback", self._guarded(self.feedback), methods=["POST"]),
            Route("/metrics", self._guarded(self.show_metrics)),
            Route("/healthz", self._guarded(self.healthz)),
        ]
        handlers: dict[Any, Any] = {404: self._not_found, 405: self._not_found}
        app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
        app.router.redirect_slashes = False  # it would lead to whatever host a request names
        return app

    def stop(self) -> None:
        """Give up on requests whose body has not come yet: the gateway is about to end."""
        self._stopping = True
        for timeout in list(self._reading):
            with contextlib.suppress(RuntimeError):
                timeout.reschedule(asyncio.get_running_loop().time())

    def _guarded(
        self, work: Callable[[Request], Coroutine[Any, Any, Response]]
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """A route that answers every failure in the API's words."""

        async def route(request: Request) -> Response:
            try:
                self._check_source(request)
                return await work(request)
            except Failure as failure:
                return self._refusal(failure)
            except ClientDisconnect:
                return self._refusal(Failure("client gone", status=499))
            except Exception as error:  # a fault of ours: said, counted, and answered
                self.warn(f"a request ended in {type(error).__name__}: {str(error)[:200]}; please report it")
                self.gateway.metrics.failed.labels("internal").inc()
                return self._refusal(Failure("internal", "the gateway failed at this request", status=500))

        return route

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        arrival = time.perf_counter()
        self._check_key(request)
        self._check_rate(request)
        body, safe = self._checked(await self._read(request))
        number = f"chatcmpl-{uuid.uuid4().hex}"
        asked = self._asked(request, body, safe, number, arrival)
        # Only now: a client that sends nothing, or slowly, takes nobody's place.
        active = self.cell.total(ACTIVE)
        if active >= self.limits.concurrency:
            raise self._rejected("busy", f"{active} requests are under way; try again", 429, "1")
        self._begun()
        try:
            shown = await while_there(request, self.gateway.answer(asked, self._ended))
        except Failure as failure:
            self.gateway.metrics.failed.labels(failure.kind).inc()
            raise
        headers = {
            "x-unshot-version": header(shown.version),
            "x-unshot-arm": shown.arm,
            "x-request-id": number,
        }
        if self.gateway.log is not None:
            headers["x-unshot-feedback-token"] = self.gateway.log.token_of(number)
        if shown.events is not None:
            headers["cache-control"] = "no-cache"
            return Events(shown, headers)
        return answer(shown.whole, headers=headers)

    def _asked(
        self, request: Request, body: ChatRequest, safe: ChatRequest | None, number: str, arrival: float
    ) -> Asked:
        key = (request.headers.get("x-unshot-user") or body.user or number)[:LONGEST_KEY]
        log = self.gateway.log
        own, drawn = self._own_messages(body)
        return Asked(
            number,
            body,
            position_of(key),
            log.unit_of(key) if log is not None else "",
            self.gateway.routing,
            arrival,
            slice=(request.headers.get("x-unshot-slice") or "")[:LONGEST_KEY] or None,
            own_messages=own,
            drawn=drawn and safe is not None,
            checked_request=safe,
            authorization=request.headers.get("authorization") if self.gateway.record else None,
            trace=context_of(request.headers) if self.gateway.tracing is not None else {},
        )

    def _own_messages(self, body: ChatRequest) -> tuple[list[dict[str, object]], bool]:
        """The user's own messages, and whether the candidate may get them in place of the whole request.

        Of a request that begins with the task's long prompt, message by message, each arm brings the prompt itself.
        Any other prompt of the client's stays what it is: only the baseline of a recording gateway takes it.
        """
        known = own_messages(body.messages, self.known_prompt)
        if known is not None:
            return known, True
        if self.gateway.record:
            return body.messages, False
        if body.brings_prompt and self._brings_prompt():
            place = next(i for i, m in enumerate(body.messages) if m["role"] in ("system", "developer"))
            message = (
                "send the user's own messages only, or the task's long prompt as it is in the case file: the gateway "
                "puts the task's prompt in front"
            )
            self.gateway.metrics.rejected.labels("bad request").inc()
            raise bad(message, f"messages[{place}]")
        return body.messages, True

    def _begun(self) -> None:
        self.active += 1
        self.cell.count(ACTIVE, 1)

    def _ended(self) -> None:
        self.active -= 1
        self.cell.count(ACTIVE, -1)

    async def _read(self, request: Request) -> bytes:
        """The body, in time, and refused as soon as it is known to be too long."""
        limits = self.limits
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise self._rejected("content type", "send the body as `Content-Type: application/json`", 415)
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limits.body:
            raise self._rejected("too long", f"the body has more than {limits.body} bytes", 413)
        parts, size = [], 0
        try:
            async with asyncio.timeout(0 if self._stopping else limits.read_timeout) as timeout:
                self._reading.add(timeout)
                try:
                    async for part in request.stream():
                        size += len(part)
                        if size > limits.body:
                            raise self._rejected(
                                "too long", f"the body has more than {limits.body} bytes", 413
                            )
                        parts.append(part)
                finally:
                    self._reading.discard(timeout)
        except TimeoutError:
            if self._stopping:
                raise self._rejected("stopping", "the gateway is stopping", 503) from None
            raise self._rejected(
                "too slow", f"the body did not come within {limits.read_timeout:g} s", 408
            ) from None
        return b"".join(parts)

    def _checked(self, raw: bytes) -> tuple[ChatRequest, ChatRequest | None]:
        """A request that the baseline can take, and in the form that any arm can; None where there is no such form.

        Raises `Failure` 400 or 404.
        """
        try:
            body = decoded(raw)
            if self.gateway.record:
                found = passed_on(body)
                with contextlib.suppress(Failure):
                    return found, checked(body, unknown="drop")
                return found, None
            found = checked(body, unknown=self.limits.unknown)
        except Failure as failure:
            self.gateway.metrics.rejected.labels(failure.kind).inc()
            raise
        if found.model not in (None, self.gateway.name):
            raise self._rejected(
                "model", f"no model `{str(found.model)[:80]}` here; ask for `{self.gateway.name}`", 404
            )
        return found, found

    def _brings_prompt(self) -> bool:
        routing = self.gateway.routing
        return any(b and b.target.brings_prompt for b in (routing.baseline, routing.candidate))

    def _rejected(self, reason: str, message: str, status: int, retry_after: str | None = None) -> Failure:
        self.gateway.metrics.rejected.labels(reason).inc()
        return Failure(reason, message, status=status, retry_after=retry_after)

    def _check_source(self, request: Request) -> None:
        """Refuse what a web page of another site makes a browser send (DNS rebinding, cross-site requests)."""
        name = host_name(request.headers.get("host", ""))
        if not self._own_name(name):
            raise self._rejected("host", f"no host `{name[:80]}` here; --allow-host NAME adds one", 421)
        origin = request.headers.get("origin")
        if origin is None or origin in self.limits.origins:
            return
        same = {f"{scheme}://{request.headers.get('host', '')}".lower() for scheme in ("http", "https")}
        if origin.lower() not in same:
            raise self._rejected(
                "origin", "web pages of another origin are refused; --allow-origin ORIGIN adds one", 403
            )

    def _own_name(self, name: str) -> bool:
        limits = self.limits
        if name in limits.hosts or name == limits.host.lower():
            return True
        if limits.host in LOOPBACK:
            return name in LOOPBACK
        # A name that is not ours may lead here for a page's sake; an address cannot, and neither can a key be guessed.
        return name in LOOPBACK or is_address(name) or (limits.key is not None and not limits.hosts)

    def _check_key(self, request: Request, *, reviewer: bool = False) -> bool:
        """Raise 401 unless the request has the users' key, where there is one; whether it has the reviewers'."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("utf-8", "replace")
        theirs = self.limits.reviewer_key
        if reviewer and theirs is not None and hmac.compare_digest(given, theirs.encode()):
            return True
        # Each is compared, so that the time does not tell which one was nearly right.
        if self._keys and sum(hmac.compare_digest(given, own) for own in self._keys) == 0:
            raise self._rejected("key", "the API key is missing or wrong", 401)
        return False

    def _check_rate(self, request: Request) -> None:
        """Raise 429 where a key (an address, where no keys are asked for) has sent more than its rate allows."""
        if self._rates is None:
            return
        key = request.headers.get("authorization") if self._keys or self.gateway.record else None
        wait = self._rates.wait(key or (request.client.host if request.client else ""))
        if wait:
            message = (
                f"more than {self.limits.rate:g} requests a minute of this key; try again in {wait:.1f} s"
            )
            raise self._rejected("rate", message, 429, str(math.ceil(wait)))

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

    def _model(self) -> dict[str, object]:
        return {"id": self.gateway.name, "object": "model", "created": 0, "owned_by": "unshot"}

    async def feedback(self, request: Request) -> Response:
        """POST /v1/feedback."""
        reviewer = self._check_key(request, reviewer=True)
        log = self.gateway.log
        if log is None:
            raise Failure("no log", "feedback needs a log; start the gateway with --log DIR", status=409)
        self._check_rate(request)
        try:
            given = FeedbackBody.from_json(await self._read(request))
        except (RecordError, RecursionError) as error:
            raise self._rejected("bad request", str(error)[:300], 400) from None
        if given.correct is None and given.correction is None:
            raise self._rejected("bad request", "give `correct`, `correction`, or both", 400)
        if not reviewer:
            token = (given.token or request.headers.get("x-unshot-feedback-token") or "").encode(
                "utf-8", "replace"
            )
            if not hmac.compare_digest(token, log.token_of(given.id).encode()):
                raise self._rejected(
                    "token", "`token` must be the answer's own (its header x-unshot-feedback-token)", 403
                )
            if given.by not in (None, USER):
                raise self._rejected(
                    "token", "`by` other than `user` needs the reviewers' key (--reviewer-key-env)", 403
                )
        by = (given.by or "reviewer") if reviewer else USER
        correct, correction, said = given.correct, given.correction, {}
        if correction is not None and not log.settings.texts:
            correction = self._known_label(correction)
            if correction is None:  # a text, and what it says of the answer is all that may be kept of it
                correct = False if correct is None else correct
                said = {"correction": "not kept: it is none of the task's labels, and texts are not logged"}
        log.put(Feedback(given.id, time.time(), correct, correction, by))
        self.gateway.metrics.feedback.labels(str(correct).lower()).inc()
        return answer({"id": given.id, "recorded": True, **said})

    def _known_label(self, text: str) -> str | None:
        """The one of the task's own labels that a text states; None where it states none, or the task has none."""
        routing = self.gateway.routing
        arms = [b.target.checker for b in (routing.baseline, routing.candidate) if b is not None]
        return next((label for c in arms if c.closed and (label := c.check(text)[1]) is not None), None)

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics."""
        metrics, routing = self.gateway.metrics, self.gateway.routing
        arms: tuple[Arm, Arm] = ("baseline", "candidate")
        there = {arm: backend for arm in arms if (backend := routing.of(arm)) is not None}
        share = routing.share if routing.candidate is not None else 0.0
        now = [
            gauge("active_requests", "Requests under way", (self.cell.total(ACTIVE), {})),
            gauge("candidate_share", "Share of units drawn into the candidate, 0 to 1", (share, {})),
            gauge("breaker_state", "0 closed, 1 half-open, 2 open",
                  *((BREAKER[b.breaker.state], {"arm": arm}) for arm, b in there.items())),
            gauge("backend_up", "Whether the arm's server runs",
                  *((arm in there and there[arm].up, {"arm": arm}) for arm in arms)),
            gauge("serving", "1 for the version behind each arm",
                  *((1, {"arm": arm, "version": b.label}) for arm, b in there.items())),
        ]  # fmt: skip
        return Response(metrics.text(now), media_type=metrics.content_type)

    async def healthz(self, request: Request) -> Response:
        """GET /healthz: 503 where no arm has a server that answers."""
        facts = self.health()
        good = isinstance(facts, dict) and facts.get("status") != "no back end"
        return answer(facts, status=200 if good else 503)

    def _refusal(self, failure: Failure) -> Response:
        """A `Failure` as the OpenAI API words it."""
        headers = {}
        if failure.retry_after or failure.status in (429, 503):
            headers["retry-after"] = failure.retry_after or "1"
        if failure.status in (408, 413) or self._stopping:
            headers["connection"] = "close"
        return answer(failure.body(), status=failure.status, headers=headers)

    async def _not_found(self, request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        path = request.url.path
        name = path.removeprefix("/v1/").partition("/")[0]
        if path.startswith("/v1/") and name in OUT_OF_SCOPE:
            detail = f"{OUT_OF_SCOPE[name]} is out of this gateway's scope; use /v1/chat/completions"
            failure = Failure("not supported", detail, status=404)
        else:
            failure = Failure("not found", f"no {request.method} {path[:200]} here", status=status)
        return self._refusal(failure)


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


def host_name(header: str) -> str:
    """The name in a Host header, without its port and brackets, lower case."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.rpartition(":")[0].lower() if header.count(":") == 1 else header.lower()


def is_address(name: str) -> bool:
    """Whether a name is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def header(value: str) -> str:
    """A value as a header can hold it: printable ASCII, the rest escaped as in a URL."""
    return urllib.parse.quote(value, safe=" !#$&'()*+,/:;=?@[]~<>{}|^`\"")[:1000]


def answer(value: object, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response."""
    content = encode(value).encode("utf-8", "replace")
    return Response(content, status_code=status, headers=headers, media_type="application/json")
