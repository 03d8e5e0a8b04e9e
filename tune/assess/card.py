"""The model card of a run: `README.md` with Hugging Face metadata, written from what the run recorded."""

from __future__ import annotations

import json
from collections.abc import Sequence

from unshot.case import TuneSettings
from unshot.contracts.gates import Gate
from unshot.contracts.manifest import BaseModel, Manifest
from unshot.contracts.task import Task
from unshot.methods import METHODS
from unshot.metrics.answers import JsonObject
from unshot.metrics.registry import metric as find_metric
from unshot.metrics.scores import Scores

TAUGHT = (
    "**These scores are agreement with the teacher, not accuracy**: a model with the long prompt wrote the "
    "answers that this one was tuned on and is scored by, and no person has judged them. A review (below) gives the "
    "accuracy, corrected for the teacher's errors."
)
NOT_REVIEWED = (
    "No human has reviewed this model's answers: the scores here are automated metrics alone, and a model should not "
    "be shipped on those. Draw a blinded sample with `unshot eval RUN --review sheet.html`, fill it in, and read it "
    "back with `unshot eval RUN --from-review SHEET.csv`; the review is then recorded in `gates.jsonl` beside this "
    "file and carried along by `unshot export`."
)
WORDS = {True: "passed", False: "**failed**", None: "undecided"}


def card(name: str, result: JsonObject, manifest: Manifest, task: Task, gates: Sequence[Gate]) -> str:
    """The card's text, from the run's `metrics.json`, its manifest, its task and its gates."""
    assert manifest.base is not None and manifest.tune is not None
    base, test = manifest.base, Scores.of({k: v for k, v in result["test"].items() if k != "loss"})
    return "\n".join(
        [
            *_metadata(name, base, manifest.tune.method, task, test),
            f"# {name}",
            "",
            f"{base.name}, tuned on the task `{task.name}` with `unshot tune`. `manifest.json` holds versions, "
            "hashes and settings; `metrics.json` every figure.",
            "",
            *_use(task),
            "## Data",
            "",
            *_data(result, manifest.config),
            "",
            "## Method",
            "",
            *_method(result, manifest.config, manifest.tune),
            "",
            "## Scores",
            "",
            *_scores(test, taught=result.get("reference") == "teacher"),
            "",
            "## Gates",
            "",
            "| gate | answer | what was seen |",
            "|---|---|---|",
            *(f"| {g.name} | {WORDS[g.passed]} | {_cell(g.detail)} |" for g in gates),
            "| review | missing | no human has reviewed the answers |",
            "",
            NOT_REVIEWED,
            "",
            "## Limits",
            "",
            *_limits(test, gates),
            "",
            f"Licence of the base (SPDX): {base.license or 'not recorded; see the base model'}. The licence of "
            "the training data is its owner's to state.",
            "",
        ]
    )


def _metadata(name: str, base: BaseModel, method: str, task: Task, test: Scores) -> list[str]:
    """The YAML block; texts as JSON strings, which YAML reads."""
    peft = not METHODS[method].whole
    licence = (base.license or "").lower()
    metrics = {find_metric(task.metric).hub or task.metric: test.score, "accuracy": test.accuracy}
    lines = ["---", f"base_model: {_text(base.name)}"]
    lines += [f"license: {_text(licence)}"] if licence else []
    lines += ["library_name: peft"] if peft else ["library_name: transformers"]
    lines += ["pipeline_tag: text-generation", "tags:", "- unshot", f"- {method}", "metrics:"]
    lines += [f"- {key}" for key in metrics]
    lines += ["model-index:", f"- name: {_text(name)}", "  results:"]
    lines += [
        "  - task:",
        "      type: text-generation",
        "    dataset:",
        f"      name: {_text(task.name + ', held-out test split')}",
        "      type: private",
        "    metrics:",
    ]
    for key, value in metrics.items():
        lines += [f"    - type: {key}", f"      value: {value:.4f}"]
    return [*lines, "---", ""]


def _use(task: Task) -> list[str]:
    lines = ["## Use", ""]
    if task.instruction:
        lines += [
            "System prompt it was tuned with:",
            "",
            *(f"> {x}" for x in task.instruction.splitlines()),
            "",
        ]
    if task.labels:
        shown = ", ".join(f"`{label}`" for label in task.labels[:12])
        more = f" and {len(task.labels) - 12} more" if len(task.labels) > 12 else ""
        where = f" in the field `{task.answer_field}` of a JSON object" if task.answer_field else ""
        lines += [f"It answers with one of {len(task.labels)} labels{where}: {shown}{more}.", ""]
    return lines


def _data(result: JsonObject, config: JsonObject) -> list[str]:
    rows, moved = result["rows"], result["contamination"]
    lines = [
        f"{rows['train']} training, {rows['validation']} validation and {rows['test']} test rows; "
        f"{len(moved['moved'])} near-duplicates were moved out of validation and test "
        f"({len(moved['refilled'])} replaced by other rows).",
    ]
    rows_config = config.get("rows") or {}
    if mix := rows_config.get("mix"):
        lines.append(
            f"{mix['rows']} general rows ({mix['share']:.1%} of the training rows) were mixed in from "
            f"`{mix['file'].path}`."
        )
    if own := rows_config.get("rehearsal"):
        lines.append(
            f"{own['rows']} rows ({own['share']:.1%} of the training rows) were the base's own answers to "
            f"{own['prompts']} general prompts, against forgetting."
        )
    if used := rows_config.get("augment_format"):
        lines.append(f"{sum(used.values())} training rows were put into another form (`--augment-format`).")
    return lines


def _method(result: JsonObject, config: JsonObject, settings: TuneSettings) -> list[str]:
    defaults = config["defaults"]
    rank = f" of rank {settings.rank}" if METHODS[settings.method].low_rank else ""
    return [
        f"{settings.method}{rank}, learning rate {defaults['learning_rate']:g}, {defaults['batch_rows']} rows a "
        f"step, {result['epochs']} epochs, of which epoch {result['best_epoch']} was kept ({result['stopped']}). Loss "
        f"on the answer only. {result['trained_tokens']} tokens on {config['device']}.",
    ]


def _scores(test: Scores, *, taught: bool) -> list[str]:
    lines = [TAUGHT, ""] if taught else []
    lines += [
        f"On {test.rows} held-out test rows, read once, from really generated answers:",
        "",
        "| score | value | 95% interval |",
        "|---|---|---|",
        f"| {test.metric} | {test.score:.3f} | {test.low:.3f} to {test.high:.3f} |",
    ]
    for name, value in (("accuracy", test.accuracy), ("macro_f1", test.macro_f1)):
        if name != test.metric and value is not None:
            lines.append(f"| {name} | {value:.3f} | |")
    lines.append(f"| invalid answers | {test.invalid:.1%} | |")
    return lines


def _limits(test: Scores, gates: Sequence[Gate]) -> list[str]:
    lines = [
        "- Tuned for one task; on anything else it may be worse than its base (gate `forgetting`).",
        f"- The test rows come from the same source as the training rows: inputs of another kind were not tried. The "
        f"interval of {test.rows} rows is "
        f"{(test.high - test.low):.2f} wide.",
    ]
    if rare := [k for k, v in (test.classes or {}).items() if v.support < 5]:
        shown = ", ".join(f"`{label}`" for label in rare[:8]) + (", ..." if len(rare) > 8 else "")
        lines.append(f"- {len(rare)} classes have fewer than 5 test rows and are hardly tested: {shown}.")
    seen = {gate.name for gate in gates}
    for name, what in (
        ("forgetting", "general abilities"),
        ("robustness", "other forms of the same question"),
    ):
        if name not in seen:
            lines.append(f"- Not measured: {what} (switched off).")
    lines += [f"- Gate `{g.name}` failed: {g.detail}." for g in gates if g.passed is False]
    return lines


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
