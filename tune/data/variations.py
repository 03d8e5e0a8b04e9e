"""`unshot data label --variations`: new inputs that the teacher writes, marked synthetic and never tested on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tune import near
from tune.data.ledger import Entry
from tune.data.teacher import Question
from unshot.contracts.record import Record
from unshot.data.prompts import Prompt
from unshot.data.rows import Example, Message

# Inputs asked for in one request, and how many of the real ones it shows.
PER_REQUEST, SHOWN = 8, 6
MAX_TOKENS = 2048
# What is asked for beside a class, in turn.
KINDS = (
    "much shorter than these, down to a few words",
    "much longer than these, with side remarks",
    "edge cases: unusual wording, mistakes, mixed topics",
    "close calls, which a careless reader would take for something else",
)


class VariationCounts(Record):
    """New inputs: asked for, taken, refused as near-duplicates of known ones, and answers that held no list."""

    asked: int
    taken: int
    near_duplicates: int
    unreadable: int


@dataclass(frozen=True)
class Ask:
    """How many new inputs; `apart` are texts that none may be like (test rows), beside the inputs themselves."""

    count: int
    apart: Sequence[str] = ()
    seed: int = 0


def requests(
    rows: Sequence[Example], prompt: Prompt, labels: Sequence[str] | None, ask: Ask
) -> list[Question]:
    """The questions: each for some inputs of one class (in turn) and kind, behind some of the real ones."""
    chance = random.Random(f"variations {ask.seed}")
    texts = sorted({row.text for row in rows})
    found = []
    for number in range(-(-ask.count // PER_REQUEST)):
        some = chance.sample(texts, min(SHOWN, len(texts)))
        kind = KINDS[number % len(KINDS)]
        about = f" Their right answer would be {labels[number % len(labels)]!r}." if labels else ""
        said = "\n".join(json.dumps(text, ensure_ascii=False) for text in some)
        task = f"The task is described so:\n{prompt.system}\n\n" if prompt.system else ""
        messages: list[Message] = [
            {
                "role": "user",
                "content": f"{task}These are inputs that it gets:\n{said}\n\nWrite {PER_REQUEST} new inputs, {kind}."
                f"{about} Give a JSON list of {PER_REQUEST} strings and nothing else, without answers.",
            }
        ]
        found.append(Question(messages, MAX_TOKENS, 1.0, number))
    return found


def read_list(text: str) -> list[str] | None:
    """The texts of a JSON list somewhere in an answer; None without one."""
    start, end = text.find("["), text.rfind("]")
    try:
        value = json.loads(text[start : end + 1]) if 0 <= start < end else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, list):
        return None
    return [item.strip() for item in value if isinstance(item, str) and item.strip()]


def vary(
    rows: Sequence[Example],
    prompt: Prompt,
    labels: Sequence[str] | None,
    ask: Ask,
    answer: Callable[[Question], Entry],
    threads: int,
) -> tuple[list[Example], VariationCounts]:
    """Ask for new inputs and keep those that are like no input, no text to stay apart from, and not each other."""
    with ThreadPoolExecutor(threads) as pool:
        entries = list(pool.map(answer, requests(rows, prompt, labels, ask)))
    lists = [read_list(entry.text) if entry.status == "ok" else None for entry in entries]
    new = [text for found in lists if found for text in found]
    known = [*(row.text for row in rows), *ask.apart]
    alike: set[int] = set()
    for first, second, _ in near.similar_pairs([*known, *new]):
        if second >= len(known) and first - len(known) not in alike:
            alike.add(second - len(known))
    good = [text for number, text in enumerate(new) if number not in alike][: ask.count]
    last = max((row.line for row in rows), default=0)
    made = [
        Example(({"role": "user", "content": text},), None, last + number, {"synthetic": True})
        for number, text in enumerate(good, start=1)
    ]
    return made, VariationCounts(ask.count, len(made), len(alike), sum(found is None for found in lists))
