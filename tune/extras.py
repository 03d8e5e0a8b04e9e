"""What goes into training beside the task's own rows as they are: other forms of them, general rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tune.assess.forgetting import read_general
from tune.mix import draw
from tune.wrapping import augment
from unshot.case import TuneSettings
from unshot.data.rows import Example


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
