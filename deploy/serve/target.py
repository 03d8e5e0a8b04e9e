"""What an arm runs: a version of the registry, a GGUF file, or a server's URL, with the prompt that goes in front."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypedDict

from deploy.registry.store import Registry
from deploy.serve.check import Checker
from deploy.serve.parameters import Json, text_of
from unshot.case import Case
from unshot.contracts.artifact import artifact_of
from unshot.contracts.registry import State, Version
from unshot.contracts.request_log import Arm
from unshot.contracts.task import Task
from unshot.data.prompts import SLOT, Prompt
from unshot.engines.address import parse_url, read_key
from unshot.errors import InputError
from unshot.prices import Prices


@dataclass(frozen=True)
class Price:
    """US dollars: per million prompt tokens, cached prompt tokens and answer tokens, and per hour of the server."""

    prompt: float = 0.0
    answer: float = 0.0
    cached: float | None = None
    hour: float = 0.0

    def of(self, prompt: int | None, cached: int | None, answer: int | None, seconds: float) -> float:
        """Dollars of one answer that kept the server busy for `seconds`."""
        known = min(cached or 0, prompt or 0)
        rate = self.prompt if self.cached is None else self.cached
        tokens = ((prompt or 0) - known) * self.prompt + known * rate + (answer or 0) * self.answer
        return tokens / 1e6 + self.hour * seconds / 3600


def price_of(given: Prices | None, hour: float | None, model: str | None) -> Price | None:
    """What an arm costs: by the token, by the hour of its server, or both. Raises `InputError`."""
    if given is None:
        return Price(hour=hour) if hour else None
    tokens = given.of(model)
    return Price(tokens.input, tokens.output, tokens.cached, hour or 0.0)


@dataclass(frozen=True)
class ArmSpec:
    """Where an arm's answers come from, as the command line says it.

    `prompt` is `long`, `short`, `none`, or `client`: requests are passed on as they come.
    """

    spec: str
    prompt: str = "long"
    model: str | None = None
    key_env: str | None = None
    price: Price | None = None

    @property
    def follows(self) -> bool:
        """Whether it is a version or alias of the registry."""
        return not self.spec.startswith(("gguf:", "http://", "https://"))


@dataclass(frozen=True)
class Target:
    """A resolved arm. Two of the same `identity` are the same back end.

    `passes_through`: the client's messages, model name and key go on as they came.
    """

    identity: str
    label: str
    prompt: Prompt
    checker: Checker
    path: Path | None = None
    url: str | None = None
    model: str | None = None
    key: str | None = field(default=None, repr=False)
    max_tokens: int | None = None
    price: Price | None = None
    extra: Json = field(default_factory=dict)
    passes_through: bool = False

    @property
    def brings_prompt(self) -> bool:
        """Whether anything is put in front of, or around, the user's messages."""
        return bool(self.prompt.system or self.prompt.examples or self.prompt.template)

    @cached_property
    def _front(self) -> str:
        """JSON of the messages that every request begins with, encoded once: it is most of what is sent."""
        return "".join(f"{encode(m)}," for m in self.prompt.static())

    def encoded(self, given: Sequence[Json]) -> str:
        """JSON of the arm's prompt with the user's own messages behind it; a template takes the last one in."""
        last = given[-1]
        if self.prompt.template is not None and last.get("role") == "user":
            last = dict(self.prompt.messages(text_of(last))[-1])
        return f"[{self._front}{','.join(encode(m) for m in (*given[:-1], last))}]"


def own_messages(messages: Sequence[Json], prompt: Prompt | None) -> list[Json] | None:
    """What is the user's own in a request that begins with `prompt`, message by message; None where it does not.

    A prompt that differs by one character is another prompt. Of a template the text in its slot is the user's.
    """
    if prompt is None or not (prompt.system or prompt.examples or prompt.template):
        return None
    static = prompt.static()
    front, rest = messages[: len(static)], list(messages[len(static) :])
    if not rest or len(front) != len(static):
        return None
    for given, known in zip(front, static, strict=True):
        if given.get("role") != known["role"] or text_of(given) != known["content"] or len(given) > 2:
            return None
    if any(m["role"] in ("system", "developer") for m in rest):
        return None
    if prompt.template is None:
        return rest
    inside = in_template(text_of(rest[-1]), prompt.template)
    if inside is None or rest[-1].get("role") != "user":
        return None
    return [*rest[:-1], {"role": "user", "content": inside}]


def in_template(text: str, template: str) -> str | None:
    """The text in a template's slot (behind a template that has none); None where the rest is not the template."""
    slots = list(SLOT.finditer(template))
    if len(slots) > 1:
        return None
    begin, end = (slots[0].start(), slots[0].end()) if slots else (0, 0)
    before, after = (template[:begin], template[end:]) if slots else (f"{template.rstrip()}\n\n", "")
    if len(text) < len(before) + len(after) or not (text.startswith(before) and text.endswith(after)):
        return None
    return text[len(before) : len(text) - len(after)]


def encode(value: object) -> str:
    """Compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class _Common(TypedDict):
    """What a target has wherever it runs."""

    prompt: Prompt
    checker: Checker
    price: Price | None
    max_tokens: int | None


class Resolver:
    """Turns places into targets, by the case and the registry."""

    def __init__(
        self,
        case: Case,
        registry: Registry,
        schema: Json | None,
        max_tokens: int | None,
        *,
        verifies: bool = True,
    ) -> None:
        self.case = case
        self.registry = registry
        self.schema = schema
        self.max_tokens = max_tokens
        # A worker leaves it to the process that starts the servers.
        self.verifies = verifies
        self.long = case.long_prompt()
        self._verified: set[tuple[int, str]] = set()
        self._beside: dict[str, Task | None] = {}

    @property
    def task(self) -> Task:
        section = self.case.task
        return Task(
            name=section.name,
            instruction=section.instruction,
            labels=section.labels,
            answer_field=section.answer_field,
            metric=section.metric or "macro_f1",
        )

    def unfilled(self) -> list[str]:
        """A sentence for each slot that a gateway sends as it stands: what fills it is a row's column."""
        given = {"system prompt": self.case.task.system, "instruction": self.case.task.instruction}
        return [
            f"the case's {what} has the slot `{slot[0]}`: it goes to the model as it stands, a request has no columns"
            for what, text in given.items()
            for slot in SLOT.finditer(text or "")
        ]

    def task_of(self, place: ArmSpec, state: State) -> Task:
        """The task as a version or an exported file was tuned for it, else the case's."""
        if place.follows:
            version = _find(place, state)
            own = version.task if version is not None else None
        else:
            own = self._exported(place.spec)
        return own or self.task

    def _exported(self, spec: str) -> Task | None:
        """The task in the manifest beside a GGUF file, with the case over it; its hashes are checked once."""
        if spec not in self._beside:
            artifact = artifact_of(spec, verify=self.verifies)
            task = artifact.manifest.task if artifact is not None else None
            self._beside[spec] = task.under(self.case.task) if task is not None else None
        return self._beside[spec]

    def resolve(self, arm: Arm, place: ArmSpec, other: ArmSpec | None, state: State) -> Target | None:
        """The target of an arm; None where its alias names no version now. Raises `InputError`.

        An arm without a task of its own is held to the other arm's.
        """
        task = self.task_of(place, state)
        second = self.task_of(other, state) if other is not None else task
        labelled = task.labels is not None or task.answer_field is not None
        schema = self.schema or task.answer_schema or second.answer_schema
        common: _Common = {
            "prompt": self._prompt(place, task),
            "checker": Checker(task if labelled else second, schema),
            "price": place.price,
            "max_tokens": self.max_tokens or task.max_answer_tokens or second.max_answer_tokens,
        }
        if place.follows:
            version = _find(place, state)
            if version is None:
                return None
            return Target(
                identity=f"{arm}:{version.name}:{version.digest}",
                label=version.name,
                path=self._file(version.number, version.digest),
                extra={"repeat_penalty": 1.0},
                **common,
            )
        if place.spec.startswith("gguf:"):
            path = Path(place.spec.removeprefix("gguf:")).expanduser()
            check_gguf(path)
            return Target(
                identity=f"{arm}:{path}",
                label=path.name,
                path=path,
                extra={"repeat_penalty": 1.0},
                **common,
            )
        return Target(
            identity=f"{arm}:{place.spec}:{place.model}",
            label=place.model or parse_url(place.spec).authority,
            url=check_url(place.spec),
            model=place.model,
            key=read_key(place.key_env),
            passes_through=place.prompt == "client",
            **common,
        )

    def _prompt(self, place: ArmSpec, task: Task) -> Prompt:
        if place.prompt in ("none", "client"):
            return Prompt()
        short = place.prompt == "short"
        prompt = Prompt(system=task.instruction or self.case.task.instruction) if short else self.long
        if len(prompt.slots) > 1:
            raise InputError(
                f"the long prompt has the slots {', '.join(prompt.slots)}, and a user's message fills one: move what "
                "else changes into the message"
            )
        return prompt

    def _file(self, number: int, digest: str) -> Path:
        """The GGUF file of a version; hashes are checked when this process first serves it."""
        folder = self.registry.artifact(number)
        if self.verifies and (number, digest) not in self._verified:
            folder = self.registry.verified(number)
            self._verified.add((number, digest))
        files = sorted(folder.glob("model-*.gguf"))
        if not files:
            raise InputError(f"{folder}: no GGUF model in it; export with --to gguf:q8_0")
        return files[0]


def _find(place: ArmSpec, state: State) -> Version | None:
    """The version that a place names now; None where its alias is free."""
    if place.spec in ("champion", "challenger") and place.spec not in state.aliases:
        return None
    return state.find(place.spec)


def check_gguf(path: Path) -> None:
    """Raise `InputError` unless `path` is a GGUF file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give gguf:FILE")
    with path.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise InputError(f"{path}: not a GGUF file")


def check_url(url: str) -> str:
    """A base URL without a trailing slash. Raises `InputError`; credentials in it are refused."""
    return parse_url(url).base
