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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tune.evaluate.scores import draws, interval, mean_interval
from unshot.contracts.gates import Gate
from unshot.data.rows import Example, read_examples

if TYPE_CHECKING:
    from tune.job import Job

SHIPPED = Path(__file__).parent / "general.jsonl"
MAX_TOKENS = 16
# Below this accuracy the base knows too little of the set to be seen forgetting it.
KNOWS = 0.1
# Perplexity may rise to this multiple: a narrow model's replies become terser, which alone costs some.
PERPLEXITY_RATIO = 1.5


@dataclass(frozen=True)
class Measured:
    """One model on the general set: perplexity of the reference replies, and which items it answered right."""

    perplexity: float
    right: list[bool]


def read_general(path: Path | None) -> list[Example]:
    """The shipped set, or rows of a file (`prompt`, `completion`, and where wanted `answers`, a list)."""
    return read_examples(path or SHIPPED)


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
    from tune.run import answer_requests

    replies = answer_requests(job, net, [row.messages for row in rows], MAX_TOKENS)
    encoded = [job.chat.encode(row.messages, row.answer or "") for row in rows]
    soft = soft_prompt(net)
    if soft is not None:
        encoded = with_virtual(encoded, soft.shape[0])
    loss = mean_loss(net, encoded, job.plan.capacity, job.device, bf16=job.bf16, world=job.world)
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
    """The gate: accuracy may fall by `drop` at most, perplexity rise to 1.5 times at most."""
    was, now = np.array(before.right, dtype=float), np.array(after.right, dtype=float)
    chosen = draws([str(row.extra.get("kind", "")) for row in rows])
    change = now - was
    fall = float(was.mean() - now.mean())
    ratio = after.perplexity / before.perplexity
    knows = was.mean() >= KNOWS
    failed = (knows and fall > drop) or ratio > PERPLEXITY_RATIO
    kinds: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        kinds[str(row.extra.get("kind", "all"))].append(number)
    detail = (
        f"{len(rows)} general questions: accuracy {was.mean():.3f} before, {now.mean():.3f} after (may fall by "
        f"{drop:g}); perplexity {before.perplexity:.2f} before, {after.perplexity:.2f} after (may rise "
        f"{PERPLEXITY_RATIO:g} times)"
    )
    if not knows:
        detail += "; the base answers too few of them for accuracy to count"
    return Gate(
        name="forgetting",
        passed=not failed,
        detail=detail,
        figures={
            "rows": len(rows),
            "accuracy_before": vars(mean_interval(was, chosen)),
            "accuracy_after": vars(mean_interval(now, chosen)),
            "change": vars(interval(change[chosen].mean(axis=1), float(change.mean()))),
            "perplexity_before": before.perplexity,
            "perplexity_after": after.perplexity,
            "allowed_drop": drop,
            "allowed_perplexity_ratio": PERPLEXITY_RATIO,
            "kinds": {
                name: {"rows": len(own), "before": float(was[own].mean()), "after": float(now[own].mean())}
                for name, own in sorted(kinds.items())
            },
        },
    )
