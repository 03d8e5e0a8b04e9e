"""What one request holds on its way: the arms of the moment, what was asked, each arm's attempt, what is shown."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from deploy.serve.backend import Backend
from deploy.serve.failure import Failure
from deploy.serve.parameters import ChatRequest, Json, last_text
from deploy.serve.reply import Completion, Usage
from unshot.contracts.request_log import Arm


@dataclass(frozen=True)
class Routing:
    """Both arms and the candidate's share, 0 to 1: replaced as a whole, so that a request sees one state of it."""

    baseline: Backend | None = None
    candidate: Backend | None = None
    share: float = 0.0

    def of(self, arm: Arm) -> Backend | None:
        return self.baseline if arm == "baseline" else self.candidate

    @property
    def drawn_share(self) -> float:
        """The share of units that are drawn into the candidate now: all or none where one arm is missing."""
        if self.candidate is None:
            return 0.0
        return self.share if self.baseline is not None else 1.0

    def draw(self, position: str) -> Arm:
        """The arm of a unit. A larger share keeps all units that a smaller one had in the candidate."""
        return "candidate" if int(position[:13], 16) < self.drawn_share * 16**13 else "baseline"


def position_of(key: str) -> str:
    """Where a sticky key stands among all of them, 16 hexadecimal digits; the same in every gateway, never logged."""
    return hashlib.sha256(b"unshot:" + key.encode("utf-8", "replace")).hexdigest()[:16]


@dataclass
class Asked:
    """A request as it came. `arrival` is `time.perf_counter()` seconds, `at` seconds since 1970.

    `own_messages` are the user's own, without the task's long prompt where the client sent it. `drawn` False: only the
    baseline can answer (the client sent a prompt that is not the known one, or what the candidate does not take).
    `checked_request` is what an arm gets that requests are not passed through to.
    """

    id: str
    request: ChatRequest
    position: str
    unit: str
    routing: Routing
    arrival: float
    at: float = field(default_factory=time.time)
    slice: str | None = None
    own_messages: list[Json] = field(default_factory=list)
    drawn: bool = True
    checked_request: ChatRequest | None = None
    authorization: str | None = field(default=None, repr=False)
    # The caller's trace context, for spans.
    trace: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.own_messages = self.own_messages or self.request.messages
        self.share = self.routing.drawn_share if self.drawn else 0.0
        self.assigned: Arm = self.routing.draw(self.position) if self.drawn else "baseline"
        self.text = last_text(self.own_messages)

    @property
    def schema(self) -> Json | None:
        """The JSON schema that an answer is held to; what was passed on unchecked need not hold one."""
        return self.checked_request.schema if self.checked_request is not None else None


@dataclass
class Attempt:
    """One arm's answer, or why there is none."""

    arm: Arm
    backend: Backend
    begin: float
    error: Failure | None = None
    kind: str | None = None
    completion: Completion | None = None
    text: str = ""
    ok: bool | None = None
    label: str | None = None
    request_fault: bool = False
    usage: Usage = field(default_factory=Usage)
    queued: float | None = None
    ttft: float | None = None
    e2e: float | None = None
    logprob: float | None = None

    def fail(self, failure: Failure) -> None:
        self.error, self.kind = failure, failure.kind
        self.request_fault = self.request_fault or failure.request_fault


@dataclass
class Shown:
    """What goes back: an object, or a stream of server-sent events with what to call at its end; and who made it."""

    arm: Arm
    version: str
    whole: Json | None = None
    events: AsyncGenerator[bytes, None] | None = None
    over: Callable[[], None] | None = None


def abandoned(arm: Arm, backend: Backend, begin: float) -> Attempt:
    """An attempt that the client did not wait for."""
    attempt = Attempt(arm, backend, begin, e2e=time.perf_counter() - begin)
    attempt.fail(Failure("client gone", status=499))
    return attempt
