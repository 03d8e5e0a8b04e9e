"""The case file: one TOML file that describes one prompt, its traffic, and what should replace it.

What stands here about a key (`about`) is what `--help`, `unshot init` and the documents say about it.
`unshot.case_file` reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta, field

from unshot.catalog import formats
from unshot.contracts.record import NotNegative, Positive, Record, Share
from unshot.data.example import normal
from unshot.data.prompts import Prompt, load_prompt
from unshot.data.rows import Columns, RowOptions
from unshot.methods import METHODS
from unshot.metrics import thresholds
from unshot.metrics.registry import MetricName

if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(METHODS)]
FAILS = ("facts", "tools", "format", "jargon", "reasoning", "latency", "cost")
Whole = Annotated[int, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]


def about(text: str, **more: Any) -> Meta:
    """What a key means. `init`: the value that `unshot init` writes; `sample`: what it shows in a comment where there
    is no default; `text_or_file`: the value may name a file whose text is meant."""
    return Meta(description=text, extra=more or None)


class TaskSettings(Record):
    """What is asked, and how an answer is judged."""

    name: Annotated[str, about("Name of the task in reports.", init="clauses")] = "case"
    system: Annotated[
        str | None,
        about(
            "System prompt of the long prompt: a text or a file.",
            init="Classify the contract clause ...",
            text_or_file=True,
        ),
    ] = None
    examples: Annotated[
        Path | None,
        about(
            "The long prompt's few-shot examples: JSONL, JSON or CSV rows, or a text with a {{slot}}.",
            init="few_shot.jsonl",
        ),
    ] = None
    instruction: Annotated[
        str | None,
        about(
            "The tuned model's short system prompt: a text or a file.",
            init="Classify the risk of the contract clause.",
            text_or_file=True,
        ),
    ] = None
    data: Annotated[
        Path | None,
        about(
            "Labelled rows to tune and test on: JSONL with `messages` or `prompt` + `completion`, or CSV.",
            init="data.jsonl",
        ),
    ] = None
    inputs: Annotated[
        Path | None,
        about(
            "Sample of real inputs (and answers) to count tokens on; default: `data`.", sample="inputs.jsonl"
        ),
    ] = None
    labels: Annotated[
        list[str] | None,
        about("The classes of the answer; default: from the data.", sample=["low", "high"]),
    ] = None
    answer_schema: Annotated[
        Path | None, about("JSON schema that every answer must fit.", sample="answer.schema.json")
    ] = None
    answer_field: Annotated[
        str | None, about("Field of a JSON answer that holds the class.", sample="risk")
    ] = None
    metric: Annotated[
        MetricName | None,
        about(
            "How answers are scored; default: macro_f1 for classes, json_f1 for JSON, else exact_match.",
            sample="macro_f1",
        ),
    ] = None
    judge: Annotated[
        str | None,
        about(
            "Language model of the metric `judge`: http://HOST/v1 or gguf:PATH.",
            sample="http://localhost:8000/v1",
            spec=True,
        ),
    ] = None
    judge_model: Annotated[str | None, about("The judge's name at its server.", sample="NAME")] = None
    judge_key_env: Annotated[
        str | None, about("Environment variable that holds the judge's key.", sample="UNSHOT_JUDGE_KEY")
    ] = None
    target: Annotated[
        Share | None,
        about("Tuning stops where validation reaches this score; the test split must reach it.", sample=0.9),
    ] = None
    current: Annotated[Share | None, about("What the prompt reaches today on the metric.", sample=0.8)] = None
    fails: Annotated[
        list[str],
        about(
            "What fails today.",
            sample=["cost", "latency"],
            choices="unshot.case:FAILS",
        ),
    ] = field(default_factory=list)
    examples_at_hand: Annotated[Whole | None, about("Labelled examples that could be had.", sample=300)] = (
        None
    )

    def __post_init__(self) -> None:
        if self.labels == []:
            raise ValueError("`labels` is empty; leave it out, or give the classes")
        forms = [normal(label) for label in self.labels or ()]
        if double := next((form for form in forms if forms.count(form) > 1), None):
            raise ValueError(f"`labels` lists {double!r} twice")


class RowSettings(Record):
    """Where things stand in the rows of `data` and `inputs`; default: by the usual names."""

    input_column: Annotated[
        list[str], about("Columns of the input; several are joined.", sample=["title", "body"])
    ] = field(default_factory=list)
    input_template: Annotated[
        str | None,
        about(
            "Text or file with {{column}} slots that makes the input.", sample="input.txt", text_or_file=True
        ),
    ] = None
    output_column: Annotated[str | None, about("Column of the answer.", sample="label")] = None
    system_column: Annotated[str | None, about("Column of a row's own system prompt.", sample="system")] = (
        None
    )
    keep_system: Annotated[bool, about("Leave an old prompt that the rows hold where it is.")] = False


class SplitSettings(Record):
    """How rows come apart into training, validation and test."""

    group_by: Annotated[
        str | None, about("Keep the rows of each value of this column together.", sample="customer")
    ] = None
    time: Annotated[
        str | None,
        about("Column of the time: train on the oldest rows, test on the newest.", sample="created"),
    ] = None
    shares: Annotated[str, about("Train/validation/test.")] = "80/10/10"
    validation: Annotated[
        Path | None, about("Validation rows from a file of their own.", sample="validation.jsonl")
    ] = None
    test: Annotated[Path | None, about("Test rows from a file of their own.", sample="test.jsonl")] = None


class Slo(Record):
    """Service-level objective: times in milliseconds at a percentile."""

    ttft_ms: Annotated[Positive | None, about("Time to first token, ms.", sample=500)] = None
    tpot_ms: Annotated[Positive | None, about("Time per output token, ms.", sample=50)] = None
    e2e_ms: Annotated[Positive | None, about("End-to-end time, ms.", sample=2000)] = None
    percentile: Annotated[float, Meta(gt=0, lt=100), about("The percentile that must hold them.")] = 95.0


class TrafficSettings(Record):
    """Requests and what is expected of them."""

    rate: Annotated[Positive, about("Mean requests per second.", init=5.0)] = 1.0
    peak_factor: Annotated[float, Meta(ge=1, le=24), about("Rate of the busiest hour over the mean.")] = 2.0
    arrival_cv: Annotated[
        Positive,
        about("Coefficient of variation of the gaps between requests: 1 is Poisson, more is bursty."),
    ] = 1.0
    output_tokens: Annotated[
        Positive | None, about("Answer length in tokens; default: that of the answers at hand.", sample=40)
    ] = None
    reasoning_tokens: Annotated[
        NotNegative | None,
        about("Tokens a model that reasons thinks before each answer; billed as output.", sample=500),
    ] = None
    offline: Annotated[bool, about("Answers may wait a day, so that batch prices apply.")] = False
    slo: Slo = field(default_factory=Slo)


class BaselineSettings(Record):
    """What runs today with the long prompt: an API model, or an open model on a GPU."""

    api: Annotated[str | None, about("API model by name.", init="gpt-5.4")] = None
    model: Annotated[str | None, about("Open model by name.", sample="llama-3.1-8b", name_or_path=True)] = (
        None
    )
    gpu: Annotated[str | None, about("GPU (or cpu) that serves the open model.", sample="h100-sxm")] = None
    precision: Annotated[str | None, about("Precision of the open model.", sample="fp16")] = None


class CandidateSettings(Record):
    """The small model that the prompt would move into."""

    model: Annotated[
        str,
        about(
            "The base model: a name of the catalog, a hub name or a directory.",
            init="meta-llama/Llama-3.1-8B-Instruct",
            name_or_path=True,
        ),
    ] = "llama-3.1-8b"
    gpu: Annotated[
        list[str], Meta(min_length=1), about("GPUs (or cpu) to serve it on.", init=["h100-sxm", "l4"])
    ] = field(default_factory=lambda: ["h100-sxm"])
    precision: Annotated[
        str,
        about(
            "fp32, fp16, bf16, fp8, w8a8, int8, int4 or a GGUF format; int8 and int4 are weight-only.",
            init="fp16",
        ),
    ] = "fp16"
    engine: Annotated[
        str | None,
        about(
            "Serving engine; default: what the device usually runs.",
            sample="vllm",
            choices="unshot.catalog:ENGINE_NAMES",
        ),
    ] = None
    kv_cache: Annotated[
        Literal["fp16", "fp8"] | None,
        about("Precision of the KV cache; default: the engine's for these weights.", sample="fp8"),
    ] = None
    tensor_parallel: Annotated[
        Count | None, about("GPUs of one replica; default: the fewest that hold the model.", sample=2)
    ] = None
    max_sequences: Annotated[
        Count | None, about("Sequences that run at once; default: the engine's.", sample=256)
    ] = None
    chunk: Annotated[
        Count | None, about("Prefill tokens of one iteration; default: the engine's.", sample=2048)
    ] = None
    speculative_tokens: Annotated[
        Count | None, about("Tokens drafted per iteration (speculative decoding).", sample=4)
    ] = None
    acceptance: Annotated[
        Share | None, about("Share of drafted tokens that are accepted, as you measured it.", sample=0.7)
    ] = None
    draft_share: Annotated[
        Share, about("Time of one drafted token over that of an iteration of the model.")
    ] = 0.1
    price_factor: Annotated[
        float,
        Meta(gt=0, le=10),
        about("Factor on GPU prices: 0.6 for a reservation at 40% off, say, or your spot price."),
    ] = 1.0


class TuneSettings(Record):
    """How to fine-tune."""

    method: Annotated[Method, about("How to fine-tune; qlora needs CUDA, dpo and kto TRL.")] = "lora"
    rank: Annotated[Count, about("LoRA rank.")] = 16
    layers: Annotated[Count | None, about("Adapt only the last so many layers; default: all.", sample=20)] = (
        None
    )
    alpha: Annotated[
        Positive | None,
        about("LoRA alpha; default: 32, with rslora 8 (the same scale at rank 16).", sample=64),
    ] = None
    init: Annotated[
        Literal["lora", "rslora", "pissa"],
        about("How an adapter begins: from zero; scaled by 1/sqrt(rank); from the weights' main directions."),
    ] = "lora"
    schedule: Annotated[
        Literal["cosine", "linear", "constant"],
        about("What the learning rate does after its warm-up: falls to a tenth, or stays."),
    ] = "cosine"
    dropout: Annotated[Share, about("LoRA dropout.")] = 0.0
    teacher: Annotated[
        str | None,
        about(
            "Who answers the rows: `self`, the base model with the long prompt (no labels needed); default: the data.",
            sample="self",
        ),
    ] = None
    on_policy: Annotated[
        bool,
        about(
            "With teacher `self`: train on the student's own samples too, scored by the teacher (reverse KL)."
        ),
    ] = False
    virtual_tokens: Annotated[Count, about("Trained vectors before each row with method `prompt`.")] = 20
    learning_rate: Annotated[
        Positive | None, about("Learning rate; default: by method and model width.", sample=5e-4)
    ] = None
    epochs: Annotated[Count, about("Epochs at most; training stops at the plateau.")] = 5
    patience: Annotated[Count, about("Epochs without improvement before it stops.")] = 2
    batch_tokens: Annotated[int, Meta(ge=64), about("Longest packed sequence, tokens.")] = 2048
    max_length: Annotated[int, Meta(ge=16), about("Longest row, tokens.")] = 2048
    loss_on: Annotated[
        Literal["last", "all"], about("Answers of a conversation that carry loss: the last one, or all.")
    ] = "last"
    chat_template: Annotated[
        str | None,
        about(
            "Another chat template: a file, or one of the model's named ones.",
            sample="template.jinja",
            name_or_path=True,
        ),
    ] = None
    mix: Annotated[
        Path | None, about("General rows to train on too, against forgetting.", sample="general.jsonl")
    ] = None
    mix_share: Annotated[float, Meta(gt=0, lt=1), about("Their share of the training rows.")] = 0.1
    rehearsal: Annotated[
        Annotated[float, Meta(ge=0, lt=1)] | None,
        about(
            "Share of the training rows that are the base's own answers to general prompts, against forgetting; "
            "default: 0.05 where forgetting is measured and no mix is given.",
            sample=0.05,
        ),
    ] = None
    augment_format: Annotated[bool, about("Vary wrapping and whitespace of half the training prompts.")] = (
        False
    )
    embedder: Annotated[
        str | None,
        about(
            "Finds test rows like training rows in other words.",
            sample="all-minilm-l6-v2",
            name_or_path=True,
        ),
    ] = None
    forgetting: Annotated[bool, about("Measure general abilities before and after tuning.")] = True
    general: Annotated[
        Path | None, about("Rows for that; default: the shipped ones.", sample="held-out.jsonl")
    ] = None
    forgetting_drop: Annotated[Share, about("How far the accuracy on them may fall.")] = (
        thresholds.FORGETTING_DROP.value
    )
    robustness: Annotated[bool, about("Ask test rows again in another form.")] = True
    robustness_gap: Annotated[Share, about("How far the score may fall there.")] = (
        thresholds.ROBUSTNESS_GAP.value
    )
    strict: Annotated[bool, about("Exit code 1 if a gate fails.")] = False
    gradient_checkpointing: Annotated[
        bool | None,
        about("Less memory for a third more work; default: if the memory estimate asks for it.", sample=True),
    ] = None
    dtype: Annotated[
        Literal["auto", "bf16", "fp32"],
        about(
            "Precision of matrix products and frozen weights; auto: bf16 where the device multiplies it in hardware, "
            "else fp32. Scores differ a little between the two."
        ),
    ] = "auto"
    seed: Annotated[Whole, about("Seed of split, initialisation and order.")] = 0

    def placed(self) -> TuneSettings:
        """The same with whole paths, which mean the same files from any directory."""
        template = self.chat_template
        if template is not None and Path(template).is_file():
            template = str(Path(template).resolve())
        return self.changed(
            mix=self.mix and self.mix.resolve(),
            general=self.general and self.general.resolve(),
            chat_template=template,
        )


class ExportSettings(Record):
    """Which files to write."""

    to: Annotated[list[str], Meta(min_length=1), about(formats.help_text())] = field(
        default_factory=lambda: ["gguf:q8_0"]
    )


class PlanSettings(Record):
    """What the forecast assumes about people, data and operation; dollars are US dollars."""

    examples: Annotated[Count, about("Labelled examples that the tuned model needs.")] = 300
    labels_by: Annotated[
        Literal["expert", "llm_reviewed"], about("Who writes the examples that are missing.")
    ] = "expert"
    example_cost: Annotated[
        NotNegative | None, about("$ per example; default: by labels_by.", sample=4.0)
    ] = None
    engineer_day: Annotated[NotNegative, about("$ per engineering day.")] = 800.0
    engineering_days: Annotated[NotNegative, about("Engineering days to the first deployment.")] = 10.0
    operations_days: Annotated[NotNegative, about("Engineering days per month to run own GPUs.")] = 1.0
    evaluation_answers: Annotated[Whole, about("Answers that an expert judges before a release.")] = 200
    retrain_per_year: Annotated[NotNegative, about("Retrainings per year.")] = 4.0
    min_replicas: Annotated[Count, about("Replicas kept up for availability.")] = 2
    cold_start_s: Annotated[
        Positive | None,
        about("Seconds until a stopped replica answers: shows what scaling to zero costs.", sample=90),
    ] = None
    adapters: Annotated[Count, about("Tuned tasks that share one base in the many-adapters option.")] = 8
    horizon_months: Annotated[Positive, about("Months over which one-off costs are spread.")] = 12.0
    cheaper_api: Annotated[
        str | None,
        about(
            "Cheaper API models to compare with (A,B); none leaves them out; default: by family and price.",
            sample="gpt-6-luna",
        ),
    ] = None


class Claim(Record):
    """The factor that was promised: `low` to `high` times faster and cheaper."""

    low: Annotated[Positive, about("The least factor.")] = 5.0
    high: Annotated[Positive, about("The greatest factor.")] = 10.0

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"Expected `low` at most `high`, got {self.low:g} and {self.high:g}")


class BenchSettings(Record):
    """How to measure."""

    requests: Annotated[int, Meta(ge=2), about("Timed requests per side with the prefix cache on.")] = 64
    cold_requests: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        about(
            "Timed requests per side without it; default: until the verdict is settled, 48 at most.",
            sample=12,
        ),
    ] = None
    concurrency: Annotated[Count, about("Servers: requests at a time.")] = 1
    margin: Annotated[Share, about("How much worse the candidate's metric may be.")] = thresholds.MARGIN.value
    seed: Annotated[Whole, about("Seed of bootstrap draws and row sampling.")] = 0
    claim: Claim = field(default_factory=Claim)


class OwnGpu(Record):
    """A device that the catalog lacks; units as in `unshot/catalog/gpus.toml`, peaks dense, 1e12 operations/s."""

    memory_gib: Positive
    bandwidth_gbs: Positive
    fp16: Positive
    fp8: Positive | None = None
    int8: Positive | None = None
    # The family whose measured efficiency it shares (any other name: the mean of all, with a wide error bar).
    family: str = "own"
    engine: str = "vllm"
    # $ per hour.
    price: NotNegative | None = None
    cores: Count = 1
    clock_ghz: Positive = 1.0
    link_gbs: Positive = 16.0
    tdp_w: Positive | None = None


class OwnModel(Record):
    """A model that the catalog lacks: its `config.json`, or the directory that holds it."""

    config: Path


class Case(Record):
    """The whole case file."""

    task: TaskSettings = field(default_factory=TaskSettings)
    traffic: TrafficSettings = field(default_factory=TrafficSettings)
    baseline: BaselineSettings = field(default_factory=BaselineSettings)
    candidate: CandidateSettings = field(default_factory=CandidateSettings)
    plan: PlanSettings = field(default_factory=PlanSettings)
    rows: RowSettings = field(default_factory=RowSettings)
    split: SplitSettings = field(default_factory=SplitSettings)
    tune: TuneSettings = field(default_factory=TuneSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    bench: BenchSettings = field(default_factory=BenchSettings)
    # Devices and models of one's own, by name.
    gpu: dict[str, OwnGpu] = field(default_factory=dict)
    model: dict[str, OwnModel] = field(default_factory=dict)

    def files(self) -> list[Path | None]:
        """The files whose content the case means."""
        task, split, tune = self.task, self.split, self.tune
        template = Path(tune.chat_template) if tune.chat_template else None
        return [
            task.examples, task.data, task.inputs, task.answer_schema, tune.mix, split.validation, split.test,
            tune.general, template, *(own.config for own in self.model.values()),
        ]  # fmt: skip

    def long_prompt(self) -> Prompt:
        """The few-shot prompt of `[task]`."""
        columns = self.rows_as().columns
        return load_prompt(self.task.examples, system=self.task.system, columns=columns)

    def rows_as(self) -> RowOptions:
        """How rows are read."""
        own = self.rows
        columns = Columns(tuple(own.input_column), own.output_column, own.input_template, own.system_column)
        return RowOptions(columns, own.keep_system)

    def take_rows(self, given: RowOptions) -> None:
        """Put what the command line says of reading rows over `[rows]`: an input of its own in place of the file's."""
        own, columns = self.rows, given.columns
        asked = bool(columns.asked)
        self.rows = RowSettings(
            list(columns.input) if asked else own.input_column,
            columns.template if asked else own.input_template,
            columns.output or own.output_column,
            columns.system or own.system_column,
            given.keep_system or own.keep_system,
        )

    def short_prompt(self) -> Prompt:
        """The tuned model's prompt of `[task]`."""
        return Prompt(system=self.task.instruction)
