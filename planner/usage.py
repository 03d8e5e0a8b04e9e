"""Tokens per request over a sample of real inputs and answers, and where in the prompt they are spent."""

from __future__ import annotations

import re
from collections.abc import Sequence

from msgspec import Struct

from unshot.data.prompts import SLOT, Prompt
from unshot.data.rows import Example, Message
from unshot.errors import InputError
from unshot.text.counters import Counter

MAX_SAMPLE = 400
# Two inputs with nothing in common, so that a sample of alike inputs does not pass for static prefix.
PROBES = ("Zx 9", "quiet, 4?")


class Spread(Struct, frozen=True):
    """A distribution in tokens: mean, 5th/50th/95th percentile, largest, and the sample's size."""

    mean: float
    p5: float
    p50: float
    p95: float
    largest: float
    rows: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of a non-empty sample (linear interpolation between order statistics)."""
        ordered = sorted(values)

        def quantile(share: float) -> float:
            place = share * (len(ordered) - 1)
            low = int(place)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

        mean = sum(ordered) / len(ordered)
        return cls(mean, quantile(0.05), quantile(0.5), quantile(0.95), ordered[-1], len(ordered))


class Usage(Struct, frozen=True):
    """Tokens of one prompt with one model. `prefix` is static (cacheable); `varying` is the rest of the input.

    `samples` holds `(input tokens, output tokens)` per sampled request, for the simulation. `reasoning` tokens are
    thought before each answer and billed as output; `output` is the answer alone.
    """

    counter: str
    error: float
    prefix: int
    input: Spread
    output: Spread
    samples: tuple[tuple[int, int], ...]
    examples: tuple[ExampleCost, ...] = ()
    reasoning: float = 0.0

    @property
    def varying(self) -> float:
        """Mean input tokens that differ from request to request."""
        return max(self.input.mean - self.prefix, 0.0)

    def described(self) -> str:
        """What was counted with, and how well."""
        return f"{self.counter}, within {self.error:.0%}" if self.error else self.counter


class ExampleCost(Struct, frozen=True):
    """What one few-shot example (or one block of a text prompt) adds to every request, in tokens."""

    number: int
    tokens: int
    text: str


def measure(
    prompt: Prompt, inputs: Sequence[Example], counter: Counter, *, output_tokens: float | None = None
) -> Usage:
    """Count `prompt` with each of `inputs` (at most 400, evenly spread).

    Answers in the inputs give the output distribution unless `output_tokens` is given; without either the answers of
    the few-shot examples do. Raises `InputError` where nothing says how long an answer is.
    """
    rows = _thin(inputs)
    requests = [request(prompt, row) for row in rows]
    counts = counter.prompts(requests)
    outputs = _outputs(prompt, rows, counter, output_tokens)
    paired = (
        outputs if len(outputs) == len(counts) else [outputs[i % len(outputs)] for i in range(len(counts))]
    )
    probes = [prompt.messages(text) for text in PROBES]
    prefix = min([counter.shared(*probes), *(counter.shared(probes[0], r) for r in requests[:4])])
    return Usage(
        counter=counter.name,
        error=counter.error,
        prefix=prefix,
        input=Spread.of(counts),
        output=Spread.of(outputs),
        samples=tuple(zip(counts, paired, strict=True)),
        examples=tuple(example_costs(prompt, counter)),
    )


def request(prompt: Prompt, row: Example) -> list[Message]:
    """The messages sent for one row: the prompt round the row's conversation."""
    return prompt.request(row)


def _thin(rows: Sequence[Example]) -> list[Example]:
    if len(rows) <= MAX_SAMPLE:
        return list(rows)
    step = len(rows) / MAX_SAMPLE
    return [rows[int(i * step)] for i in range(MAX_SAMPLE)]


def _outputs(
    prompt: Prompt, rows: Sequence[Example], counter: Counter, output_tokens: float | None
) -> list[int]:
    if output_tokens is not None:
        return [max(round(output_tokens), 1)]
    answers = [row.answer for row in rows if row.answer]
    answers = answers or [e.answer for e in prompt.examples if e.answer]
    if not answers:
        raise InputError(
            "how long is an answer? the inputs hold none; add answers to the inputs file, or pass --output-tokens N"
        )
    return [max(counter.answer(a), 1) for a in answers]


def example_costs(prompt: Prompt, counter: Counter) -> list[ExampleCost]:
    """Tokens that each few-shot example adds; for a text prompt, each paragraph before the input's slot."""
    texts = example_texts(prompt)
    if prompt.examples:
        whole = counter.prompt(prompt.messages(PROBES[0]))
        tokens = []
        for i in range(len(prompt.examples)):
            kept = prompt.examples[:i] + prompt.examples[i + 1 :]
            without = Prompt(prompt.system, kept, prompt.template)
            tokens.append(whole - counter.prompt(without.messages(PROBES[0])))
    else:
        tokens = [counter.text(block + "\n\n") for block in _blocks(prompt)]
    return [ExampleCost(i + 1, n, t) for i, (n, t) in enumerate(zip(tokens, texts, strict=True))]


def example_texts(prompt: Prompt) -> list[str]:
    """How each example (or paragraph of a text prompt) begins."""
    return [_short(e.text) for e in prompt.examples] or [_short(block) for block in _blocks(prompt)]


def _blocks(prompt: Prompt) -> list[str]:
    """The paragraphs of a text prompt before its first slot."""
    if prompt.template is None:
        return []
    slot = SLOT.search(prompt.template)
    static = prompt.template[: slot.start()] if slot else prompt.template
    return [b for b in re.split(r"\n\s*\n", static) if b.strip()]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."
