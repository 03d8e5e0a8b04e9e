"""Context distillation: the base model with the long prompt teaches the same weights with the short one.

The teacher's next-token distributions under the long prompt are what the student is trained towards, without labels
and without a second model: an adapter that is switched off leaves the teacher (Snell, Klein and Zhong 2022, "Learning
by distilling context", arXiv 2209.15189). Of each distribution the `k` most likely tokens are kept, the others are
one bucket, so that the loss is the Kullback-Leibler divergence of two coarser distributions: a lower bound of the
full one, and equal to it where k is the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from tune.batches import SoftTargets, Taught, pack
from tune.loss import pack_logits
from unshot.data.files import json_digest
from unshot.data.rows import Example
from unshot.engines.base import common_prefix
from unshot.text.chat import Encoded

KEPT_TOKENS = 64
BATCH = 16
# Largest difference of logits at which a padded batch counts as equal to a row alone, in units of their spread.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class TeacherAnswer:
    """What the teacher said to one input: token ids (the end-of-turn token last, unless it was cut off), and at each
    of them its distribution."""

    ids: list[int]
    soft: SoftTargets

    def finished(self, end: int) -> bool:
        """Whether the answer ended by itself."""
        return bool(self.ids) and self.ids[-1] == end


@dataclass(frozen=True)
class Teaching:
    """What the teacher said, by row; `labels` holds the answers that the data had of its own."""

    answers: dict[str, TeacherAnswer]
    texts: dict[str, str]
    labels: dict[str, str]
    # Rows whose answer the teacher did not finish: left out.
    unfinished: int
    # Mean tokens of the teacher's requests, and the requests' token ids by row.
    prompt_tokens: float
    prompts: dict[str, list[int]]

    def answered(self, rows: Sequence[Example]) -> list[Example]:
        """The rows that the teacher answered, with its answers."""
        return [replace(row, answer=self.texts[key(row)]) for row in rows if key(row) in self.answers]

    def taught(self, row: Example, prompt_ids: list[int]) -> Encoded:
        """The student's row: its own short request, the teacher's answer and distributions."""
        answer = self.answers[key(row)]
        return Taught([*prompt_ids, *answer.ids], len(prompt_ids), answer.soft)


def key(row: Example) -> str:
    """What tells one input from another: all its messages."""
    return json_digest([dict(m) for m in row.messages])


def ask(
    net: Any,
    prompts: Sequence[Sequence[int]],
    *,
    end: int,
    max_tokens: int,
    kept: int = KEPT_TOKENS,
    batch: int = BATCH,
    progress: Callable[[int], None] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[TeacherAnswer]:
    """The greedy answer to each prompt, with the distribution of every token of it; sampled at a `temperature`.

    `prompts` are token ids of whole requests. What all of them begin with is read once, and its keys and values are
    shared. Rows of different length stand in one batch where the model gives a row the same logits there as alone.
    """
    first = prompts[0]
    shared = min(min(common_prefix(first, other), len(other) - 1) for other in prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[TeacherAnswer | None] = [None] * len(prompts)
    net.eval()
    chance = None
    if temperature:
        chance = torch.Generator(next(net.parameters()).device).manual_seed(seed)
    with torch.inference_mode():
        prefix = _read(net, first[:shared]) if shared else None
        if batch > 1 and not _padding_is_harmless(
            net, prefix, shared, [prompts[order[0]], prompts[order[-1]]]
        ):
            batch = 1
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            rows = [list(prompts[i][shared:]) for i in chosen]
            for i, answer in zip(
                chosen,
                _answer(net, prefix, shared, rows, end, max_tokens, kept, temperature, chance),
                strict=True,
            ):
                found[i] = answer
            if progress:
                progress(len(chosen))
    return [answer for answer in found if answer is not None]


def _read(net: Any, ids: Sequence[int]) -> Any:
    """Keys and values of the shared beginning, batch of one."""
    device = next(net.parameters()).device
    given = torch.tensor([list(ids)], device=device)
    return net(input_ids=given, use_cache=True, logits_to_keep=1).past_key_values


def _start(
    net: Any, prefix: Any, shared: int, rows: Sequence[Sequence[int]]
) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read the rows behind the prefix: cache, logits of the next token (rows, vocabulary), mask, next positions."""
    import copy

    device = next(net.parameters()).device
    width = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long, device=device)
    mask = torch.zeros((len(rows), shared + width), dtype=torch.long, device=device)
    mask[:, :shared] = 1
    positions = torch.zeros((len(rows), width), dtype=torch.long, device=device)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = torch.tensor(row, device=device)
        mask[number, shared + width - len(row) :] = 1
        positions[number, width - len(row) :] = torch.arange(shared, shared + len(row), device=device)
    cache = copy.deepcopy(prefix)
    if cache is not None:
        cache.batch_repeat_interleave(len(rows))
    out = net(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    lengths = torch.tensor([shared + len(row) for row in rows], device=device)
    return out.past_key_values, out.logits[:, -1].float(), mask, lengths


def _padding_is_harmless(net: Any, prefix: Any, shared: int, pair: Sequence[Sequence[int]]) -> bool:
    """Whether the shortest prompt has the same next-token logits beside the longest as alone."""
    short, long = (list(ids[shared:]) for ids in pair)
    if len(short) == len(long):
        return True
    alone = _start(net, prefix, shared, [short])[1][0]
    beside = _start(net, prefix, shared, [short, long])[1][0]
    return bool((alone - beside).abs().max() <= TOLERANCE * alone.std())


def _answer(
    net: Any,
    prefix: Any,
    shared: int,
    rows: Sequence[Sequence[int]],
    end: int,
    max_tokens: int,
    kept: int,
    temperature: float = 0.0,
    chance: torch.Generator | None = None,
) -> list[TeacherAnswer]:
    cache, logits, mask, positions = _start(net, prefix, shared, rows)
    ids: list[list[int]] = [[] for _ in rows]
    soft: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in rows]
    going = [True] * len(rows)
    for step in range(max_tokens):
        logprobs, tokens = torch.log_softmax(logits, dim=-1).topk(min(kept, logits.shape[-1]), dim=-1)
        said = tokens[:, :1]
        if chance is not None:
            said = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=chance)
        for number in (n for n, on in enumerate(going) if on):
            ids[number].append(int(said[number, 0]))
            soft[number].append(
                (tokens[number].cpu().numpy().astype(np.int32), logprobs[number].cpu().numpy())
            )
            going[number] = ids[number][-1] != end
        if not any(going) or step + 1 == max_tokens:
            break
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        out = net(
            input_ids=said,
            attention_mask=mask,
            position_ids=(positions + step)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        cache, logits = out.past_key_values, out.logits[:, -1].float()
    return [
        TeacherAnswer(row, SoftTargets(np.stack([t for t, _ in kept_]), np.stack([p for _, p in kept_])))
        for row, kept_ in zip(ids, soft, strict=True)
    ]


def scored(
    net: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, kept: int = KEPT_TOKENS
) -> list[SoftTargets]:
    """The model's distributions at the tokens of given answers; what all prompts begin with is read once."""
    import copy

    device = next(net.parameters()).device
    shared = min(min(common_prefix(prompts[0], other), len(other) - 1) for other in prompts)
    found = []
    net.eval()
    with torch.inference_mode():
        prefix = _read(net, prompts[0][:shared]) if shared else None
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([[*prompt[shared:], *answer[:-1]]], device=device)
            logits = net(
                input_ids=ids,
                past_key_values=copy.deepcopy(prefix),
                use_cache=True,
                logits_to_keep=len(answer),
            ).logits[0]
            values, tokens = torch.log_softmax(logits.float(), dim=-1).topk(
                min(kept, logits.shape[-1]), dim=-1
            )
            found.append(SoftTargets(tokens.cpu().numpy().astype(np.int32), values.cpu().numpy()))
    return found


def divergence(net: Any, rows: Sequence[Encoded], device: str) -> np.ndarray:
    """KL divergence in nats from the teacher's distribution to the model's, mean over each row's answer tokens.

    `rows` carry soft targets; shape (rows,).
    """
    from tune.loss import soft_divergence

    found = []
    net.eval()
    with torch.inference_mode():
        for row in rows:
            item = pack([row])
            assert item.soft is not None
            found.append(float(soft_divergence(pack_logits(net, item, device), item.soft).mean()))
    return np.asarray(found)


def save_answers(path: Path, answers: Sequence[TeacherAnswer]) -> None:
    """Keep a teacher's answers as safetensors, by way of a temporary name."""
    temporary = path.with_name(path.name + ".tmp")
    lengths = np.array([len(a.ids) for a in answers], dtype=np.int64)
    save_file(
        {
            "lengths": lengths,
            "ids": np.concatenate([np.asarray(a.ids, dtype=np.int64) for a in answers]),
            "tokens": np.concatenate([a.soft.ids for a in answers]),
            "logprobs": np.concatenate([a.soft.logprobs for a in answers]),
        },
        temporary,
    )
    temporary.replace(path)


def load_answers(path: Path) -> list[TeacherAnswer]:
    """What `save_answers` kept."""
    kept = load_file(path)
    ends = np.cumsum(kept["lengths"])
    return [
        TeacherAnswer(
            kept["ids"][end - size : end].tolist(),
            SoftTargets(kept["tokens"][end - size : end], kept["logprobs"][end - size : end]),
        )
        for size, end in zip(kept["lengths"], ends, strict=True)
    ]
