"""`plan.json`: what `unshot plan` forecast. docs/planner.md explains the fields.

Dollars are US dollars; a figure that is missing, unknown or not finite is None.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from unshot.case import Case, Slo
from unshot.contracts.document import Document
from unshot.contracts.record import Record


class ApiTokenPrice(Record):
    """Dollars per token of the API that runs today."""

    model: str
    input_per_token: float
    cached_input_per_token: float
    cache_write_per_token: float
    output_per_token: float
    source: str
    date: str


class MachinePrice(Record):
    """Dollars per hour of one GPU or CPU."""

    name: str
    title: str
    kind: Literal["gpu", "cpu"]
    dollars_per_hour: float
    source: str
    date: str


class Prices(Record):
    """What a later stage turns measured tokens and seconds into dollars with."""

    api: ApiTokenPrice | None
    machine: MachinePrice | None


class Percentiles(Record):
    """One latency in milliseconds; `p95_interval` is the p95's 90% interval (an open end is None)."""

    p50: float
    p95: float | None = None
    p99: float | None = None
    p95_interval: tuple[float | None, float | None] | None = None


class LatencyMs(Record):
    """TTFT, TPOT and end-to-end time of an option at the busiest hour.

    `method`: `simulation` of a self-hosted replica, or a provider's `typical` median, within `within_factor` both ways.
    """

    method: Literal["simulation", "typical"]
    ttft: Percentiles
    tpot: Percentiles
    e2e: Percentiles
    within_factor: float | None = None
    source: str = ""


class TokenSpread(Record):
    """A distribution in tokens: mean, 5th, 50th and 95th percentile, largest, and the sample's size."""

    mean: float
    p5: float
    p50: float
    p95: float
    largest: float
    rows: int


class ExampleTokens(Record):
    """What one few-shot example adds to every request, in tokens."""

    number: int
    tokens: int
    text: str


class Tokens(Record):
    """Tokens per request of one model and prompt."""

    counter: str
    error: float
    prefix: int
    varying: float
    input: TokenSpread
    output: TokenSpread
    examples: list[ExampleTokens]
    reasoning: float = 0.0


class Verdict(Record):
    """The answer and what it rests on."""

    answer: Literal["tune", "try first", "keep the prompt", "not for money"]
    headline: str
    summary: str
    reasons: list[str]
    would_change: list[str]
    unknown: list[str]


class Compared(Record):
    """The two options weighed: keys, and the comparison's figures."""

    keep: str | None
    tuned: str | None
    break_even_rate: float | None
    payback_months: float | None
    saving_per_month: float | None
    saving_over_horizon: float | None


class PlannedOption(Record):
    """One way to serve the task. Dollar figures are None if it is not `usable` (`notes` say why)."""

    key: str
    name: str
    kind: Literal["api", "hosted"]
    model: str
    prompt: Literal["long", "short"]
    tuned: bool
    baseline: bool
    mode: str
    usable: bool
    notes: list[str]
    input_tokens: float
    prefix_tokens: int
    output_tokens: float
    one_off: dict[str, float]
    one_off_total: float
    retraining: dict[str, float]
    gpu: str | None = None
    precision: str | None = None
    engine: str | None = None
    break_even_rate: float | None = None
    payback_months: float | None = None
    latency_ms: LatencyMs | None = None
    parts_per_month: dict[str, float] | None = None
    per_month: float | None = None
    per_month_interval: tuple[float | None, float | None] | None = None
    per_request: float | None = None
    total_over_horizon: float | None = None
    cache_hit_rate: float | None = None
    replicas: float | None = None
    utilisation: float | None = None
    capacity_per_replica: float | None = None
    gpus_per_replica: int | None = None
    gpu_hour: float | None = None
    gpu_price_source: str | None = None
    per_month_if_scaled_by_hour: float | None = None


class Interval(Record):
    """A forecast's median with its 90% interval; None if a quantile is not finite."""

    p5: float | None
    p50: float | None
    p95: float | None


class Swing(Record):
    """What one assumption does alone to the saving per month, at its low and at its high end."""

    label: str
    why: str
    low_factor: float
    high_factor: float
    low: float
    high: float


class Uncertainty(Record):
    """Error bars; `never`: share of draws that never break even, `cheaper`: share in which tuning is cheaper."""

    monthly: dict[str, Interval]
    saving: Interval | None
    break_even: Interval | None
    payback: Interval | None
    never: float | None
    cheaper: float | None
    tornado: list[Swing]


class PlanFile(Document, kw_only=True):
    """One prompt's plan."""

    FILE: ClassVar[str] = "plan.json"
    VERSION: ClassVar[int] = 2
    WRITTEN_BY: ClassVar[str] = "unshot plan --out"

    case: Case
    rate: float
    verdict: Verdict
    compared: Compared
    # The targets every option is held to, and where they come from.
    slo: Slo
    slo_source: str
    price_per_hour: float | None
    prices: Prices
    tokens: dict[str, Tokens]
    options: list[PlannedOption]
    uncertainty: Uncertainty
    assumptions: list[str]
    warnings: list[str]


class FolderPlanFile(Document, kw_only=True):
    """The plans of a folder of prompts, by name."""

    FILE: ClassVar[str] = "plan.json"
    VERSION: ClassVar[int] = 2
    WRITTEN_BY: ClassVar[str] = "unshot plan --out"

    folder: str
    prompts: dict[str, PlanFile]
