"""What one load came to: distributions of latencies, tokens, energy, cost, the client that drove it and the machine."""

from __future__ import annotations

from msgspec import field

from unshot.contracts.record import Record


class Percentile(Record):
    """A percentile with its 95% interval; a bound is None where the sample is too small to give one."""

    value: float
    low: float | None = None
    high: float | None = None


class Distribution(Record, kw_only=True, omit_defaults=True):
    """Many values of one figure; with `count` 0 nothing else is there."""

    count: int
    mean: float | None = None
    std: float | None = None
    min: float | None = None
    max: float | None = None
    p50: Percentile | None = None
    p90: Percentile | None = None
    p95: Percentile | None = None
    p99: Percentile | None = None
    # Of merged sketches: how far an order statistic may be off.
    relative_error: float | None = None


class Tokens(Record):
    """Means per answered request; None where one answer's count is not known."""

    prompt: float | None
    cached: float | None
    output: float | None
    reasoning: float | None = None
    # Share of all prompt tokens that the server says came out of its cache.
    cached_share: float | None = None


class TokenDifference(Record):
    """The server's counts of output tokens minus ours, where both are there."""

    mean: float
    differ: int
    requests: int


class Goodput(Record):
    """Requests within every bound of the SLO, per second and as a share of all; bounds by figure, milliseconds."""

    slo_ms: dict[str, float]
    requests_per_second: float | None
    share: float | None


class InFlight(Record):
    """Requests under way at once: asked for, and by the timestamps while requests were still being sent."""

    asked: int
    mean: float
    peak: int


class Energy(Record):
    """Joules per answered request, by source and in all."""

    by_source: dict[str, float]
    joules: float


class Cost(Record):
    """Dollars; None without a price, or without the counts that a token price needs."""

    per_1000_requests: float | None
    per_1000_correct: float | None
    machine_seconds_per_request: float | None


class ServerCounters(Record, kw_only=True):
    """What a server counted itself during a load, by its /metrics; None where it does not count that.

    Its other clients' requests, and the warm-up of an A/B run's first mode, are in it. llama.cpp's prompt tokens are
    those that it computed, and its time per token holds the work on prompts in between.
    """

    engine: str
    prompt_tokens: float
    cached_tokens: float | None
    output_tokens: float
    # Means over requests, milliseconds.
    ttft_ms: float | None
    tpot_ms: float | None
    queue_ms: float | None
    # How full its steps were: tokens of all requests, or requests.
    tokens_a_step: float | None = None
    requests_a_step: float | None = None


class Figures(Record, kw_only=True):
    """What one side did under one load. Latencies count from the scheduled time."""

    requests: int
    answered: int
    errors: dict[str, int]
    error_rate: float
    seconds: float
    tokens: Tokens
    ttft_ms: Distribution
    # First token of the answer itself, where reasoning came before it.
    ttft_answer_ms: Distribution
    tpot_ms: Distribution
    itl_ms: Distribution
    e2e_ms: Distribution
    queue_ms: Distribution
    # Looking the host up, connecting and the TLS handshake, of the requests that had to wait for them.
    connect_ms: Distribution
    requests_per_second: float | None
    input_tokens_per_second: float | None
    output_tokens_per_second: float | None
    stopped_at_limit: int
    # Answers of several arrivals without a time per token, since their tokens are not told apart.
    untimed: int = 0
    # Answers to prompts of which the server counted fewer tokens than it was sent.
    cut_prompts: int = 0
    # Answers that say how many of their prompt tokens were cached; the others count as none.
    cached_known: int = 0
    # Answers of several tokens that came in one piece.
    one_piece: int = 0
    # Answers longer than was asked for, and such as ended before the length that they were asked to go on to.
    past_limit: int = 0
    ended_early: int = 0
    # Responses that stayed open after their answer's end, while the client waited.
    held_open: int = 0
    # The models that the answers say they are of.
    models: dict[str, int] = field(default_factory=dict)
    server_minus_our_tokens: TokenDifference | None = None
    goodput: Goodput | None = None
    in_flight: InFlight | None = None
    energy: Energy | None = None
    cost: Cost | None = None
    server: ServerCounters | None = None


class Lateness(Record):
    """Milliseconds."""

    p50_ms: float
    p99_ms: float
    max_ms: float


class Client(Record, kw_only=True):
    """What the client itself did, and whether it kept up. `loop_lag` is weighted by time, not by stalls."""

    valid: bool
    reasons: list[str]
    send_lateness: Lateness | None = None
    loop_lag: Lateness | None = None
    cpu_seconds: float = 0.0
    cpu_seconds_per_1000: float | None = None
    connections: int = 0
    unsent: int = 0
    dns_seconds: float | None = None
    clients: int = 1
    machines: list[str] = field(default_factory=list)


class Gpu(Record, kw_only=True):
    """A GPU as NVML reads it; None where it does not say."""

    name: str
    catalog: str | None = None
    memory_bytes: int
    memory_peak_bytes: int | None = None
    power_mean_w: float | None = None
    power_peak_w: float | None = None
    power_limit_w: float | None = None
    utilisation_mean: float | None = None
    clock_mhz: int | None = None
    clock_max_mhz: int | None = None


class Resources(Record, kw_only=True):
    """What the run took of this machine; `not_readable` says why a figure is missing."""

    memory_peak_bytes: dict[str, int] = field(default_factory=dict)
    gpus: list[Gpu] = field(default_factory=list)
    mean_power_w: dict[str, float] = field(default_factory=dict)
    not_readable: dict[str, str] = field(default_factory=dict)
    samples: int = 0
    sampling_cpu_seconds: float = 0.0
