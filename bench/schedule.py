"""When requests are sent: closed loop, or open loop at constant, Poisson or gamma intervals, or by a trace."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unshot.data.rows import Message, read_text
from unshot.errors import InputError, nearest

FORMS = {
    "closed": "closed:CONCURRENCY",
    "constant": "constant:RATE",
    "poisson": "poisson:RATE",
    "gamma": "gamma:RATE:CV",
    "trace": "trace:FILE",
}


@dataclass(frozen=True)
class Load:
    """A parsed load. `rate` is requests a second, `cv` the coefficient of variation of the intervals."""

    kind: str
    concurrency: int = 0
    rate: float = 0.0
    cv: float = 1.0
    times: tuple[float, ...] = ()
    text: str = ""
    # What a trace asks at its times: messages, or an input for the prompt. Empty: the target's own requests.
    requests: tuple[str | list[Message], ...] = ()
    # Seconds that each of them took to be answered, where the log says so (`e2e_s`).
    spans: tuple[float | None, ...] = ()

    @property
    def open(self) -> bool:
        """Whether requests are sent by the clock, whatever the server does."""
        return self.kind != "closed"

    def most(self, seconds: float) -> int:
        """As many requests as an open loop may send within `seconds`, and some more."""
        if self.kind == "trace":
            return len(self.times)
        return int(self.rate * seconds * 1.5 + 10 * math.sqrt(self.rate * seconds) + 100)

    def arrivals(self, count: int, *, seed: int = 0) -> np.ndarray:
        """Scheduled times in seconds from the start, ascending, shape `(count,)` (a trace may hold fewer).

        The mean rate is `rate`; gamma intervals have shape 1/cv^2, so that cv above 1 makes bursts.
        """
        if self.kind == "trace":
            return np.asarray(self.times[:count])
        if self.kind == "constant":
            return np.arange(count) / self.rate
        generator = np.random.default_rng(seed)
        shape = 1.0 if self.kind == "poisson" else 1 / self.cv**2
        intervals = generator.gamma(shape, 1 / (self.rate * shape), size=count)
        times: np.ndarray = np.concatenate([[0.0], np.cumsum(intervals)[:-1]])
        return times


def deal_out(
    load: Load, payloads: Sequence[bytes], clients: int, *, seed: int
) -> list[tuple[Load, list[bytes]]]:
    """The load dealt out to `clients`, each with its requests; together they are the one schedule.

    A closed loop's requests go by the streams, so that all of these are busy to the end. Who would have nothing to
    send is left out.
    """
    if load.open:
        arrivals = load.arrivals(len(payloads), seed=seed)
        loads = [
            Load("trace", times=tuple(arrivals[i::clients].tolist()), text=load.text) for i in range(clients)
        ]
        owners = list(range(clients))
        payloads = payloads[: len(arrivals)]
    else:
        streams = [load.concurrency // clients + (i < load.concurrency % clients) for i in range(clients)]
        loads = [Load("closed", concurrency=n, text=load.text) for n in streams if n]
        owners = [i for i, n in enumerate(streams) for _ in range(n)]
    parts: list[list[bytes]] = [[] for _ in loads]
    for number, payload in enumerate(payloads):
        parts[owners[number % len(owners)]].append(payload)
    found = [(one, part) for one, part in zip(loads, parts, strict=True) if part]
    return found or [(loads[0], [])]


def parse_load(text: str) -> Load:
    """`closed:4`, `constant:10`, `poisson:10`, `gamma:10:2`, `trace:FILE`. Raises `InputError`."""
    kind, _, rest = text.partition(":")
    if kind not in FORMS:
        raise InputError(
            f"unknown load `{text}`; {nearest(kind, FORMS)} (forms: {', '.join(FORMS.values())})"
        )
    if kind == "trace":
        return _trace(Path(rest), text)
    try:
        numbers = [float(part) for part in rest.split(":")]
        if len(numbers) != (2 if kind == "gamma" else 1) or not all(0 < n < float("inf") for n in numbers):
            raise ValueError
    except ValueError:
        raise InputError(f"load `{text}`: give {FORMS[kind]} with numbers above 0") from None
    if kind == "closed":
        if numbers[0] != int(numbers[0]):
            raise InputError(f"load `{text}`: the concurrency must be a whole number")
        return Load(kind, concurrency=int(numbers[0]), text=text)
    return Load(kind, rate=numbers[0], cv=numbers[1] if kind == "gamma" else 1.0, text=text)


def _trace(path: Path, text: str) -> Load:
    """Send times in seconds: one number a line, or JSONL with `timestamp` (Mooncake's, in ms) or `time` (s).

    A request log with texts (a file of it, or its directory) is replayed: each line's `messages`, `input` or `prompt`
    is what is sent at its time. What the gateway asked beside a real request (`shadow`) is left out.
    """
    files = sorted(path.glob("requests*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: no requests*.jsonl in it; give a request log or a file of send times")
    found: list[tuple[float, str | list[Message] | None, float | None]] = []
    for file in files:
        for number, line in enumerate(read_text(file).splitlines(), start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                if isinstance(value, dict):
                    if value.get("shadow"):
                        continue
                    said = next((value[k] for k in ("messages", "input", "prompt") if value.get(k)), None)
                    when = float(value["time"] if "time" in value else value["timestamp"] / 1000)
                    span = None if value.get("e2e_s") is None else float(value["e2e_s"])
                else:
                    said, when, span = None, float(value), None
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{file}, line {number}: no send time; give a number of seconds, or JSON with `time` (seconds) or "
                    "`timestamp` (milliseconds)"
                ) from None
            if not math.isfinite(when):
                raise InputError(f"{file}, line {number}: the send time is not a finite number")
            found.append((when, said, span))
    if not found:
        raise InputError(f"{path}: empty; it needs one send time a line")
    texts = [said for _, said, _ in found]
    if any(texts) and not all(texts):
        raise InputError(
            f"{path}: {texts.count(None)} of {len(texts)} lines have no text; replay all of them or none"
        )
    found.sort(key=lambda entry: entry[0])
    return Load(
        "trace",
        times=tuple(when - found[0][0] for when, _, _ in found),
        requests=tuple(said for _, said, _ in found if said is not None),
        spans=tuple(span for _, _, span in found),
        text=text,
    )
