"""Whether packed rows are blind to each other on this very model: shown at the start of a run, never assumed.

Attention keeps rows apart by a mask made from their positions, or row by row on a CPU (`tune.attention`). Architectures
with a state beside attention (convolutions, state spaces, linear attention), with sinks, or with windows of their own
may carry something from one row into the next. So short rows are read in packs and alone, and what a row says must be
the same in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from tune.attention import APART, rows_apart

# Rows of the two packs, in tokens.
PACKS = ((5, 9), (7, 3, 17))
# Largest difference of logits, in units of their spread: what sums in another order differ by.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
# Where a model keeps whether rows may share a pack at all.
PACKED = "_unshot_packed"


def allowed(net: Any, what: str) -> bool:
    """Whether `net`, a causal model inside its wrapper, may read rows `APART` or `PACKED`: until shown otherwise."""
    return bool(getattr(net, what, True))


def prove(net: Any, device: str, *, bf16: bool = False) -> str | None:
    """Try packs on a causal model and remember what holds; None if rows may be packed, else what went wrong.

    Rows apart on a CPU are tried first, then the mask. The model is left in evaluation mode.
    """
    if hasattr(net, PACKED):
        return None if allowed(net, PACKED) else "packed rows are not blind to each other"
    worst = _worst(net, device, bf16)
    if worst is not None and allowed(net, APART):
        setattr(net, APART, False)
        worst = _worst(net, device, bf16)
    setattr(net, PACKED, worst is None)
    return worst


def _worst(net: Any, device: str, bf16: bool) -> str | None:
    """What went wrong with the packs; None if nothing did."""
    limit = TOLERANCE.get(torch.bfloat16 if bf16 else next(net.parameters()).dtype, 2e-3)
    draw = np.random.default_rng(0)
    size = min(int(net.config.get_text_config().vocab_size), 50_000)
    net.eval()
    for lengths in PACKS:
        rows = [draw.integers(0, size, length) for length in lengths]
        positions = np.concatenate([np.arange(length) for length in lengths])
        try:
            apart = rows_apart(net, positions) if device == "cpu" else _nothing()
            with apart:
                together = _logits(net, np.concatenate(rows), positions, device, bf16)
        except Exception as error:  # a family's own limits, raised in its own words
            return f"a pack fails ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        alone = torch.cat([_logits(net, row, np.arange(len(row)), device, bf16) for row in rows])
        difference = float((together - alone).abs().max() / alone.std().clamp(min=1e-6))
        if not difference <= limit:
            return f"a row's logits differ by {difference:.3g} of their spread beside other rows"
    return None


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _logits(net: Any, ids: np.ndarray, positions: np.ndarray, device: str, bf16: bool) -> torch.Tensor:
    """Next-token logits of one sequence, float32, shape (tokens, vocabulary)."""
    with torch.no_grad(), torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16):
        out = net(
            input_ids=torch.from_numpy(ids)[None].to(device),
            position_ids=torch.from_numpy(positions)[None].to(device),
            use_cache=False,
        )
    found: torch.Tensor = out.logits[0].float()
    return found
