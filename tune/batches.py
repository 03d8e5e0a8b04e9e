"""Rows to packed batches: several rows in one sequence, each blind to the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from unshot.text.chat import Encoded


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's next-token distributions: its most likely tokens and their log-probabilities, both (tokens, kept).

    What is left of each distribution is one bucket for all other tokens. A log-probability of -inf marks an unused
    place.
    """

    ids: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True)
class Taught(Encoded):
    """A row whose answer tokens carry a teacher's distributions, one for each.

    `reverse`: the answer is the student's own, and the divergence is taken from the student to the teacher.
    """

    soft: SoftTargets
    reverse: bool = False


@dataclass(frozen=True)
class Pack:
    """One packed sequence of total length n.

    `ids` and `positions` have shape `(n,)`; positions start at 0 with every row, from which transformers builds
    the block-diagonal attention mask. `predict` holds the positions whose next token carries loss, `targets`
    those next tokens; both have shape (answer tokens,). `soft` is there where a row was taught by a model.
    """

    ids: np.ndarray
    positions: np.ndarray
    predict: np.ndarray
    targets: np.ndarray
    soft: SoftTargets | None = None
    # Of each answer token, whether its row is the student's own; None where none is.
    reverse: np.ndarray | None = None


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
        for start, stop in row.spans:
            predict.extend(range(offset + start - 1, offset + stop - 1))
            targets.extend(row.ids[start:stop])
        offset += len(row.ids)
    a, b, c, d = (np.asarray(values, dtype=np.int64) for values in (ids, positions, predict, targets))
    return Pack(a, b, c, d, _soft(rows), _reverse(rows))


def _reverse(rows: Sequence[Encoded]) -> np.ndarray | None:
    own = [isinstance(row, Taught) and row.reverse for row in rows]
    if not any(own):
        return None
    return np.repeat(own, [sum(stop - start for start, stop in row.spans) for row in rows])


def _soft(rows: Sequence[Encoded]) -> SoftTargets | None:
    """All rows' distributions below each other; a row without a teacher is certain of its own tokens."""
    widths = [row.soft.ids.shape[1] for row in rows if isinstance(row, Taught)]
    if not widths:
        return None
    total = sum(stop - start for row in rows for start, stop in row.spans)
    ids = np.zeros((total, max(widths)), dtype=np.int32)
    logprobs = np.full(ids.shape, -np.inf, dtype=np.float32)
    start = 0
    for row in rows:
        if isinstance(row, Taught):
            stop, width = start + row.answer_length, row.soft.ids.shape[1]
            ids[start:stop, :width], logprobs[start:stop, :width] = row.soft.ids, row.soft.logprobs
        else:
            own = [token for first, last in row.spans for token in row.ids[first:last]]
            stop = start + len(own)
            ids[start:stop, 0], logprobs[start:stop, 0] = own, 0.0
        start = stop
    return SoftTargets(ids, logprobs)


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
