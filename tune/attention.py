"""Attention on a CPU without the work that a mask throws away: packed rows each by itself, one new token a row.

A masked square over a pack costs tokens x tokens; the rows alone cost the sum of their own squares, and without a mask
torch takes its causal kernel. Packs may then be as long as matrix products like them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import numpy as np
import torch

# Where a model keeps whether rows may be read apart on it: what `tune.packing` found.
APART = "_unshot_rows_apart"
# Where the rows of the pack in work begin, and its end.
_bounds: ContextVar[list[int]] = ContextVar("bounds")
# Which keys each row of a batch sees, bool, (rows, keys).
_seen: ContextVar[torch.Tensor] = ContextVar("seen")


@contextmanager
def rows_apart(net: Any, positions: np.ndarray) -> Iterator[None]:
    """Within, the causal model `net` attends within each row of a pack; a row begins where `positions` is 0.

    Changes nothing where that is not `separable`.
    """
    bounds = [*np.flatnonzero(positions == 0).tolist(), len(positions)]
    if len(bounds) == 2 or not separable(net, max(b - a for a, b in pairwise(bounds))):
        yield
        return
    with _instead(net, "unshot_rows", attend_rows, _bounds, bounds):
        yield


@contextmanager
def next_token(net: Any, seen: torch.Tensor) -> Iterator[None]:
    """Within, `net` reads one new token a row of a batch, which sees the keys that `seen`, (rows, keys), says."""
    with _instead(net, "unshot_next", attend_next, _seen, seen):
        yield


@contextmanager
def _instead(net: Any, name: str, function: Any, variable: ContextVar[Any], value: Any) -> Iterator[None]:
    from transformers import AttentionInterface

    # transformers makes no mask for a function whose masks it does not know.
    AttentionInterface.register(name, function)
    token, usual = variable.set(value), net.config._attn_implementation
    net.config._attn_implementation = name
    try:
        yield
    finally:
        net.config._attn_implementation = usual
        variable.reset(token)


def separable(net: Any, longest: int) -> bool:
    """Whether rows of up to `longest` tokens apart are what the mask between them says.

    Not so where a proof failed (`tune.packing`), with another attention than torch's, with rows longer than a sliding
    window or read in chunks, and not with layers that are computed again in backward, where nothing tells the rows
    apart.
    """
    config = net.config
    return (
        getattr(net, APART, True)
        and config._attn_implementation == "sdpa"
        and longest <= (getattr(config, "sliding_window", None) or longest)
        and not getattr(config, "attention_chunk_size", None)
        and not net.is_gradient_checkpointing
    )


def attend_rows(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: (1, heads, n, d) to (1, n, heads, d), row by row."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    one = ALL_ATTENTION_FUNCTIONS["sdpa"]
    rows = [
        one(module, query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], None, **kwargs)[0]
        for a, b in pairwise(_bounds.get())
    ]
    return torch.cat(rows, dim=1), None


def attend_next(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The same for one token a row: query heads that share keys go as so many queries, and no key is copied."""
    count, heads, _, size = query.shape
    grouped = query.reshape(count, key.shape[1], -1, size)
    found = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=_seen.get()[:, None, None], scale=scaling
    )
    return found.reshape(count, 1, heads, -1), None
