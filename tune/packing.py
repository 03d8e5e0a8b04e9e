"""Whether packed rows are blind to each other on this very model: shown at the start of a run, never assumed.

Attention keeps rows apart by a mask made from their positions, or row by row on a CPU (`tune.attention`). Architectures
with a state beside attention (convolutions, state spaces, linear attention), with sinks, or with windows of their own
may carry something from one row into the next. So a row is read behind other rows twice, with other neighbours, which
must change nothing, and alone, which must say the same.
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
# Largest difference of a row's logits, in units of their spread: between two sets of neighbours, where the sums are the
# same ones, and against the row alone, where they are taken in another order.
NEIGHBOURS = {torch.float32: 2e-5, torch.bfloat16: 0.02, torch.float16: 0.005}
ALONE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
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
    dtype = torch.bfloat16 if bf16 else next(net.parameters()).dtype
    draw = np.random.default_rng(0)
    size = min(int(net.config.get_text_config().vocab_size), 50_000)
    net.eval()

    def read(rows: list[np.ndarray]) -> torch.Tensor:
        """Logits of the last row of a pack."""
        positions = np.concatenate([np.arange(len(row)) for row in rows])
        with rows_apart(net, positions) if device == "cpu" else _nothing():
            return logits_of(net, np.concatenate(rows), positions, device, bf16)[-len(rows[-1]) :]

    for lengths in PACKS:
        rows = [draw.integers(0, size, length) for length in lengths]
        others = [draw.integers(0, size, length) for length in lengths[:-1]]
        try:
            first, second, alone = read(rows), read([*others, rows[-1]]), read(rows[-1:])
        except Exception as error:  # a family's own limits, raised in its own words
            return f"a pack fails ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        spread = alone.std().clamp(min=1e-6)
        for other, limits, what in (
            (second, NEIGHBOURS, "with its neighbours"),
            (alone, ALONE, "beside other rows"),
        ):
            difference = float((first - other).abs().max() / spread)
            if not difference <= limits.get(dtype, limits[torch.float32]):
                return f"a row's logits differ {what} by {difference:.2g} of their spread"
    return None


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def logits_of(net: Any, ids: np.ndarray, positions: np.ndarray, device: str, bf16: bool) -> torch.Tensor:
    """Next-token logits of one sequence, float32, shape (tokens, vocabulary)."""
    with torch.no_grad(), torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16):
        out = net(
            input_ids=torch.from_numpy(ids)[None].to(device),
            position_ids=torch.from_numpy(positions)[None].to(device),
            use_cache=False,
        )
    found: torch.Tensor = out.logits[0].float()
    return found
