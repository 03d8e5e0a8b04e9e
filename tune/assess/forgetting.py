"""What the model could do before and can no longer: perplexity and accuracy on a general held-out set.

The set that is shipped (`general.jsonl`: knowledge, arithmetic, language, instructions) was written for this project
and is never trained on: `--mix` leaves out what is like it.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from unshot.contracts.gates import Gate
from unshot.data.rows import Example
from unshot.metrics.intervals import mean, paired
from unshot.metrics.quality import ERROR
from unshot.metrics.thresholds import FORGETTING_KNOWN, FORGETTING_PERPLEXITY

if TYPE_CHECKING:
    from tune.job import Job

MAX_TOKENS = 16


@dataclass(frozen=True)
class Measured:
    """One model on the general set: perplexity of the reference replies, and which items it answered right."""

    perplexity: float
    right: list[bool]


def accepted(row: Example) -> list[str]:
    """What counts as a right answer: the row's `answers`, else its whole reply."""
    given = row.extra.get("answers")
    return [str(a) for a in given] if isinstance(given, list) and given else [row.answer or ""]


def is_right(row: Example, reply: str) -> bool:
    """Whether an accepted answer stands in the reply as whole words; case counts only where an answer is all capitals.

    "No" in "No, ..." is right, "art" in "start" is not.
    """
    for answer in accepted(row):
        shout = answer.isupper() and len(answer) > 3
        text, wanted = (reply, answer) if shout else (reply.casefold(), answer.casefold())
        if re.search(rf"(?<!\w){re.escape(wanted.strip())}(?!\w)", text):
            return True
    return False


def measure(job: Job, net: Any, rows: Sequence[Example]) -> Measured:
    """Ask the general questions without the task's instruction: greedy answers, and the loss of the references."""
    from tune.loss import mean_loss, soft_prompt, with_virtual
    from tune.score import answer_requests

    replies = answer_requests(job, net, [row.messages for row in rows], MAX_TOKENS)
    encoded = [job.chat.encode(row.messages, row.answer or "") for row in rows]
    soft = soft_prompt(net)
    if soft is not None:
        encoded = with_virtual(encoded, soft.shape[0])
    loss = mean_loss(net, encoded, job.config.capacity, job.device, bf16=job.bf16, world=job.world)
    return Measured(
        math.exp(min(loss, 50.0)), [is_right(row, reply) for row, reply in zip(rows, replies, strict=True)]
    )


@contextlib.contextmanager
def untuned(net: Any) -> Iterator[Any]:
    """The base inside a peft model: without its soft prompt, or with its adapter switched off."""
    from tune.loss import core, soft_prompt

    if soft_prompt(net) is not None:
        yield core(net)
        return
    with net.disable_adapter():
        yield net


def forgetting(rows: Sequence[Example], before: Measured, after: Measured, drop: float) -> Gate:
    """The gate: accuracy may fall by `drop` at most, perplexity rise to `FORGETTING_PERPLEXITY` times at most.

    Accuracy goes by the one-sided 95% bounds of the paired change: failed if it falls by more than `drop`, passed if
    that is ruled out, else undecided; and so is a base that answers too few questions to be seen forgetting.
    """
    most = FORGETTING_PERPLEXITY.value
    was, now = np.array(before.right, dtype=float), np.array(after.right, dtype=float)
    change = paired(float((now - was).mean()), now - was)
    bound = paired(change.value, now - was, level=1 - 2 * ERROR)
    ratio = after.perplexity / before.perplexity
    passed: bool | None = True if bound.low >= -drop else False if bound.high < -drop else None
    word = {True: "shown", False: "fell by more", None: "too few questions to tell"}[passed]
    if was.mean() < FORGETTING_KNOWN.value:
        passed, word = None, "the base answers too few of them for accuracy to count"
    if not ratio <= most:
        passed, word = False, f"{word}; perplexity rose by more"
    kinds: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        kinds[str(row.extra.get("kind", "all"))].append(number)
    return Gate(
        name="forgetting",
        passed=passed,
        detail=(
            f"{len(rows)} general questions: accuracy {was.mean():.3f} before, {now.mean():.3f} after, change "
            f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}] (may fall by {drop:g}); perplexity "
            f"{before.perplexity:.2f} before, {after.perplexity:.2f} after (may rise {most:g} times): {word}"
        ),
        figures={
            "rows": len(rows),
            "accuracy_before": vars(mean(was)),
            "accuracy_after": vars(mean(now)),
            "change": vars(change),
            "perplexity_before": before.perplexity,
            "perplexity_after": after.perplexity,
            "allowed_drop": drop,
            "allowed_perplexity_ratio": most,
            "kinds": {
                name: {"rows": len(own), "before": float(was[own].mean()), "after": float(now[own].mean())}
                for name, own in sorted(kinds.items())
            },
        },
    )
