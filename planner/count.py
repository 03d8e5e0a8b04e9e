"""What is sent: a case's prompts and inputs, and their tokens with each model, counted once."""

from __future__ import annotations

from typing import Literal

from msgspec.structs import replace

from planner import price_data
from planner.settings import Settings
from planner.usage import Usage, measure
from unshot.case import Case
from unshot.data.load import load_inputs
from unshot.data.prompts import SLOT, Prompt
from unshot.data.rows import Example
from unshot.errors import InputError
from unshot.text.counters import Counter
from unshot.text.tokenizers import counter_for

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
        self.uncounted: set[str] = set()  # models that reason, without a figure for how long
        self._counters: dict[str, Counter] = {}
        self.inputs = self._inputs()
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
            rows, said = load_inputs(path, long, self.case.rows_as(), instruction=task.instruction)
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
            # The tuned model's template; a baseline of the same name is the same model.
            own = self.case.tune.chat_template if model == self.case.candidate.model and not api else None
            self._counters[model] = counter_for(
                model,
                api=api,
                paths=self.settings.paths,
                approximate=self.settings.approximate,
                template=own,
            )
        return self._counters[model]

    def usage(self, model: str, label: Label, *, api: bool) -> Usage:
        """Tokens of a prompt with a model."""
        name = f"{model}, {label} prompt"
        if name in self.usages:
            return self.usages[name]
        output = self.case.traffic.output_tokens
        found = measure(self.prompts[label], self.inputs, self._counter(model, api=api), output_tokens=output)
        self.notes.append(f"tokens of {model}: counted with {found.described()}")
        if output is not None and any(row.answer for row in self.inputs):
            self.notes.append(
                f"answers: {output:g} tokens each, as given; those of the inputs are not counted"
            )
        self.usages[name] = self._with_reasoning(model, found) if api else found
        return self.usages[name]

    def doubts(self) -> list[str]:
        """Warnings about what was counted: approximate tokenizers, and reasoning that nobody gave a figure for."""
        found = []
        models = {name.rpartition(", ")[0]: usage.error for name, usage in self.usages.items()}
        for error in sorted(set(models.values()) - {0.0}):
            names = ", ".join(name for name, its in models.items() if its == error)
            found.append(f"tokens of {names} are approximate: within {error:.0%}")
        thought = self.case.traffic.reasoning_tokens
        if thought and not any(usage.reasoning for usage in self.usages.values()):
            found.append(
                f"{thought:g} reasoning tokens are not counted: no model of this plan reasons, by the catalog"
            )
        if self.uncounted:
            names = ", ".join(sorted(self.uncounted))
            found.append(
                f"{names}: reasons before it answers and bills that as output; none is counted: give "
                "[traffic] reasoning_tokens (--reasoning-tokens), from the usage your provider reports"
            )
        return found

    def _with_reasoning(self, model: str, usage: Usage) -> Usage:
        """The usage with the tokens that the model thinks before an answer, as the case gives them."""
        thought = self.case.traffic.reasoning_tokens
        if not price_data.reasons(model):
            return usage
        if thought is None:
            self.uncounted.add(model)
            return usage
        self.notes.append(f"{model}: {thought:g} reasoning tokens per request, your figure")
        return replace(usage, reasoning=thought)


def short_prompt(short: Prompt, long: Prompt) -> Prompt:
    """The tuned model's prompt. Where the long one is a text with several slots, the input is all of them."""
    slots = list(dict.fromkeys(SLOT.findall(long.template))) if long.template else []
    if len(slots) < 2:
        return short
    return Prompt(short.system, (), "\n\n".join("{{" + name + "}}" for name in slots))
