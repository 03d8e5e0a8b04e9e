"""What a right answer is: the part of a case that every stage needs to score answers, kept as `task.json`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from unshot.case import TaskSettings
from unshot.contracts.document import Document
from unshot.data.example import normal
from unshot.data.files import read_object
from unshot.data.rows import Example
from unshot.errors import InputError, OutsideError
from unshot.metrics.answers import (
    INVALID,
    Answers,
    JsonObject,
    Tools,
    find_label,
    json_object,
    json_value,
    parse_answer,
)
from unshot.metrics.registry import NAMES, MetricName
from unshot.metrics.registry import metric as find_metric
from unshot.metrics.scores import Scores, all_scores

if TYPE_CHECKING:
    from unshot.metrics.judge import Judge

MAX_LABELS = 200
# Says one line to the user.
Say = Callable[[str], None]


class Task(Document):
    """Instruction of the tuned model, labels and metric of the answer: `task.json`.

    `labels` None means that the answer is no class. `answer_field` names the field of a JSON answer that holds the
    label; None means that the answer is the label. The judge's and the embedder's names are those that the metric uses.
    """

    FILE: ClassVar[str] = "task.json"
    WRITTEN_BY: ClassVar[str] = "`unshot tune`"

    name: str = "case"
    instruction: str | None = None
    labels: list[str] | None = None
    answer_field: str | None = None
    metric: MetricName = "exact_match"
    max_answer_tokens: int | None = None
    answer_schema: JsonObject | None = None
    judge: str | None = None
    judge_model: str | None = None
    judge_key_env: str | None = None
    embedder: str | None = None

    @classmethod
    def upgrade(cls, raw: JsonObject, version: int) -> JsonObject | None:
        """Before version 1 the file had none; its fields are today's."""
        return raw if version == 0 else None

    def under(self, section: TaskSettings, say: Say = lambda line: None) -> Task:
        """The task with what a case says over it; what differs from the task as the model was tuned for is said."""
        given: dict[str, Any] = {}
        for name in (
            "instruction",
            "labels",
            "answer_field",
            "metric",
            "judge",
            "judge_model",
            "judge_key_env",
        ):
            value, own = getattr(section, name), getattr(self, name)
            if value is None or value == own or (name == "labels" and _same_labels(value, own)):
                continue
            given[name] = value
            if not name.startswith("judge"):
                say(
                    f"{name}: the case or the command line says {value!r:.80}; the model was tuned for {own!r:.80}"
                )
        return self.changed(**given)

    def label(self, answer: str) -> str:
        """The label (or the whole text) an answer states, `INVALID` if it states none."""
        return parse_answer(answer, labels=self.labels, field=self.answer_field)

    def answers(
        self,
        references: Sequence[str],
        given: Sequence[str | None],
        *,
        requests: Sequence[str] | None = None,
        tools: Tools | None = None,
    ) -> Answers:
        """Answers as this task reads them; None is an unanswered request. `requests` are what a judge is shown.

        `tools` None: the judge and the embedder that the task names.
        """
        if tools is None:
            judge = None
            if self.metric == "judge" and self.judge is not None:
                judge = _judge(self.judge, self.judge_model, self.judge_key_env)
            tools = Tools(judge, self.embedder)
        return Answers(
            list(references),
            list(given),
            self.labels,
            self.answer_field,
            list(requests) if requests is not None else None,
            tools,
        )

    def scores(
        self,
        references: Sequence[str],
        given: Sequence[str | None],
        *,
        requests: Sequence[str] | None = None,
        seed: int = 0,
    ) -> Scores:
        """Score raw answers against raw references under the task's metric."""
        return all_scores(self.metric, self.answers(references, given, requests=requests), seed=seed)


@functools.lru_cache(maxsize=2)
def _judge(spec: str, model: str | None, key_env: str | None) -> Judge:
    """A judge stays open: it is asked after each epoch."""
    from unshot.metrics.judge import open_judge

    return open_judge(spec, model, key_env)


def derive_task(
    section: TaskSettings,
    examples: Sequence[Example],
    say: Say = lambda line: None,
    *,
    embedder: str | None = None,
) -> Task:
    """Fill what the case leaves open from the data: a label field, the labels, the metric.

    What was derived is said, with how to set it. A JSON answer of several fields is scored on all of them unless its
    label field is named; a constant is never the metric. Raises `InputError` for answers outside the labels and for a
    metric that the answers do not fit, naming the line. `embedder` is that of the metric `bertscore`.
    """
    answers = [example.answer or "" for example in examples]
    schema = read_schema(section.answer_schema) if section.answer_schema else None
    field, labels, json_task = derive_classes(section, answers, say)
    metric = section.metric
    if metric is None:
        metric = "macro_f1" if labels else "json_f1" if json_task else "exact_match"
        why = f"{len(labels)} classes" if labels else "JSON objects" if json_task else "texts"
        say(f"metric: {metric}, as the answers are {why}; set another by --metric")
    task = Task(
        name=section.name, instruction=section.instruction, labels=labels, answer_field=field, metric=metric,
        answer_schema=schema, judge=section.judge, judge_model=section.judge_model,
        judge_key_env=section.judge_key_env, embedder=embedder,
    )  # fmt: skip
    _hold(task, section, examples)
    if examples:
        hold_metric(metric, task.answers(answers, answers), training=True)
    return task


def derive_classes(
    section: TaskSettings, answers: Sequence[str], say: Say = lambda line: None
) -> tuple[str | None, list[str] | None, bool]:
    """The label field of JSON answers, the labels (None: no classes), and whether answers are JSON without a label."""
    objects = [o for a in answers if (o := json_object(a)) is not None]
    field = section.answer_field
    if field is None and answers and len(objects) == len(answers):
        field = _label_field(section, objects, say)
    json_task = field is None and bool(answers) and len(objects) == len(answers)
    return field, _labels(section, answers, field, json_task, say), json_task


def hold_metric(name: str, answers: Answers, *, training: bool = False) -> None:
    """Refuse a metric that cannot be computed on these references or, to train by, that would tell nothing on them.

    Raises `InputError`. `answers` may be the references themselves.
    """
    found = find_metric(name)
    problem = found.problem(answers) or (found.blind(answers) if training else None)
    if problem:
        raise InputError(f"metric {name}: {problem}; choose another by --metric ({', '.join(NAMES)})")


def _same_labels(one: Sequence[str], other: Sequence[str] | None) -> bool:
    return other is not None and set(map(normal, one)) == set(map(normal, other))


def _label_field(section: TaskSettings, objects: Sequence[JsonObject], say: Say) -> str | None:
    """The label field of JSON answers that needs no guess: the only field, or the only one that holds the labels."""
    names = list(dict.fromkeys(name for o in objects for name in o))
    texts = [n for n in names if all(isinstance(o.get(n), str) for o in objects)]
    if section.labels is not None:
        fits = [n for n in texts if all(find_label(o[n], section.labels) != INVALID for o in objects)]
        if len(fits) == 1:
            say(f"answer field: `{fits[0]}`, the only one that holds the labels; set it by --answer-field")
            return fits[0]
        found = f"{len(fits)} fields hold" if fits else "no field holds"
        raise InputError(
            f"the answers are JSON objects with the fields {', '.join(names[:8])}, and {found} the labels throughout; "
            "name the field by --answer-field"
        )
    if len(names) == 1 and texts and _recurring([o[names[0]] for o in objects]):
        say(f"answer field: `{names[0]}`, the only field of the answers; set it by --answer-field")
        return names[0]
    if section.metric is not None and "classes" in find_metric(section.metric).needs:
        raise InputError(
            f"metric {section.metric} needs classes, and the answers are JSON objects with the fields "
            f"{', '.join(names[:8])}; name the one that holds the label by --answer-field, or choose --metric json_f1"
        )
    say(
        f"no answer field is named: all fields count ({', '.join(names[:8])}); score one by --answer-field NAME"
    )
    return None


def _labels(
    section: TaskSettings, answers: Sequence[str], field: str | None, json_task: bool, say: Say
) -> list[str] | None:
    """The labels of the case, or those that recur among the answers."""
    if section.labels is not None:
        return section.labels
    if json_task:
        return None
    values = [v for a in answers if (v := parse_answer(a, field=field)) != INVALID]
    needed = section.metric is not None and "classes" in find_metric(section.metric).needs
    if len(set(values)) == 1 and len(answers) > 1:
        say(
            f"every answer is {values[0]!r:.60}: no metric can tell a model that has learnt from one that has not"
        )
        return sorted(set(values)) if needed else None
    if not needed and not _recurring(values):
        return None
    labels = sorted(set(values))
    shown = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
    say(f"labels: {len(labels)} that recur in the answers ({shown}); set them by --labels")
    return labels


def _recurring(values: Sequence[str]) -> bool:
    """Whether texts are classes: several, not too many, each seen twice on average."""
    distinct = len({normal(v) for v in values})
    return 2 <= distinct <= min(MAX_LABELS, len(values) // 2)


def _hold(task: Task, section: TaskSettings, examples: Sequence[Example]) -> None:
    """Hold every row's answer to the task's schema and labels. Raises `InputError` naming the line."""
    fault = schema_check(task.answer_schema) if task.answer_schema else None
    for example in examples:
        answer, where = example.answer or "", example.where or f"line {example.line}"
        if fault and (problem := fault(answer)):
            raise InputError(f"{where}: the answer does not fit {section.answer_schema} ({problem})")
        if task.label(answer) == INVALID:
            known = f"; labels: {', '.join(task.labels[:8])}" if task.labels else ""
            raise InputError(
                f"{where}: the answer {answer!r:.80} is not a JSON object with a text "
                f"`{task.answer_field}`{known}"
                if task.answer_field
                else f"{where}: the answer {answer!r:.80} is not one of the labels{known}"
            )


def read_schema(path: Path) -> JsonObject:
    """A JSON schema's content; `InputError` where the file holds none."""
    schema = read_object(path, wanted="a JSON schema of an answer is an object")
    schema_check(schema, str(path))
    return schema


def schema_check(schema: JsonObject, where: str = "answer_schema") -> Callable[[str], str | None]:
    """What is wrong with an answer under a schema, in a few words; None for one that fits.

    Nothing is fetched. Raises `InputError` for what is no schema, or refers to something that it does not hold.
    """
    try:
        import jsonschema
        import referencing
        from jsonschema_specifications import REGISTRY
    except ImportError as error:
        raise OutsideError(
            f"checking an answer_schema needs jsonschema ({error}); run `pip install 'unshot[tune]'`"
        ) from None
    kind = jsonschema.validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise InputError(f"{where}: not a JSON schema ({error.message})") from None
    validator = kind(schema, registry=REGISTRY)
    for target in _references(schema):
        try:
            validator._resolver.lookup(target)
        except referencing.exceptions.Unresolvable:
            raise InputError(
                f"{where}: `$ref` {target!r:.80} leads nowhere; nothing is fetched: put what it means under `$defs`"
            ) from None

    def problem(answer: str) -> str | None:
        try:
            found = jsonschema.exceptions.best_match(validator.iter_errors(json_value(answer)))
        except RecursionError:
            return "it is nested too deep"
        except ValueError:
            return "it is not JSON"
        return None if found is None else f"{found.json_path}: {found.message[:120]}"

    return problem


def _references(value: Any) -> Iterator[str]:
    """What a schema refers to; nothing where it holds parts with names of their own (`$id`)."""
    rest, found = [value], []
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            if one is not value and isinstance(one.get("$id"), str):
                return
            found += [one["$ref"]] if isinstance(one.get("$ref"), str) else []
        rest += one.values() if isinstance(one, dict) else one if isinstance(one, list) else []
    yield from found


def read_task(path: Path) -> Task:
    """Read a `task.json`; `InputError` if it is not one."""
    return Task.read(path)
