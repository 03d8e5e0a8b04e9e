"""The case file: one TOML file that describes one prompt, its traffic, and what should replace it.

Flags override the file. Paths in the file are relative to the file. Errors name the file, the key and the
accepted values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, field

from unshot.contracts.record import LARGEST, NotNegative, Positive, Record, RecordError, Share
from unshot.data.prompts import Prompt, load_prompt
from unshot.data.rows import read_text
from unshot.errors import InputError
from unshot.metrics import thresholds

DEFAULT_FILE = Path("unshot.toml")

Metric = Literal["macro_f1", "accuracy", "exact_match", "json_f1", "rouge_l"]
Method = Literal["lora", "qlora", "dora", "full", "prompt"]
Whole = Annotated[int, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]
# One text stands for a list of one.
_LISTS = (("task", "fails"), ("candidate", "gpu"), ("export", "to"))


class Task(Record):
    """What is asked and how an answer is judged."""

    name: str = "case"
    # The system prompt that goes with the few-shot examples, and these: JSONL, JSON, CSV or a text with a slot.
    system: str | None = None
    examples: Path | None = None
    # The tuned model's short system prompt.
    instruction: str | None = None
    # Labelled rows to tune and test on; a sample of real inputs (and answers) for token counts.
    data: Path | None = None
    inputs: Path | None = None
    # The classes of the answer, its JSON schema, and the field of a JSON answer that holds the class.
    labels: list[str] | None = None
    answer_schema: Path | None = None
    answer_field: str | None = None
    # None: macro-F1 where there are classes, else exact match.
    metric: Metric | None = None
    # What is good enough, and what the prompt reaches today, on the metric.
    target: Share | None = None
    current: Share | None = None
    # What fails today: facts, tools, format, jargon, reasoning, latency, cost.
    fails: list[str] = field(default_factory=list)
    # Labelled examples that could be had.
    examples_at_hand: Whole | None = None


class Slo(Record):
    """Service-level objective; times in milliseconds at a percentile."""

    ttft_ms: Positive | None = None
    tpot_ms: Positive | None = None
    e2e_ms: Positive | None = None
    percentile: Annotated[float, Meta(gt=0, lt=100)] = 95.0


class Traffic(Record):
    """Requests and what is expected of them."""

    # Mean requests per second, and the busiest hour over it.
    rate: Positive = 1.0
    peak_factor: Annotated[float, Meta(ge=1, le=LARGEST)] = 2.0
    # Spread of the gaps between requests: 1 is Poisson, more is bursty.
    arrival_cv: Positive = 1.0
    # Answer length where no answers are at hand.
    output_tokens: Positive | None = None
    # Answers may wait a day, so that batch prices apply.
    offline: bool = False
    slo: Slo = field(default_factory=Slo)


class Baseline(Record):
    """What runs today: an API model by name, or a base model, with the long prompt."""

    api: str | None = None
    model: str | None = None
    gpu: str | None = None
    precision: str | None = None


class Candidate(Record):
    """The small model the prompt would move into."""

    model: str = "llama-3.1-8b"
    gpu: list[str] = field(default_factory=lambda: ["h100-sxm"])
    precision: str = "fp16"


class Tune(Record):
    """How to fine-tune."""

    method: Method = "lora"
    rank: Count = 16
    # Adapt only the last so many layers; None: all.
    layers: Count | None = None
    # None: twice the rank.
    alpha: Positive | None = None
    dropout: Share = 0.0
    # Vectors of prompt tuning.
    virtual_tokens: Count = 20
    # None: by method and model size.
    learning_rate: Positive | None = None
    # At most; training stops at the plateau: so many epochs without improvement.
    epochs: Count = 5
    patience: Count = 2
    # Tokens per optimiser step, and of the longest row.
    batch_tokens: Annotated[int, Meta(ge=64)] = 2048
    max_length: Annotated[int, Meta(ge=16)] = 2048
    # General rows to train on beside the task's, against forgetting, and their share of the training rows.
    mix: Path | None = None
    mix_share: Annotated[float, Meta(gt=0, lt=1)] = 0.1
    # Vary wrapping and whitespace of half the training prompts.
    augment_format: bool = False
    # Finds test rows like train rows in other words: a directory, a package's name or off.
    embedder: str | None = None
    # Measure general abilities before and after, on these rows (None: the shipped ones); how far they may fall.
    forgetting: bool = True
    general: Path | None = None
    forgetting_drop: Share = thresholds.FORGETTING_DROP.value
    # Ask test rows again in another form; how far the score may fall there.
    robustness: bool = True
    robustness_gap: Share = thresholds.ROBUSTNESS_GAP.value
    # Exit code 1 where a gate fails.
    strict: bool = False
    # Less memory for a third more work; None: where the estimate asks for it.
    gradient_checkpointing: bool | None = None
    seed: Whole = 0


class Export(Record):
    """Which files to write."""

    to: list[str] = field(default_factory=lambda: ["gguf:q8_0"])


class Plan(Record):
    """What the forecast assumes about people, data and operation; dollars are US dollars."""

    # Labelled examples the tuned model needs, who writes the missing ones, $ each (None: by who writes them).
    examples: Count = 300
    labels_by: Literal["expert", "llm_reviewed"] = "expert"
    example_cost: NotNegative | None = None
    # $ per engineering day, days to the first deployment, days per month to run own GPUs.
    engineer_day: NotNegative = 800.0
    engineering_days: NotNegative = 10.0
    operations_days: NotNegative = 1.0
    # Answers an expert judges before a release.
    evaluation_answers: Whole = 200
    retrain_per_year: NotNegative = 4.0
    # Replicas kept up for availability.
    min_replicas: Count = 2
    # Tuned tasks that share one base in the many-adapters option.
    adapters: Count = 8
    # Months over which one-off costs are spread.
    horizon_months: Positive = 12.0
    # Cheaper API model to compare with; `none` leaves it out.
    cheaper_api: str | None = None


class Claim(Record):
    """The ratio that was promised: faster and cheaper by `low` to `high`."""

    low: Positive = 5.0
    high: Positive = 10.0


class Bench(Record):
    """How to measure."""

    requests: Count = 64
    concurrency: Count = 1
    # How much worse the candidate's metric may be.
    margin: Share = thresholds.MARGIN.value
    seed: Whole = 0
    claim: Claim = field(default_factory=Claim)


class Case(Record):
    """The whole case file."""

    task: Task = field(default_factory=Task)
    traffic: Traffic = field(default_factory=Traffic)
    baseline: Baseline = field(default_factory=Baseline)
    candidate: Candidate = field(default_factory=Candidate)
    plan: Plan = field(default_factory=Plan)
    tune: Tune = field(default_factory=Tune)
    export: Export = field(default_factory=Export)
    bench: Bench = field(default_factory=Bench)

    def long_prompt(self) -> Prompt:
        """The few-shot prompt of `[task]`."""
        return load_prompt(self.task.examples, system=self.task.system)

    def short_prompt(self) -> Prompt:
        """The tuned model's prompt of `[task]`."""
        return Prompt(system=self.task.instruction)


def load_case(path: Path | None, **flags: dict[str, Any]) -> Case:
    """Read the case file and put the flags over it.

    `path` None means `./unshot.toml` where it exists, else an empty case. Each keyword is a section, its dict
    the flags for it; None values are flags that were not given. Raises `InputError`.
    """
    raw: dict[str, Any] = {}
    if path is None and DEFAULT_FILE.is_file():
        path = DEFAULT_FILE
    if path is not None:
        import tomllib

        try:
            raw = tomllib.loads(read_text(path))
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{path}: not valid TOML ({error})") from None
    case = _checked(raw, str(path))
    if path is not None:
        _anchor(case, path.parent)
    given = {section: {k: v for k, v in values.items() if v is not None} for section, values in flags.items()}
    if any(given.values()):
        merged = case.plain()
        for section, values in given.items():
            _merge(merged[section], values)
        case = _checked(merged, "command line")
    return case


def _merge(base: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], {k: v for k, v in value.items() if v is not None})
        else:
            base[key] = value


def _anchor(case: Case, folder: Path) -> None:
    for key in ("examples", "data", "inputs", "answer_schema"):
        value = getattr(case.task, key)
        if value is not None and not value.is_absolute():
            setattr(case.task, key, folder / value)
    for key in ("mix", "general"):
        value = getattr(case.tune, key)
        if value is not None and not value.is_absolute():
            setattr(case.tune, key, folder / value)


def _checked(raw: dict[str, Any], where: str) -> Case:
    for section, key in _LISTS:
        table = raw.get(section)
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = [table[key]]
    try:
        return Case.of(raw)
    except RecordError as error:
        raise InputError(f"{where}: {error}") from None
