"""What the evaluated model says about the rows an export is checked on: prompt ids, greedy answers, logits as files."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.boundaries import boundaries, reach, served_context
from export.engines import Engine
from export.reference import Reference
from export.source import Model
from unshot.catalog.formats import Target

BATCH = 8  # rows the reference runs together
WINDOW = 48  # positions compared at the end of each prompt, besides those of the answer
SWEEP = 256  # tokens of the sequence of unseen ones
ANSWER_TOKENS = 16  # length of a greedy answer where the task does not say


@dataclass
class Expected:
    """What a model says about one row: prompt ids, greedy answer, logits of the compared positions.

    `long` rows are no request but a sequence that reaches past the windows of the configuration; they have no answer.
    A `sweep` is one of tokens that occur in no request, which only an exact file is held to.
    """

    ids: list[int]
    prompt: int
    answer: list[int]
    start: int
    logits: Path
    whole: bool = True  # False: only the beginning of the answer is known
    long: bool = False
    sweep: bool = False

    def load(self) -> np.ndarray:
        """fp32 logits, shape `(len(ids) - start, vocab)`."""
        values: np.ndarray = np.load(self.logits)
        return values


def expect(
    model: Model,
    reference: Reference,
    rows: int,
    folder: Path,
    tick: Callable[[int], None] | None = None,
    proposed: list[list[int]] | None = None,
) -> list[Expected]:
    """The evaluated model's answers and logits on the first `rows` rows, kept as files in `folder`.

    A long sequence follows where the configuration has a window to reach past. `proposed` are an engine's greedy
    answers, for a reference that cannot generate: it follows them as far as it agrees.
    """
    prompts = [model.chat.prompt_ids(messages) for messages in model.requests()[:rows]]
    found: list[Expected | None] = [None] * len(prompts)
    # What every prompt begins with would be counted once a row, and its first token, where a small model keeps its
    # attention sink, is an outlier in 8 bits that no answer depends on.
    same = min(common_prefix(prompts), min(len(p) for p in prompts) - 1)
    # Neighbours in length share a batch, so that little of it is padding; a streamed model reads itself once a batch.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = BATCH if proposed is None else len(order)
    for begin in range(0, len(order), size):
        chosen = order[begin : begin + size]
        batch = [prompts[i] for i in chosen]
        if proposed is None:
            answers = reference.generate(batch, answer_tokens(model), model.chat.end)
        else:
            answers = [proposed[i] for i in chosen]
        whole = [p + a for p, a in zip(batch, answers, strict=True)]
        starts = [max(same, len(p) - WINDOW) for p in batch]
        for i, answer, ids, start, logits in zip(
            chosen, answers, whole, starts, reference.logits(whole, starts), strict=True
        ):
            path = folder / f"expected-{i}.npy"
            np.save(path, logits)
            row = Expected(ids, len(prompts[i]), answer, start, path)
            if proposed is not None:
                follow(row, logits, model.chat.end, answer_tokens(model))
            found[i] = row
        if tick:
            tick(len(chosen))
    more = [*_long(model, reference, prompts, folder), *_sweep(model, reference, prompts, folder)]
    return [*(row for row in found if row is not None), *more]


def _long(
    model: Model, reference: Reference, prompts: Sequence[Sequence[int]], folder: Path
) -> list[Expected]:
    """One sequence past every window within the served context, made of the prompts one after the other."""
    length = reach(model.config, served_context(model.config, []))
    if length is None:
        return []
    ids: list[int] = []
    while len(ids) < length:
        for prompt in prompts:
            ids += prompt
    return [_alone(reference, ids[:length], folder / "expected-long.npy")]


def _sweep(
    model: Model, reference: Reference, prompts: Sequence[Sequence[int]], folder: Path
) -> list[Expected]:
    """One sequence of tokens that occur in no prompt, drawn from the whole vocabulary: rows that no request reads,
    experts that none is sent to.
    """
    tokenizer = model.chat.tokenizer
    seen = {*tokenizer.added, *(i for ids in prompts for i in ids)}
    others = [i for i in range(tokenizer.backend.get_vocab_size(with_added_tokens=False)) if i not in seen]
    length = min(SWEEP, len(others), served_context(model.config, []))
    if length < 2:
        return []
    row = _alone(reference, random.Random(11).sample(others, length), folder / "expected-sweep.npy")
    row.sweep = True
    return [row]


def _alone(reference: Reference, ids: list[int], path: Path) -> Expected:
    start = max(0, len(ids) - WINDOW)
    np.save(path, reference.logits([ids], [start])[0])
    return Expected(ids, len(ids), [], start, path, whole=False, long=True)


def follow(row: Expected, logits: np.ndarray, end: int, tokens: int) -> None:
    """Turn a proposed answer into the reference's own, as far as its logits tell; `whole` says if that is all of it."""
    own: list[int] = []
    for step, choice in enumerate(logits[row.prompt - row.start - 1 :].argmax(axis=1).tolist()):
        if choice == end:
            row.answer = own
            return
        if len(own) == tokens:
            break
        own.append(choice)
        if step >= len(row.answer) or row.answer[step] != choice:
            row.whole = len(own) == tokens
            break
    row.answer = own


def propose(model: Model, target: Target, path: Path, rows: int, base: Path | None = None) -> list[list[int]]:
    """The exported file's own greedy answers to the first `rows` rows."""
    prompts = [model.chat.prompt_ids(messages) for messages in model.requests()[:rows]]
    answers = []
    whole, lora = (path, None) if base is None else (base, path)
    with Engine(target.engine, whole, context=context_for(model, prompts), lora=lora) as engine:
        for ids in prompts:
            engine.logits(ids, len(ids) - 1)
            answers.append(
                engine.generate(len(ids), answer_tokens(model), [*engine.info.end, model.chat.end])
            )
    return answers


def context_for(model: Model, sequences: Sequence[Sequence[int]]) -> int:
    """Tokens that an engine is opened with: those served where the model changes with them, else what the rows take."""
    longest = max(len(ids) for ids in sequences) + answer_tokens(model) + 8
    found = boundaries(model.config)
    return served_context(model.config, found) if found else max(256, longest)


def common_prefix(sequences: list[list[int]]) -> int:
    """How many leading tokens all sequences share; at least 1, so that a lone row skips its first token too."""
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length if len(sequences) > 1 else 1


def answer_tokens(model: Model) -> int:
    """How many tokens a greedy answer may have."""
    return (model.task.max_answer_tokens if model.task else None) or ANSWER_TOKENS
