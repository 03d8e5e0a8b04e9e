"""What is sent: a case's prompts and inputs, and their tokens with each model, counted once and kept between runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from planner import prices
from planner.settings import Settings
from planner.usage import Usage, measure
from unshot.case import Case
from unshot.data.load import load_inputs
from unshot.data.prompts import SLOT, Prompt
from unshot.data.rows import Example
from unshot.errors import InputError
from unshot.memo import Task, ahead, digest, remember
from unshot.text.counters import Counter
from unshot.text.encodings import openai_encoding
from unshot.text.tokenizers import counter_for, fingerprint

Label = Literal["long", "short"]


class Counts:
    """The tokens of a case's requests. Raises `InputError` for inputs that are missing or cannot be read."""

    def __init__(self, case: Case, settings: Settings) -> None:
        self.case, self.settings = case, settings
        long = case.long_prompt()
        self.prompts: dict[Label, Prompt] = {"long": long, "short": short_prompt(case.short_prompt(), long)}
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.usages: dict[str, Usage] = {}
        self._counters: dict[str, Counter] = {}
        self.inputs = self._inputs()
        self._contents = digest(
            [(e.messages, e.answer, sorted(e.extra.items(), key=repr)) for e in self.inputs]
        )
        if long.template is None and not long.examples:
            self.warnings.append(
                "the long prompt holds no examples: give them with --prompt or [task] examples"
            )
        if self.prompts["short"].system is None:
            self.notes.append(
                "no instruction was given: the tuned model's prompt is the input alone (--instruction)"
            )

    def _inputs(self) -> list[Example]:
        task, long = self.case.task, self.prompts["long"]
        path = task.inputs or task.data
        if path is not None:
            rows, said = load_inputs(path, long)
            self.notes += [f"inputs: {line}" for line in said]
            return rows
        if long.examples:
            self.notes.append(
                "inputs: none given, so the few-shot examples stand for the real inputs (--inputs)"
            )
            return list(long.examples)
        raise InputError("what is asked? give a sample of real inputs: --inputs FILE, or [task] inputs")

    def _counter(self, model: str, *, api: bool) -> Counter:
        """The counter of a model, made once."""
        if model not in self._counters:
            self._counters[model] = counter_for(
                model, api=api, paths=self.settings.paths, approximate=self.settings.approximate
            )
        return self._counters[model]

    def _task(self, model: str, label: Label, *, api: bool) -> Task:
        """What `remember` takes for the tokens of a prompt with a model."""
        prompt, output = self.prompts[label], self.case.traffic.output_tokens

        def count() -> dict[str, Any]:
            return measure(prompt, self.inputs, self._counter(model, api=api), output_tokens=output).dump()

        source = fingerprint(model, api=api, paths=self.settings.paths, approximate=self.settings.approximate)
        shots = [(e.messages, e.answer) for e in prompt.examples]
        return "tokens", (source, prompt.system, prompt.template, shots, self._contents, output), count

    def usage(self, model: str, label: Label, *, api: bool) -> Usage:
        """Tokens of a prompt with a model; counts of an earlier run with the same contents are taken over."""
        name = f"{model}, {label} prompt"
        if name in self.usages:
            return self.usages[name]
        found = Usage.load(remember(*self._task(model, label, api=api)), self.prompts[label])
        self.notes.append(f"tokens of {model}: counted with {found.described()}")
        if found.error:
            self.warnings.append(f"tokens of {model} are approximate: within {found.error:.0%}")
        self.usages[name] = found
        return found

    def ahead(self) -> None:
        """Begin to count, a process for each model, while this one loads what a plan is made with."""
        long: Sequence[Label] = ("long",)
        both: Sequence[Label] = ("long", "short")
        today = self.case.baseline
        wanted: dict[tuple[str, bool], Sequence[Label]] = {(self.case.candidate.model, False): both}
        if today.model is not None:
            wanted.setdefault((today.model, False), long)
        for name in (today.api, self.case.plan.cheaper_api or prices.cheaper(today.api or "")):
            if name is not None and openai_encoding(name) is not None:
                wanted[name, True] = both if prices.sold_tuned(name) else long
        for (model, api), labels in wanted.items():
            ahead([self._task(model, label, api=api) for label in labels])


def short_prompt(short: Prompt, long: Prompt) -> Prompt:
    """The tuned model's prompt. Where the long one is a text with several slots, the input is all of them."""
    slots = list(dict.fromkeys(SLOT.findall(long.template))) if long.template else []
    if len(slots) < 2:
        return short
    return Prompt(short.system, (), "\n\n".join("{{" + name + "}}" for name in slots))
