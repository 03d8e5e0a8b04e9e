"""What goes into training beside the task's own rows as they are: other forms of them, general rows (`--mix`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tune import near
from tune.split import order
from tune.wrapping import augment
from unshot.case import TuneSettings
from unshot.contracts.manifest import describe_file
from unshot.data.example import fold
from unshot.data.rows import Example, read_examples
from unshot.errors import InputError

# Share of the training rows that are rehearsal where forgetting is measured and no general rows are given.
REHEARSAL = 0.05
SHIPPED = Path(__file__).parent / "assess" / "general.jsonl"


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
    distinct = list({fold(row.identity): row for row in reversed(found)}.values())
    alike = known(held_out, [row.dialogue for row in distinct])
    usable = [row for number, row in enumerate(distinct) if number not in alike]
    if not usable:
        raise InputError(f"{path}: every row is a near-duplicate of the set that forgetting is measured on")
    wanted = math.ceil(task_rows * share / (1 - share))
    usable.sort(key=lambda row: order(seed, fold(row.identity)))
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


def rehearsal_share(settings: TuneSettings) -> float:
    """The share of rehearsal rows: as given, else `REHEARSAL` where forgetting is measured and there is no `mix`."""
    if settings.rehearsal is not None:
        return settings.rehearsal
    return REHEARSAL if settings.forgetting and settings.mix is None else 0.0


def known(texts: Sequence[str], others: Sequence[str]) -> set[int]:
    """Indices of `others` that are near-duplicates of one of `texts`."""
    if not texts or not others:
        return set()
    pairs = near.similar_pairs([*texts, *others])
    return {b - len(texts) for a, b, _ in pairs if a < len(texts) <= b}


def read_general(path: Path | None) -> list[Example]:
    """The shipped general set, or rows of a file (`prompt`, `completion`, and where wanted `answers`, a list)."""
    return read_examples(path or SHIPPED)


@dataclass(frozen=True)
class Extras:
    """Training rows in their final form, the general ones apart, and what the manifest records under `rows`."""

    train: list[Example]
    general: list[Example] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)


def add_extras(train: Sequence[Example], settings: TuneSettings) -> Extras:
    """Apply `augment_format` and `mix` to the training rows; validation and test rows are never touched.

    General rows are asked without the task's instruction. Raises `InputError` for a bad mix file.
    """
    rows, general, record = list(train), [], {}
    if settings.augment_format:
        rows, used = augment(rows, settings.seed)
        record["augment_format"] = used
    if settings.mix is not None:
        held_out = [row.text for row in read_general(settings.general)]
        mix = draw(settings.mix, settings.mix_share, len(rows), settings.seed, held_out=held_out)
        general, record["mix"] = mix.rows, mix.record
    return Extras(rows, general, record)
