"""Rows to packed batches: several rows in one sequence, each blind to the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from unshot.text.chat import Encoded


@dataclass(frozen=True)
class Pack:
    """One packed sequence of total length n.

    `ids` and `positions` have shape `(n,)`; positions start at 0 with every row, from which transformers builds
    the block-diagonal attention mask. `predict` holds the positions whose next token carries loss, `targets`
    those next tokens; both have shape (answer tokens,).
    """

    ids: np.ndarray
    positions: np.ndarray
    predict: np.ndarray
    targets: np.ndarray


def pack(rows: Sequence[Encoded]) -> Pack:
    """Concatenate rows into one sequence."""
    ids: list[int] = []
    positions: list[int] = []
    predict: list[int] = []
    targets: list[int] = []
    offset = 0
    for row in rows:
        ids.extend(row.ids)
        positions.extend(range(len(row.ids)))
        predict.extend(range(offset + row.prompt_length - 1, offset + len(row.ids) - 1))
        targets.extend(row.ids[row.prompt_length :])
        offset += len(row.ids)
    return Pack(*(np.asarray(values, dtype=np.int64) for values in (ids, positions, predict, targets)))


def fill(rows: Sequence[Encoded], capacity: int) -> list[list[Encoded]]:
    """First-fit-decreasing bins of at most `capacity` tokens (a longer row has a bin of its own)."""
    bins: list[tuple[int, list[Encoded]]] = []
    for row in sorted(rows, key=lambda r: -len(r.ids)):
        for index, (used, members) in enumerate(bins):
            if used + len(row.ids) <= capacity:
                members.append(row)
                bins[index] = (used + len(row.ids), members)
                break
        else:
            bins.append((len(row.ids), [row]))
    return [members for _, members in bins]


def epoch_order(rows: int, *, seed: int, epoch: int) -> np.ndarray:
    """The shuffled row indices of an epoch; depends on seed and epoch only, so that a resumed run sees the same."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def batches(
    rows: Sequence[Encoded], *, batch_rows: int, capacity: int, seed: int, epoch: int
) -> Iterator[list[Pack]]:
    """One item per optimiser step: the packed sequences whose gradients are accumulated."""
    order = epoch_order(len(rows), seed=seed, epoch=epoch)
    for start in range(0, len(order), batch_rows):
        chosen = [rows[i] for i in order[start : start + batch_rows]]
        yield [pack(members) for members in fill(chosen, capacity)]
