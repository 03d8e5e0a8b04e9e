"""Spans for OpenTelemetry, by its conventions for generative AI, where the package is installed and set up.

One `chat MODEL` span (kind CLIENT) for each arm that a request was put to, below the caller's span where the request
brings a `traceparent`. No texts and no keys are put into spans. Names and requirements:
opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans (v1.37, in development).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from unshot.errors import OutsideError

if TYPE_CHECKING:
    from deploy.serve.exchange import Asked, Attempt

# Parameters of a request that the conventions name.
PARAMETERS = {
    "temperature": "temperature", "top_p": "top_p", "max_tokens": "max_tokens", "max_completion_tokens": "max_tokens",
    "seed": "seed", "frequency_penalty": "frequency_penalty", "presence_penalty": "presence_penalty",
}  # fmt: skip
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class Tracing(Protocol):
    """Takes what was tried."""

    def record(self, asked: Asked, attempt: Attempt, *, shadow: bool) -> None:
        """Note one arm's answer, or why there is none."""

    def close(self) -> None:
        """Send what is left."""


class Spans:
    """Tracing by OpenTelemetry's API; `provider` None: the process's own."""

    def __init__(self, provider: Any = None) -> None:
        from opentelemetry import trace
        from opentelemetry.propagate import extract

        self._provider = provider or trace.get_tracer_provider()
        self._tracer = self._provider.get_tracer("unshot.gateway")
        self._trace, self._extract = trace, extract

    def record(self, asked: Asked, attempt: Attempt, *, shadow: bool) -> None:
        """A span from the arm's start to now, made when it is over: nothing of a request waits for it."""
        target = attempt.backend.target
        model = target.model or attempt.backend.label
        seconds = attempt.e2e or 0.0
        end = time.time_ns()
        span = self._tracer.start_span(
            f"chat {model}",
            context=self._extract(asked.trace) if asked.trace else None,
            kind=self._trace.SpanKind.CLIENT,
            start_time=end - int(seconds * 1e9),
            attributes={k: v for k, v in facts(asked, attempt, model, shadow).items() if v is not None},
        )
        if attempt.kind is not None:
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, attempt.kind))
        span.end(end)

    def close(self) -> None:
        """Send what is left."""
        shutdown = getattr(self._provider, "shutdown", None)
        if shutdown is not None:
            with contextlib.suppress(Exception):
                shutdown()


def facts(asked: Asked, attempt: Attempt, model: str, shadow: bool) -> dict[str, Any]:
    """A span's attributes; None where something is not known."""
    target, request, usage = attempt.backend.target, asked.request, attempt.usage
    url = urlsplit(target.url or "")
    finish = getattr(attempt.completion, "finish", None)
    found: dict[str, Any] = {
        "gen_ai.operation.name": "chat",
        # The API that is spoken; whose server it is cannot be known from here.
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": model,
        "gen_ai.response.id": asked.id,
        "gen_ai.response.model": (attempt.completion.raw.get("model") if attempt.completion else None),
        "gen_ai.response.finish_reasons": [finish] if isinstance(finish, str) else None,
        "gen_ai.usage.input_tokens": usage.prompt,
        "gen_ai.usage.output_tokens": usage.answer,
        "server.address": url.hostname,
        "server.port": url.port,
        "error.type": attempt.kind,
        "unshot.arm": attempt.arm,
        "unshot.assigned": asked.assigned,
        "unshot.version": attempt.backend.label,
        "unshot.shadow": shadow,
        "unshot.request_fault": attempt.request_fault,
    }
    for name, called in PARAMETERS.items():
        value = request.parameters.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[f"gen_ai.request.{called}"] = value
    if not isinstance(found["gen_ai.response.model"], str):
        found["gen_ai.response.model"] = None
    return found


def context_of(headers: Mapping[str, str]) -> dict[str, str]:
    """The caller's trace context in a request's headers; empty where there is none."""
    return {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}


def open_tracing(environment: Mapping[str, str] = os.environ) -> Spans | None:
    """Tracing where the environment names a collector. Raises `OutsideError` where the packages for it are missing."""
    if not any(environment.get(name) for name in ENDPOINTS) or environment.get("OTEL_SDK_DISABLED") == "true":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise OutsideError(
            f"{ENDPOINTS[0]} is set, and spans need {error.name}; run `pip install opentelemetry-sdk "
            "opentelemetry-exporter-otlp-proto-http`, or unset it"
        ) from None
    provider = TracerProvider(
        resource=Resource.create({"service.name": environment.get("OTEL_SERVICE_NAME") or "unshot"})
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Spans(provider)
