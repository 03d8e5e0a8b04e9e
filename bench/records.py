"""What is kept of one request, and the figures over many. docs/bench.md has the formulas."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from msgspec import field

from bench.schedule import Load
from unshot.case import Slo
from unshot.contracts.figures import (
    Distribution,
    Figures,
    Goodput,
    InFlight,
    Percentile,
    TokenDifference,
    Tokens,
)
from unshot.contracts.record import Record
from unshot.contracts.report import SideName
from unshot.engines.timing import itl, tpot, ttft
from unshot.metrics.ratios import percentile_interval

PERCENTILES = (50, 90, 95, 99)
ODD = ("untimed", "cut_prompts", "cached_known", "one_piece", "past_limit", "ended_early", "held_open")
# Fewer prompt tokens than this share of the words (or of our count): the server cut the prompt.
CUT = 0.9
# Seconds that a response stayed open after its answer's end: the client waited for nothing, and sent nothing meanwhile.
OPEN = 0.45
# Requests sent and requests ended in a window, and its length in seconds.
Window = tuple[list["RequestRecord"], list["RequestRecord"], float]
SIDES: tuple[SideName, SideName] = ("baseline", "candidate")


class RequestRecord(Record, kw_only=True):
    """One request. Times are seconds: `scheduled` and `start` since the run began, the others since `scheduled`.

    Latencies count from the scheduled time, so that waiting for the client or the system is latency and not left out.
    `token_times` are the arrivals of what holds tokens, and `timed_tokens` the tokens in them; `output_tokens` is all
    that was generated, a stop token included that has no arrival of its own. None is a count that nobody knows.
    `error` is the kind of failure, else None; of a failed request `e2e` is None and `elapsed` what it took.
    """

    side: SideName
    mode: str
    row: int
    block: int
    request: int = -1
    # Which conversation it is of, and which turn of it, from 0.
    conversation: int | None = None
    turn: int | None = None
    scheduled: float
    start: float
    token_times: list[float] = field(default_factory=list)
    # When the first token of the answer itself came, where reasoning came before it.
    first_answer: float | None = None
    e2e: float | None = None
    elapsed: float = 0.0
    # Looking up the host, connecting and the TLS handshake, where the request waited for that.
    connect: float | None = None
    prompt_tokens: int | None = None
    # The fewest tokens that the prompt can have: by our tokenizer, else its words.
    least_prompt: int | None = None
    # The most and (asked to go on past its end) the fewest tokens that the answer was asked to have.
    most_tokens: int | None = None
    least_tokens: int | None = None
    # The model that the server says the answer is of.
    model: str | None = None
    output_tokens: int | None = None
    timed_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    # The server's own count, where ours is by a tokenizer.
    server_tokens: int | None = None
    text: str = ""
    finish: str | None = None
    error: str | None = None
    detail: str | None = None
    retry_after: str | None = None
    # What a golden server says it did, and when.
    golden: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        """Whether the request was answered."""
        return self.error is None

    @property
    def ttft(self) -> float:
        """Time to first token; NaN where none came."""
        return ttft(self.token_times, 0.0)

    @property
    def ttft_answer(self) -> float:
        """Time to the first token of the answer itself; NaN where only reasoning came."""
        return math.nan if self.first_answer is None else self.first_answer

    @property
    def tpot(self) -> float:
        """Time per output token after the first; NaN below two tokens or where their number is not known."""
        return tpot(self.token_times, self.timed_tokens)

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: time between arrivals that follow each other."""
        return itl(self.token_times)

    @property
    def seconds(self) -> float:
        """End-to-end time; NaN of a failed request."""
        return math.nan if self.e2e is None else self.e2e

    @property
    def per_token(self) -> float:
        """End-to-end time per output token; NaN where the number of tokens is not known."""
        return self.seconds / self.output_tokens if self.output_tokens else math.nan

    @property
    def cut_prompt(self) -> bool:
        """Whether the server counted fewer prompt tokens than it was sent."""
        known = self.prompt_tokens is not None and self.least_prompt is not None
        return known and (self.prompt_tokens or 0) < CUT * (self.least_prompt or 0)

    @property
    def one_piece(self) -> bool:
        """Whether an answer of several tokens had one arrival: nobody knows when its first token was there."""
        tokens = self.output_tokens or len(self.text.split())
        # A token, and the stop token.
        return len(self.token_times) == 1 and tokens > 2

    @property
    def _shown_tokens(self) -> int | None:
        """The server's own count where there are two, without reasoning, which limits may not count."""
        count = self.output_tokens if self.server_tokens is None else self.server_tokens
        return None if count is None else count - (self.reasoning_tokens or 0)

    @property
    def past_limit(self) -> bool:
        """Whether it is longer than was asked for; a stop token is allowed."""
        count, most = self._shown_tokens, self.most_tokens
        return count is not None and most is not None and count > most + 1

    @property
    def ended_early(self) -> bool:
        """Whether it ended before the length that it was asked to go on to."""
        count, least = self._shown_tokens, self.least_tokens
        return count is not None and least is not None and count < least - 1

    @property
    def held_open(self) -> bool:
        """Whether the response stayed open after the answer's end."""
        return self.elapsed - self.seconds > OPEN

    @property
    def queue(self) -> float:
        """Time between the scheduled and the actual start."""
        return max(0.0, self.start - self.scheduled)

    @property
    def end(self) -> float:
        """When the system was done with it, seconds since the run began."""
        return self.scheduled + (self.elapsed if self.e2e is None else self.e2e)


def distribution(values: Iterable[float] | np.ndarray, *, scale: float = 1000.0) -> Distribution:
    """Count, mean, standard deviation, extremes and percentiles with 95% intervals; milliseconds by default.

    NaN values are left out. Percentiles are linear between order statistics; their intervals come from the
    binomial distribution of order statistics and are None where the sample is too small to give one.
    """
    array = np.asarray(list(values), dtype=float)
    array = np.sort(array[np.isfinite(array)]) * scale
    if not len(array):
        return Distribution(count=0)
    found = {
        f"p{p}": Percentile(float(np.percentile(array, p)), *percentile_interval(array, p))
        for p in PERCENTILES
    }
    facts = Distribution(
        count=len(array),
        mean=float(array.mean()),
        std=float(array.std(ddof=1)) if len(array) > 1 else None,
        min=float(array[0]),
        max=float(array[-1]),
    )
    return facts.changed(**found)


def summarise(
    records: Sequence[RequestRecord],
    seconds: float | None = None,
    slo: Slo | None = None,
    *,
    asked: int | None = None,
    flow: Sequence[RequestRecord] | None = None,
) -> Figures:
    """Figures of one side in one mode; `seconds` is the time the load took (default: the sum of service times).

    `asked` is the concurrency of a closed loop, held against what the timestamps say. `flow` are the requests that
    ended within `seconds`, where those are not all of `records`: what is counted per second.
    """
    good = [r for r in records if r.ok]
    busy = seconds if seconds is not None else sum(r.seconds for r in good)
    passed = good if flow is None else [r for r in flow if r.ok]
    prompt, output = total([r.prompt_tokens for r in good]), total([r.output_tokens for r in good])
    flowed = [total([getattr(r, name) for r in passed]) for name in ("prompt_tokens", "output_tokens")]
    theirs = [
        r.server_tokens - r.output_tokens
        for r in good
        if r.server_tokens is not None and r.output_tokens is not None
    ]
    bounds = bounds_of(slo)
    return Figures(
        requests=len(records),
        answered=len(good),
        errors=dict(Counter(r.error for r in records if r.error)),
        error_rate=1 - len(good) / len(records) if records else 0.0,
        seconds=busy,
        tokens=token_means(
            len(good),
            prompt,
            output,
            cached_total([r.cached_tokens for r in good]),
            total([r.reasoning_tokens for r in good]),
        ),
        ttft_ms=distribution(r.ttft for r in good),
        ttft_answer_ms=distribution(r.ttft_answer for r in good),
        tpot_ms=distribution(r.tpot for r in good),
        itl_ms=distribution(gap for r in good for gap in r.gaps),
        e2e_ms=distribution(r.seconds for r in good),
        queue_ms=distribution(r.queue for r in good),
        connect_ms=distribution(r.connect for r in records if r.connect is not None),
        requests_per_second=rate(len(passed), busy),
        input_tokens_per_second=rate(flowed[0], busy),
        output_tokens_per_second=rate(flowed[1], busy),
        **odd_counts(good),  # type: ignore[arg-type]
        models=dict(Counter(r.model for r in good if r.model)),
        stopped_at_limit=sum(r.finish == "length" for r in good),
        server_minus_our_tokens=token_difference(len(theirs), sum(theirs), sum(t != 0 for t in theirs)),
        goodput=goodput(
            sum(meets(r, bounds) for r in records),
            len(records),
            busy,
            bounds,
            flow=None if flow is None else sum(meets(r, bounds) for r in flow),
        )
        if bounds
        else None,
        in_flight=in_flight(records, asked) if asked is not None else None,
    )


def total(counts: Sequence[int | None]) -> int | None:
    """The sum of counts that are all known; None where one is not, or there are none."""
    known = [c for c in counts if c is not None]
    return sum(known) if known and len(known) == len(counts) else None


def cached_total(counts: Sequence[int | None]) -> int | None:
    """The sum of the counts that were given; None without any. vLLM leaves out one that is zero."""
    known = [c for c in counts if c is not None]
    return sum(known) if known else None


def odd_counts(good: Iterable[RequestRecord]) -> dict[str, int]:
    """How many answers have what the warnings tell of, by the name that `Figures` has for it."""
    found = dict.fromkeys(ODD, 0)
    for r in good:
        found["untimed"] += len(r.token_times) > 1 and math.isnan(r.tpot)
        found["cut_prompts"] += r.cut_prompt
        found["cached_known"] += r.cached_tokens is not None
        for name in ("one_piece", "past_limit", "ended_early", "held_open"):
            found[name] += getattr(r, name)
    return found


def answered_tokens(records: Iterable[RequestRecord]) -> int:
    """Output tokens of the answered requests, as far as they are known."""
    return sum(r.output_tokens or 0 for r in records if r.ok)


def token_means(
    answered: int, prompt: int | None, output: int | None, cached: int | None, reasoning: int | None
) -> Tokens:
    """Means per answered request out of the sums; None stays None."""

    def mean(count: int | None) -> float | None:
        return None if count is None else count / answered

    share = cached / prompt if cached is not None and prompt else None
    return Tokens(mean(prompt), mean(cached), mean(output), mean(reasoning), share)


def rate(count: int | None, seconds: float) -> float | None:
    """Per second; None where the count is not known or no time passed."""
    return count / seconds if count is not None and seconds > 0 else None


def token_difference(counted: int, added: int, differ: int) -> TokenDifference | None:
    """How the server's counts of output tokens differ from ours; None where no request has both."""
    return TokenDifference(added / counted, differ, counted) if counted else None


def bounds_of(slo: Slo | None) -> dict[str, float]:
    """The SLO's bounds by figure, milliseconds."""
    every = {"ttft": slo.ttft_ms, "tpot": slo.tpot_ms, "e2e": slo.e2e_ms} if slo else {}
    return {k: v for k, v in every.items() if v is not None}


def meets(record: RequestRecord, bounds: dict[str, float]) -> bool:
    """Whether the request was answered within every bound; a one-token answer has no TPOT and cannot miss it."""
    values = {"ttft": record.ttft, "tpot": record.tpot, "e2e": record.seconds}
    return record.ok and all(
        math.isnan(values[name]) or values[name] * 1000 <= bound for name, bound in bounds.items()
    )


def goodput(
    met: int, requests: int, seconds: float, bounds: dict[str, float], *, flow: int | None = None
) -> Goodput:
    """Requests that met every bound per second (`flow`: of those that ended in `seconds`), and their share."""
    return Goodput(bounds, rate(met if flow is None else flow, seconds), met / requests if requests else None)


def steady_window(records: Sequence[RequestRecord], load: Load) -> Window | None:
    """The steady state, from the first answer of every stream to the last request sent: `(sent, ended, seconds)`.

    Latencies are of the requests sent in it, throughput is of those that ended in it: with those sent, one too many a
    stream would count. In open loop it begins when as many requests have ended as were under way at the first one's
    end. None where fewer ended in it than there are streams.
    """
    if not records:
        return None
    ends = sorted(r.end for r in records)
    under_way = load.concurrency or sum(r.scheduled <= ends[0] for r in records)
    begin = ends[min(under_way, len(ends)) - 1]
    end = max(r.scheduled for r in records)
    chosen = [r for r in records if begin <= r.scheduled <= end]
    flow = [r for r in records if begin < r.end <= end]
    return (chosen, flow, end - begin) if len(flow) >= under_way else None


def in_flight(records: Sequence[RequestRecord], asked: int) -> InFlight:
    """Requests under way at once by their timestamps, while each block still had requests to send.

    The mean is over the time from a block's first to its last scheduled request: after that it drains.
    """
    span = area = 0.0
    peak = 0
    blocks: dict[int, list[RequestRecord]] = {}
    for record in records:
        blocks.setdefault(record.block, []).append(record)
    for group in blocks.values():
        last = max(r.scheduled for r in group)
        for begin, end, count in _levels(group):
            peak = max(peak, count)
            inside = max(0.0, min(end, last) - begin)
            span, area = span + inside, area + inside * count
    return InFlight(asked, area / span if span else float(peak), peak)


def machine_seconds(records: Sequence[RequestRecord]) -> list[float]:
    """Seconds of the machine that each request took: time is shared evenly by the requests under way.

    The shares of a run add up to the time in which at least one request was under way. With one request at a time a
    share is the request's own time.
    """
    times: list[float] = []
    levels: list[float] = []
    area = 0.0
    for begin, end, count in _levels(records):
        times.append(begin)
        levels.append(area)
        area += (end - begin) / count if count else 0.0
        times.append(end)
        levels.append(area)
    starts = np.interp([r.scheduled for r in records], times or [0.0], levels or [0.0])
    ends = np.interp([r.end for r in records], times or [0.0], levels or [0.0])
    return [float(b - a) for a, b in zip(starts, ends, strict=True)]


def _levels(records: Sequence[RequestRecord]) -> list[tuple[float, float, int]]:
    """`(begin, end, requests under way)` of every stretch between two events."""
    changes: Counter[float] = Counter()
    for record in records:
        changes[record.scheduled] += 1
        changes[record.end] -= 1
    stretches, count = [], 0
    for begin, end in pairwise(sorted(changes)):
        count += changes[begin]
        stretches.append((begin, end, count))
    return stretches
