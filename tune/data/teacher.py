"""A model that answers with the long prompt: a server with OpenAI's chat API, or a model file on this machine."""

from __future__ import annotations

import hashlib
import json
import random
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tune.data.ledger import Entry, Status
from unshot.data.example import without_tools
from unshot.data.rows import Message
from unshot.engines.address import Address, parse_url, read_key, request_once
from unshot.engines.openai import CHAT, LIMITS, PATHS
from unshot.errors import InputError, OutsideError
from unshot.prices import TokenPrice

# Answers of a server that ask for patience.
BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
TRIES = 8
LONGEST_WAIT = 120.0


@dataclass(frozen=True)
class Question:
    """One request: its messages and how it is sampled (temperature 0 is greedy)."""

    messages: Sequence[Message]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0

    def key(self, teacher: str) -> str:
        """What tells one request from another, whichever process asks it."""
        text = json.dumps([teacher, list(self.messages), self.max_tokens, self.temperature, self.seed])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class Teacher(Protocol):
    """Answers questions, from several threads at once if it is a server."""

    @property
    def name(self) -> str:
        """What the report calls it."""

    @property
    def concurrent(self) -> bool:
        """Whether it answers several questions at a time."""

    def ask(self, question: Question) -> Entry:
        """The answer, or why there is none."""

    def close(self) -> None:
        """Free what it holds."""


@dataclass
class ServerTeacher:
    """A server. Every thread waits when the server asks for it, and for as long as it says."""

    address: Address
    model: str
    key: str | None = field(default=None, repr=False)
    price: TokenPrice | None = None
    logprobs: bool = False
    timeout: float = 120.0
    _resume_at: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    waited: int = 0
    # Under which name it takes the longest answer, and whether it takes a temperature.
    limit_field: str = LIMITS[0]
    takes_temperature: bool = True

    @property
    def name(self) -> str:
        """`model at address`."""
        return f"{self.model} at {self.address.base}"

    @property
    def concurrent(self) -> bool:
        return True

    def body(self, question: Question) -> dict[str, object]:
        """The request's JSON."""
        messages, tools = without_tools(question.messages)
        body: dict[str, object] = {
            "model": self.model,
            "messages": messages,
            **({"tools": tools} if tools else {}),
            self.limit_field: question.max_tokens,
        }
        if self.takes_temperature:
            body["temperature"] = question.temperature
        if question.temperature:
            body["seed"] = question.seed
        if self.logprobs:
            body |= {"logprobs": True, "top_logprobs": 2}
        return body

    def ask(self, question: Question) -> Entry:
        """Ask until there is an answer, with patience. Raises `OutsideError` if the server refuses the key."""
        key = question.key(self.name)
        detail, lost = "", 0
        for attempt in range(TRIES):
            self._wait()
            body = self.body(question)
            raw = json.dumps(body, ensure_ascii=False).encode()
            try:
                status, headers, answer = request_once(
                    self.address, PATHS[CHAT], body=raw, key=self.key, timeout=self.timeout
                )
            except OSError as error:
                detail = f"{type(error).__name__}: {error}"
                # A server that could not be reached at all has not charged.
                lost += not isinstance(error, ConnectionRefusedError | socket.gaierror)
                self._pause(_backoff(attempt))
                continue
            if status in (401, 403):
                raise OutsideError(
                    f"{self.address.base}: the teacher refuses the key (HTTP {status}); see --key-env"
                )
            if status == 402 or (status == 429 and b"insufficient_quota" in answer):
                raise OutsideError(f"{self.address.base}: the account has no credit left ({_said(answer)})")
            if status == 400 and self._adapt(body, _said(answer)):
                continue
            if status not in BUSY:
                return read_reply(key, status, answer, self.price).changed(lost=lost)
            detail = f"http {status}"
            self._pause(_retry_after(headers) or _backoff(attempt))
        return Entry(key, "failed", detail=f"{detail} ({TRIES} tries)", lost=lost)

    def close(self) -> None:
        pass

    def _adapt(self, body: Mapping[str, object], said: str) -> bool:
        """Whether the server refused a field by name, without which it can be asked again (OpenAI's newer models)."""
        if LIMITS[0] in body and LIMITS[1] in said:
            self.limit_field = LIMITS[1]
        elif "temperature" in body and "temperature" in said:
            self.takes_temperature = False
        else:
            return False
        return True

    def _wait(self) -> None:
        while True:
            with self._lock:
                left = self._resume_at - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, 1.0))

    def _pause(self, seconds: float) -> None:
        with self._lock:
            self.waited += 1
            self._resume_at = max(self._resume_at, time.monotonic() + min(seconds, LONGEST_WAIT))


class EngineTeacher:
    """A model on this machine, by an engine's spec. Greedy, one question at a time, without a bill."""

    concurrent = False

    def __init__(self, spec: str) -> None:
        from unshot.engines import open_engine

        self.name = spec
        self._engine = open_engine(spec)

    def ask(self, question: Question) -> Entry:
        answer = self._engine.generate(
            self._engine.prompt_ids(question.messages), max_tokens=question.max_tokens
        )
        status: Status = "ok" if answer.finish == "stop" else "truncated"
        return Entry(
            question.key(self.name), status, answer.text.strip(), prompt_tokens=answer.prompt_tokens,
            output_tokens=len(answer.ids), cached_tokens=answer.cached, dollars=0.0,
        )  # fmt: skip

    def close(self) -> None:
        self._engine.close()


def read_reply(key: str, status: int, raw: bytes, price: TokenPrice | None) -> Entry:
    """A server's whole answer as an entry; whatever it holds is one entry of some status."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return Entry(key, "malformed" if status == 200 else "failed", detail=f"http {status}, not JSON")
    if status != 200:
        return Entry(key, "failed", detail=f"http {status}: {_said(raw)}")
    usage: Mapping[str, Any] = {}
    if isinstance(value, dict) and isinstance(value.get("usage"), dict):
        usage = value["usage"]
    entry = Entry(
        key,
        "malformed",
        prompt_tokens=_count(usage.get("prompt_tokens")),
        output_tokens=_count(usage.get("completion_tokens")),
        cached_tokens=_cached(usage),
        dollars=_dollars(usage, price),
    )
    if isinstance(value, dict) and value.get("error") and not value.get("choices"):
        # Routers answer 200 and put the provider's error into the body.
        return entry.changed(status="failed", detail=f"http 200: {value['error']}"[:300])
    try:
        choice = value["choices"][0]
        message = choice["message"]
        text, finish = _text(message.get("content")), choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        return entry.changed(detail="no choices[0].message with a text")
    found: Status = "ok"
    detail = str(message.get("refusal") or "")[:300]
    if finish == "length":  # also where a model's reasoning took all tokens and no answer began
        found = "truncated"
    elif message.get("tool_calls") and not text:
        found, detail = "malformed", "it calls a tool and says nothing"
    elif finish == "content_filter" or message.get("refusal") or not text:
        found = "refused"
    return entry.changed(status=found, text=text, detail=detail, margin=_margin(choice))


def _said(raw: bytes) -> str:
    """The message of a server's error."""
    try:
        error = json.loads(raw)["error"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return raw[:300].decode(errors="replace")
    return str(error.get("message") if isinstance(error, dict) else error)[:300]


def _text(content: Any) -> str:
    """A message's text, also where it comes in parts. Raises `TypeError` for anything else."""
    if isinstance(content, list):
        return "".join(_text(part["text"]) for part in content if part.get("type") == "text").strip()
    if content is not None and not isinstance(content, str):
        raise TypeError
    return (content or "").strip()


def _dollars(usage: Mapping[str, Any], price: TokenPrice | None) -> float | None:
    if price is None:
        return None
    prompt, output = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    return None if prompt is None or output is None else price.of(prompt, output, _cached(usage))


def _cached(usage: Mapping[str, Any]) -> int | None:
    details = usage.get("prompt_tokens_details")
    return _count(details.get("cached_tokens")) if isinstance(details, dict) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _margin(choice: Mapping[str, Any]) -> float | None:
    """The least sure token's lead over the next one, in nats; None if the server gave no log-probabilities."""
    try:
        tops = [
            sorted((t["logprob"] for t in token["top_logprobs"]), reverse=True)
            for token in choice["logprobs"]["content"]
        ]
        leads = [float(top[0] - top[1]) for top in tops if len(top) > 1]
    except (KeyError, TypeError, IndexError):
        return None
    return min(leads) if leads else None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


def _backoff(attempt: int) -> float:
    return min(0.5 * 2**attempt, 30.0) * (0.75 + 0.5 * random.random())


def open_teacher(
    spec: str,
    model: str | None,
    key_env: str | None,
    *,
    price: TokenPrice | None,
    logprobs: bool,
    timeout: float,
) -> ServerTeacher | EngineTeacher:
    """`http(s)://HOST/v1` with a model's name, or an engine's spec. Raises `InputError`."""
    if spec.startswith(("http://", "https://")):
        if not model:
            raise InputError(f"--teacher {spec} needs the model's name there; give --teacher-model NAME")
        return ServerTeacher(parse_url(spec), model, read_key(key_env), price, logprobs, timeout)
    if logprobs or price is not None:
        raise InputError("--logprobs and --price are for a server; leave them out")
    return EngineTeacher(spec)
