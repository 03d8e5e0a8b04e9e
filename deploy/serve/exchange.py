"""What one request holds on its way: the arms of the moment, what was asked, each arm's try, what is shown."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from deploy.serve.backend import Backend, Failure
from deploy.serve.target import text_of
from unshot.contracts.request_log import Arm


@dataclass(frozen=True)
class Routing:
    """Both arms and the candidate's share, 0 to 1: replaced as a whole, so that a request sees one state of it."""

    baseline: Backend | None = None
    candidate: Backend | None = None
    share: float = 0.0

    def of(self, arm: Arm) -> Backend | None:
        return self.baseline if arm == "baseline" else self.candidate

    def draw(self, unit: str) -> Arm:
        """The arm of a unit. A larger share keeps all units that a smaller one had in the candidate."""
        if self.candidate is None or self.baseline is None:
            return "baseline" if self.candidate is None else "candidate"
        return "candidate" if int(unit[:13], 16) < self.share * 16**13 else "baseline"


def unit_of(key: str) -> str:
    """The hash of a sticky key: tells units apart without telling who they are."""
    return hashlib.sha256(b"unshot:" + key.encode()).hexdigest()[:16]


@dataclass
class Asked:
    """A request as it came. `arrival` is `time.perf_counter()` seconds, `at` seconds since 1970."""

    id: str
    request: dict[str, Any]
    unit: str
    routing: Routing
    arrival: float
    at: float = field(default_factory=time.time)
    slice: str | None = None

    def __post_init__(self) -> None:
        self.assigned: Arm = self.routing.draw(self.unit)
        self.stream = self.request.get("stream") is True
        self.text = text_of(self.request["messages"][-1])
        options = self.request.get("stream_options")
        self.usage = isinstance(options, dict) and options.get("include_usage") is True


@dataclass
class Try:
    """One arm's answer, or why there is none."""

    arm: Arm
    backend: Backend
    begin: float
    error: Failure | None = None
    kind: str | None = None
    raw: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    ok: bool | None = None
    label: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    queued: float | None = None
    ttft: float | None = None
    e2e: float | None = None
    logprob: float | None = None

    def fail(self, failure: Failure) -> None:
        self.error, self.kind = failure, failure.kind


@dataclass
class Shown:
    """What goes back: an object, or a stream of server-sent events with what to call at its end; and who made it."""

    arm: Arm
    version: str
    whole: dict[str, Any] | None = None
    events: AsyncGenerator[bytes, None] | None = None
    over: Callable[[], None] | None = None


def left(arm: Arm, backend: Backend, begin: float) -> Try:
    """A try that the client did not wait for."""
    tried = Try(arm, backend, begin, e2e=time.perf_counter() - begin)
    tried.fail(Failure("client gone", status=499))
    return tried
