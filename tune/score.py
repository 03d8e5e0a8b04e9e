"""A job's rows and requests answered by a model, and the answers' scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tune.job import Job, request
from unshot.data.rows import Example, Message
from unshot.text.chat import Encoded


def answer_rows(job: Job, net: Any, rows: Sequence[Example]) -> list[str]:
    """The model's greedy answers to rows of the task, in order."""
    return answer_requests(job, net, [request(r, job.task) for r in rows], job.task.max_answer_tokens or 64)


def answer_requests(job: Job, net: Any, requests: Sequence[Sequence[Message]], max_tokens: int) -> list[str]:
    """The model's greedy answers to any requests, in order."""
    import torch

    from tune.generate import answers

    # fp32 weights under training answer in the precision in which they are trained.
    precise = next(net.parameters()).dtype == torch.float32 and job.bf16
    with torch.autocast(job.device.split(":")[0], torch.bfloat16, enabled=precise):
        return answers(
            net,
            job.chat,
            requests,
            max_tokens=max_tokens,
            world=job.world,
        )


def score_rows(
    job: Job, net: Any, rows: Sequence[Example], encoded: Sequence[Encoded], keep: list[str] | None = None
) -> dict[str, Any]:
    """Loss, and the task's scores of really generated answers, which `keep` receives."""
    from tune.loss import mean_loss

    texts = answer_rows(job, net, rows)
    if keep is not None:
        keep.extend(texts)
    loss = mean_loss(net, encoded, job.config.capacity, job.device, bf16=job.bf16, world=job.world)
    scores = job.task.scores([r.answer or "" for r in rows], texts, requests=[r.text for r in rows])
    return {"loss": loss, **scores.plain()}
