"""General examples among the training rows, against forgetting (`--mix`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune import near
from tune.split import order
from unshot.contracts.manifest import describe_file
from unshot.data.rows import Example, read_examples
from unshot.errors import InputError

SHARE = 0.1


@dataclass(frozen=True)
class Mix:
    """General rows to train on beside the task's own, and where they came from."""

    rows: list[Example]
    record: dict[str, Any]


def draw(
    path: Path,
    share: float,
    task_rows: int,
    seed: int,
    *,
    held_out: Sequence[str] = (),
) -> Mix:
    """Rows of `path` that make up `share` of the training rows, drawn by seed.

    None of them is a near-duplicate of a `held_out` text (the set that forgetting is measured on). Raises
    `InputError` for a bad file or share, and where nothing is left. A file with too few rows gives what it has.
    """
    if not 0 < share < 1:
        raise InputError(f"--mix-share is {share:g}; give a share of the training rows between 0 and 1")
    found = read_examples(path)
    distinct = list({near.fold(row.identity): row for row in reversed(found)}.values())
    alike = known(held_out, [row.dialogue for row in distinct])
    usable = [row for number, row in enumerate(distinct) if number not in alike]
    if not usable:
        raise InputError(f"{path}: every row is a near-duplicate of the set that forgetting is measured on")
    wanted = math.ceil(task_rows * share / (1 - share))
    usable.sort(key=lambda row: order(seed, near.fold(row.identity)))
    chosen = usable[:wanted]
    record = {
        "file": describe_file(path),
        "asked_share": share,
        "share": len(chosen) / (len(chosen) + task_rows),
        "rows": len(chosen),
        "left_out": len(alike),
        "lines": sorted(row.line for row in chosen),
    }
    return Mix(chosen, record)


def known(texts: Sequence[str], others: Sequence[str]) -> set[int]:
    """Indices of `others` that are near-duplicates of one of `texts`."""
    if not texts or not others:
        return set()
    pairs = near.similar_pairs([*texts, *others])
    return {b - len(texts) for a, b, _ in pairs if a < len(texts) <= b}
