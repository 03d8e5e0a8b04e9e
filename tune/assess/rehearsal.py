"""Rehearsal: the base's own answers to general prompts, trained on beside the task so that they are not forgotten.

No data from elsewhere: the prompts are shipped, the answers are the base's (self-synthesised rehearsal, Huang et al.
2024, arXiv 2403.01244; self-distillation, Yang et al. 2024, arXiv 2402.13669). The target of each answer token is the
base's distribution there, as in context distillation, and not the token alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune.mix import known, read_general, rehearsal_share
from tune.processes import share as share_value
from tune.split import order
from unshot.case import TuneSettings
from unshot.console import Output
from unshot.contracts.task import Task
from unshot.data.files import json_digest
from unshot.data.rows import Example, Message
from unshot.methods import METHODS
from unshot.text.chat import Encoded

if TYPE_CHECKING:
    from tune.job import Job

PROMPTS = Path(__file__).parent / "rehearsal.txt"
# Tokens of an answer that are rehearsed: what comes after the first ones follows from them.
MAX_TOKENS = 24
# Rows whose distributions are read together.
READ = 8


def prompts(settings: TuneSettings, count: int) -> list[str]:
    """`count` general prompts in an order by seed, none like what forgetting is measured on; again if too few."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    alike = known([row.text for row in read_general(settings.general)], lines)
    usable = sorted(
        (line for number, line in enumerate(lines) if number not in alike),
        key=lambda line: order(settings.seed, line),
    )
    return [usable[i % len(usable)] for i in range(count)]


def rehearse(job: Job, net: Any, work: Path, out: Output) -> Job:
    """The job with rehearsal rows among its training rows; `net` must still answer as the base does.

    The rows are kept in `work`, so that a resumed run trains on the same ones.
    """
    from tune.distil import load_answers, save_answers

    share = rehearsal_share(job.case.tune)
    count = math.ceil(len(job.train_rows) * share / (1 - share))
    if not count:
        return job
    asked = prompts(job.case.tune, count)
    distinct = list(dict.fromkeys(asked))
    kept = work / f"rehearsal-{json_digest([job.fingerprint.sha256, distinct])[:16]}.safetensors"
    if share_value(kept.is_file(), job.world):
        found = load_answers(kept)
    else:
        out.log(
            f"asking the base {len(distinct)} general questions, to rehearse its answers ({share:.0%} of the rows)"
        )
        found = own_answers(job, net, distinct)
        if job.world.first:
            save_answers(kept, found)
    requests = {text: job.chat.prompt_ids(message(text)) for text in distinct}
    rows = dict(zip(distinct, found, strict=True))
    general: list[Encoded] = [taught(requests[text], rows[text]) for text in asked]
    if METHODS[job.case.tune.method].virtual:
        from tune.loss import with_virtual

        general = with_virtual(general, job.case.tune.virtual_tokens)
    train_rows = [*job.train_rows, *general]
    config = replace(
        job.config,
        rows=len(train_rows),
        fingerprint=json_digest([job.config.fingerprint, [row.ids for row in general]]),
    )
    record = {**job.extras.record, "rehearsal": {"share": share, "rows": count, "prompts": len(distinct)}}
    return replace(job, train_rows=train_rows, config=config, extras=replace(job.extras, record=record))


def message(text: str) -> list[Message]:
    """A general prompt as a request, without the task's instruction."""
    return [{"role": "user", "content": text}]


def own_answers(job: Job, net: Any, texts: Sequence[str]) -> list[Any]:
    """The base's greedy answers, cut at `MAX_TOKENS`, and its distribution at each of their tokens."""
    import torch

    from tune.batches import SoftTargets, pack
    from tune.distil import KEPT_TOKENS, TeacherAnswer
    from tune.job import encode_rows
    from tune.loss import pack_logits
    from tune.score import answer_requests

    replies = answer_requests(job, net, [message(text) for text in texts], MAX_TOKENS)
    rows = [Example(tuple(message(t)), reply, 0, where=t) for t, reply in zip(texts, replies, strict=True)]
    encoded = encode_rows(rows, Task(), job.chat, job.case.tune.max_length, context=job.shape.context)
    together = READ if job.config.capacity > 1 else 1
    found = []
    # A soft prompt is no part of the base; an adapter before its first step changes nothing.
    net.eval()
    with torch.inference_mode():
        for start in range(0, len(encoded), together):
            some = encoded[start : start + together]
            logits = pack_logits(base_of(net), pack(some), job.device, bf16=job.bf16)
            values, ids = torch.log_softmax(logits, dim=-1).topk(min(KEPT_TOKENS, logits.shape[-1]), dim=-1)
            ends = [0]
            for row in some:
                ends.append(ends[-1] + row.answer_length)
                part = slice(ends[-2], ends[-1])
                soft = SoftTargets(ids[part].int().cpu().numpy(), values[part].float().cpu().numpy())
                found.append(TeacherAnswer(list(row.ids[row.prompt_length :]), soft))
    return found


def base_of(net: Any) -> Any:
    """The model as it was: without a soft prompt, whose vectors stand outside it."""
    from tune.loss import core, soft_prompt

    return core(net) if soft_prompt(net) is not None else net


def taught(prompt: list[int], answer: Any) -> Encoded:
    """A training row of a general prompt."""
    from tune.batches import Taught

    return Taught([*prompt, *answer.ids], len(prompt), answer.soft)
