"""The case file: one TOML file that describes one prompt, its traffic, and what should replace it.

Flags override the file. Paths in the file are relative to the file. Errors name the file, the key and the
accepted values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from unshot.data import read_text
from unshot.errors import InputError, nearest
from unshot.prompts import Prompt, load_prompt

DEFAULT_FILE = Path("unshot.toml")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Metric = Literal["macro_f1", "accuracy", "exact_match", "json_f1", "rouge_l"]
Method = Literal["lora", "qlora", "dora", "full", "prompt"]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Texts = Annotated[list[str], BeforeValidator(_as_list)]


class Section(BaseModel):
    """A table of the case file; unknown keys are errors."""

    # Validators are made when a case is read and not with each class: a third less time until the first case.
    model_config = ConfigDict(extra="forbid", defer_build=True)


class Task(Section):
    """What is asked and how an answer is judged."""

    name: str = "case"
    system: str | None = Field(None, description="system prompt that goes with the few-shot examples")
    examples: Path | None = Field(
        None, description="few-shot examples: JSONL, JSON, CSV or a text with a {{text}} slot"
    )
    instruction: str | None = Field(None, description="the tuned model's short system prompt")
    data: Path | None = Field(None, description="labelled rows to tune and test on")
    inputs: Path | None = Field(None, description="sample of real inputs (and answers) for token counts")
    labels: list[str] | None = Field(None, description="the classes of the answer")
    answer_schema: Path | None = Field(None, description="JSON schema of the answer")
    answer_field: str | None = Field(None, description="field of a JSON answer that holds the label")
    metric: Metric = "macro_f1"
    target: Share | None = Field(None, description="accuracy target on the metric, 0 to 1")
    fails: Texts = Field(
        default_factory=list,
        description="what fails today: facts, tools, format, jargon, reasoning, latency, cost",
    )
    current: Share | None = Field(None, description="what the prompt reaches today on the metric")
    examples_at_hand: int | None = Field(None, ge=0, description="labelled examples that could be had")


class Slo(Section):
    """Service-level objective; times in milliseconds at a percentile."""

    ttft_ms: Positive | None = None
    tpot_ms: Positive | None = None
    e2e_ms: Positive | None = None
    percentile: Annotated[float, Field(gt=0, lt=100, allow_inf_nan=False)] = 95.0


class Traffic(Section):
    """Requests and what is expected of them."""

    rate: Positive = Field(1.0, description="mean requests per second")
    peak_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    arrival_cv: Positive = Field(
        1.0, description="spread of the gaps between requests; 1: Poisson, more: bursts"
    )
    output_tokens: Positive | None = Field(None, description="answer length where no answers are at hand")
    offline: bool = Field(False, description="answers may wait a day, so that batch prices apply")
    slo: Slo = Field(default_factory=Slo)


class Baseline(Section):
    """What runs today: an API model by name, or a base model, with the long prompt."""

    api: str | None = None
    model: str | None = None
    gpu: str | None = None
    precision: str | None = None


class Candidate(Section):
    """The small model the prompt would move into."""

    model: str = "llama-3.1-8b"
    gpu: Texts = Field(default_factory=lambda: ["h100-sxm"])
    precision: str = "fp16"


class Tune(Section):
    """How to fine-tune."""

    method: Method = "lora"
    rank: int = Field(16, ge=1)
    layers: int | None = Field(None, ge=1, description="adapt only the last so many layers; default: all")
    alpha: Positive | None = Field(None, description="LoRA alpha; default 2 x rank")
    dropout: Share = 0.0
    virtual_tokens: int = Field(20, ge=1, description="vectors of prompt tuning")
    learning_rate: Positive | None = Field(None, description="default by method and model size")
    epochs: int = Field(5, ge=1, description="at most; training stops at the plateau")
    patience: int = Field(2, ge=1, description="epochs without improvement before stopping")
    batch_tokens: int = Field(2048, ge=64, description="tokens per optimiser step")
    max_length: int = Field(2048, ge=16, description="longest row, tokens")
    mix: Path | None = Field(
        None, description="general rows to train on beside the task's, against forgetting"
    )
    mix_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="their share of the training rows"
    )
    augment_format: bool = Field(
        False, description="vary wrapping and whitespace of half the training prompts"
    )
    embedder: str | None = Field(
        None,
        description="finds test rows like train rows in other words: a directory, a package's name or off",
    )
    forgetting: bool = Field(True, description="measure general abilities before and after")
    general: Path | None = Field(
        None, description="held-out general rows for that; default: the shipped ones"
    )
    forgetting_drop: Share = Field(0.1, description="how far accuracy on them may fall")
    robustness: bool = Field(True, description="ask test rows again in another form")
    robustness_gap: Share = Field(0.05, description="how far the score may fall there")
    strict: bool = Field(False, description="exit code 1 where a gate fails")
    gradient_checkpointing: bool | None = Field(
        None, description="less memory for a third more work; default: where the estimate asks for it"
    )
    seed: int = Field(0, ge=0)


class Export(Section):
    """Which files to write."""

    to: Texts = Field(default_factory=lambda: ["gguf:q8_0"])


class Plan(Section):
    """What the forecast assumes about people, data and operation; dollars are US dollars."""

    examples: int = Field(300, ge=1, description="labelled examples the tuned model needs")
    labels_by: Literal["expert", "llm_reviewed"] = Field("expert", description="who writes the missing ones")
    example_cost: NotNegative | None = Field(None, description="$ per example; default by labels_by")
    engineer_day: NotNegative = Field(800.0, description="$ per engineering day")
    engineering_days: NotNegative = Field(10.0, description="days to the first deployment")
    evaluation_answers: int = Field(200, ge=0, description="answers an expert judges before a release")
    retrain_per_year: NotNegative = Field(4.0, description="retrainings per year")
    operations_days: NotNegative = Field(1.0, description="engineering days per month to run own GPUs")
    min_replicas: int = Field(2, ge=1, description="replicas kept up for availability")
    adapters: int = Field(8, ge=1, description="tuned tasks that share one base in the many-adapters option")
    horizon_months: Positive = Field(12.0, description="months over which one-off costs are spread")
    cheaper_api: str | None = Field(None, description="cheaper API model to compare with; none: leave it out")


class Claim(Section):
    """The ratio that was promised: faster and cheaper by `low` to `high`."""

    low: Positive = 5.0
    high: Positive = 10.0


class Bench(Section):
    """How to measure."""

    requests: int = Field(64, ge=1)
    concurrency: int = Field(1, ge=1)
    margin: Share = Field(0.02, description="how much worse the candidate's metric may be")
    seed: int = Field(0, ge=0)
    claim: Claim = Field(default_factory=Claim)


class Case(Section):
    """The whole case file."""

    task: Task = Field(default_factory=Task)
    traffic: Traffic = Field(default_factory=Traffic)
    baseline: Baseline = Field(default_factory=Baseline)
    candidate: Candidate = Field(default_factory=Candidate)
    plan: Plan = Field(default_factory=Plan)
    tune: Tune = Field(default_factory=Tune)
    export: Export = Field(default_factory=Export)
    bench: Bench = Field(default_factory=Bench)

    def long_prompt(self) -> Prompt:
        """The few-shot prompt of `[task]`."""
        return load_prompt(self.task.examples, system=self.task.system)

    def short_prompt(self) -> Prompt:
        """The tuned model's prompt of `[task]`."""
        return Prompt(system=self.task.instruction)


S = TypeVar("S", bound=BaseModel)


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
    case = _validate(Case, raw, str(path))
    if path is not None:
        _anchor(case, path.parent)
    given = {section: {k: v for k, v in values.items() if v is not None} for section, values in flags.items()}
    if any(given.values()):
        merged = case.model_dump()
        for section, values in given.items():
            _merge(merged[section], values)
        case = _validate(Case, merged, "command line")
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


def _validate(model: type[S], raw: dict[str, Any], where: str) -> S:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(model, error)}") from None


def explain(model: type[BaseModel], error: ValidationError) -> str:
    """The first validation error as `key: what is wrong, what is accepted` (and how many more there are)."""
    errors = error.errors()
    first = errors[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        text = f"unknown key `{key}`; {nearest(path[-1], _keys(model, path[:-1]))}"
    elif first["type"] == "literal_error":
        text = f"`{key}` is {json.dumps(first['input'], default=str)}; accepted: {first['ctx']['expected']}"
    else:
        text = f"`{key}` is {json.dumps(first['input'], default=str)}; {first['msg'][0].lower()}{first['msg'][1:]}"
    more = len(errors) - 1
    return f"{text} ({more} more)" if more else text


def _keys(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        inner = model.model_fields[part].annotation
        assert isinstance(inner, type)
        model = inner
    return list(model.model_fields)
