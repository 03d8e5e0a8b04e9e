"""`report.json` of `unshot bench`, `bench load` and `bench sweep`: what was measured and judged.

`bench compare`, the planner's calibration, the registry and retraining read it. Times are milliseconds where a name
ends in `_ms`, else seconds; money is US dollars. A figure that could not be measured is None, and `warnings` says why
where the name does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from msgspec import field

from unshot.case import Claim
from unshot.contracts.document import Document
from unshot.contracts.engine import EngineFacts, ModelConfig
from unshot.contracts.figures import Client, Figures, Resources
from unshot.contracts.manifest import Hardware
from unshot.contracts.record import Record
from unshot.metrics.scores import Scores
from unshot.prices import TokenPrice

Verdict = Literal["met", "not met", "inconclusive"]
GateVerdict = Literal["passed", "failed", "inconclusive"]
SideName = Literal["baseline", "candidate"]
Kind = Literal["ab", "load", "sweep"]


class RatioInterval(Record):
    """A ratio of baseline to candidate with its interval. `high` None: it has no upper bound.

    `pairs` are requests that both sides answered, `blocks` and `rows` what they were drawn in.
    """

    value: float
    low: float
    high: float | None
    pairs: int
    method: str
    level: float = 0.95
    blocks: int | None = None
    rows: int | None = None


class Judged(RatioInterval):
    """A ratio held against the claim."""

    verdict: Verdict = "inconclusive"


class ErrorGate(Record):
    """Whether a side failed more often than allowed; `low` and `high` are the exact 90% bounds of its error rate."""

    failed: int
    requests: int
    rate: float
    low: float
    high: float
    limit: float
    verdict: GateVerdict


class ModeClaim(Record, kw_only=True):
    """The claim in one cache mode. `cost` None: there is no price, or no count for it (`no_cost` says which)."""

    verdict: Verdict
    speed: Judged
    cost: Judged | None
    no_cost: str | None = None
    errors: dict[SideName, ErrorGate]
    # Looks at the data that the interval's level allows for; the pairs that would settle it with 80% chance.
    looks: int = 1
    pairs_to_settle: int | None = None
    above_range: bool = False


class Factor(Record):
    """A part of the speed ratio. `value` None: it was not measured, and `note` says what would measure it."""

    name: Literal["prompt", "model", "engine", "output length"]
    value: float | None
    note: str


class Ratios(Record, kw_only=True):
    """Other ratios, for information; None where a side lacks the figure."""

    ttft: RatioInterval | None = None
    tpot: RatioInterval | None = None
    prompt_tokens: RatioInterval | None = None
    output_tokens: RatioInterval | None = None
    # End-to-end time per output token.
    per_token: RatioInterval | None = None
    cost_per_correct: RatioInterval | None = None


class Mode(Record, kw_only=True):
    """Both sides in one cache mode."""

    baseline: Figures
    candidate: Figures
    claim: ModeClaim
    ratios: Ratios
    split: list[Factor]
    # Blocks that the client's own stalls spoilt, dropped and measured again.
    spoilt_blocks: int = 0
    blocks: int = 0

    def side(self, name: str) -> Figures:
        """The figures of `baseline` or `candidate`."""
        return self.baseline if name == "baseline" else self.candidate


class Difference(Record):
    """Candidate minus baseline, with its interval."""

    value: float
    low: float
    high: float
    level: float = 0.95


class Quality(Record, kw_only=True):
    """Both sides' scores on the same rows, and the gate."""

    metric: str
    rows: int
    baseline: Scores
    candidate: Scores
    correct_share: dict[SideName, float]
    right_only: dict[SideName, int]
    unanswered: dict[SideName, int] = field(default_factory=dict)
    difference: Difference
    lower_bound: float
    margin: float
    gate: GateVerdict
    # Why the gate says what it says.
    why: str = ""

    def side(self, name: str) -> Scores:
        """The scores of `baseline` or `candidate`."""
        return self.baseline if name == "baseline" else self.candidate


class SystemFacts(EngineFacts, kw_only=True):
    """A side: its engine, and what it was asked with."""

    spec: str
    examples_in_prompt: int
    system_prompt: bool
    # A digest of the prompt's own text, whatever file it came from.
    prompt: str | None = None
    concurrency: int = 1
    tokens_counted_by: str = "engine"
    # On the way to a server: the proxy's URL, or `none`.
    proxy: str | None = None
    client: Client | None = None


class SidePrice(Record, kw_only=True):
    """What a side costs: its machines by the hour, or its tokens. Neither: `source` says why there is no price."""

    per_hour: float | None = None
    machines: int = 1
    tokens: TokenPrice | None = None
    source: str

    @property
    def known(self) -> bool:
        """Whether there is a price at all."""
        return self.per_hour is not None or self.tokens is not None


class Conditions(Record, kw_only=True):
    """What both sides were asked, and on what."""

    baseline: str
    candidate: str
    data: str
    rows: int
    requests: int
    cold_requests: int | None
    concurrency: int
    block: int
    warm_up: int
    max_tokens: int
    modes: list[str]
    margin: float
    max_error_rate: float
    repeat: bool
    request_extra: dict[str, Any] = field(default_factory=dict)
    load: str
    decoding: str = "greedy"
    hardware: Hardware
    date: str


class CalibrationSide(Record, kw_only=True):
    """One side and mode as `unshot plan --calibrate` reads it; one stream, times in seconds."""

    side: SideName
    mode: str
    model: ModelConfig | str
    precision: str
    prompt_tokens: list[int]
    cached_tokens: list[int]
    output_tokens: list[int]
    ttft_s: list[float]
    tpot_s: list[float]


class ForecastRow(Record, kw_only=True):
    """The plan's forecast of a figure beside the measurement, milliseconds."""

    mode: str
    side: SideName
    figure: Literal["ttft", "e2e"]
    option: str | None
    utilisation: float | None
    forecast_ms: float
    measured_ms: float


class BenchReport(Document, kw_only=True):
    """The A/B report of `unshot bench`."""

    FILE: ClassVar[str] = "report.json"
    VERSION: ClassVar[int] = 2
    WRITTEN_BY: ClassVar[str] = "`unshot bench`"

    kind: Literal["ab"] = "ab"
    verdict: Verdict
    # Why, in one line, and the same part by part.
    reason: str
    reasons: list[str] = field(default_factory=list)
    # What a reader must know before the figures.
    warnings: list[str] = field(default_factory=list)
    partial: bool
    valid: bool
    claim: Claim
    modes: dict[str, Mode]
    quality: Quality
    systems: dict[SideName, SystemFacts]
    price: dict[SideName, SidePrice]
    prefix_fill_ms: dict[SideName, float | None]
    task: dict[str, Any]
    conditions: Conditions
    resources: Resources = field(default_factory=Resources)
    # The catalog's name of the GPU that the sides ran on, `cpu`, or None where that is not known.
    gpu: str | None
    # The catalog's name of the engine that `sides` were taken with.
    engine: str | None = None
    sides: list[CalibrationSide]
    forecast: list[ForecastRow] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)


class LoadConditions(Record, kw_only=True):
    """What was sent to the server."""

    requests: int
    max_tokens: str
    cache: str
    prompts: str
    data: str | None
    prompt_words: str
    warm_up: int
    timeout: float
    seed: int
    window: str = "all requests"
    # The API, the further fields of each request, what counts the tokens, and a digest of the prompt's own text.
    api: str = "chat"
    request_extra: dict[str, Any] = field(default_factory=dict)
    tokens_counted_by: str = "server"
    prompt: str | None = None
    # On the way to the server: the proxy's URL, or `none`.
    proxy: str | None = None
    # Of conversations: the turns at most, and the seconds of thought before each but the first.
    turns: int | None = None
    think_time: str | None = None
    hardware: Hardware
    date: str


class LoadReport(Document, kw_only=True):
    """The report of `unshot bench load`."""

    FILE: ClassVar[str] = "report.json"
    VERSION: ClassVar[int] = 2
    WRITTEN_BY: ClassVar[str] = "`unshot bench load`"

    kind: Literal["load"] = "load"
    url: str
    model: str
    load: str
    warnings: list[str] = field(default_factory=list)
    partial: bool
    figures: Figures
    # Of conversations, the figures of each turn.
    turns: list[Figures] = field(default_factory=list)
    failure: str | None
    client: Client
    resources: Resources | None = None
    conditions: LoadConditions


class Knee(Record):
    """The step of greatest throughput over mean latency."""

    concurrency: int
    requests_per_second: float
    e2e_p50_ms: float
    most_requests_per_second: float
    share_of_most: float
    saturated: bool


class SloKnee(Record):
    """The greatest rate, in requests a second, up to which `share` of the requests are within the SLO.

    None where the lowest rate is not; `next_rate` is the lowest that is not (None: there was none).
    """

    rate: float | None
    goodput: float | None
    share: float
    next_rate: float | None
    next_share: float | None


class Step(Record):
    """One concurrency of a sweep, or (with `concurrency` 0) one rate of Poisson arrivals a second."""

    concurrency: int
    figures: Figures
    client: Client
    resources: Resources | None = None
    rate: float | None = None

    @property
    def load(self) -> str:
        """As `--load` has it."""
        return f"closed:{self.concurrency}" if self.rate is None else f"poisson:{self.rate:g}"

    @property
    def label(self) -> str:
        """In a table's head."""
        return f"{self.concurrency} at once" if self.rate is None else f"{self.rate:g}/s"


class SweepReport(Document, kw_only=True):
    """The report of `unshot bench sweep`."""

    FILE: ClassVar[str] = "report.json"
    VERSION: ClassVar[int] = 2
    WRITTEN_BY: ClassVar[str] = "`unshot bench sweep`"

    kind: Literal["sweep"] = "sweep"
    url: str
    model: str
    warnings: list[str] = field(default_factory=list)
    partial: bool
    points: list[Step]
    knee: Knee | None
    failure: str | None
    slo_knee: SloKnee | None = None
    conditions: LoadConditions


AnyReport = BenchReport | LoadReport | SweepReport


def read_report(path: Path) -> AnyReport:
    """The report in a directory (or the file), of whichever kind. Raises `InputError`."""
    import json

    from unshot.data.rows import read_text
    from unshot.errors import InputError

    file = path / "report.json" if path.is_dir() else path
    try:
        raw = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file}: not valid JSON ({error}); give a report directory of `unshot bench`"
        ) from None
    kind = raw.get("kind") if isinstance(raw, dict) else None
    kinds: dict[Any, type[BenchReport] | type[LoadReport] | type[SweepReport]] = {
        "load": LoadReport, "sweep": SweepReport,
    }  # fmt: skip
    return kinds.get(kind, BenchReport).parse(raw, str(file))
