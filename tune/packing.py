"""Whether packed rows are blind to each other on this very model: shown at the start of a run, never assumed.

Attention keeps rows apart by a mask made from their positions, or row by row on a CPU (`tune.attention`). Architectures
with a state beside attention (convolutions, state spaces, linear attention), with sinks, or with windows of their own
may carry something from one row into the next. So a row is read behind other rows twice, with other neighbours, which
must change no more than other rows after it do (none can be seen from there: what differs is rounding, as of an
expert's products with other rows), and alone, which must say the same.
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
# same ones (seen: 0 in 26 families, in fp32 as in bf16), or so many times what rows after it change; and against the
# row alone, where they are taken in another order.
NEIGHBOURS, ROUNDING = 2e-5, 4
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

    def read(rows: list[np.ndarray], which: int = 0) -> torch.Tensor:
        """Logits of one row of a pack, the first or the last."""
        positions = np.concatenate([np.arange(len(row)) for row in rows])
        with rows_apart(net, positions) if device == "cpu" else _nothing():
            found = logits_of(net, np.concatenate(rows), positions, device, bf16)
        return found[: len(rows[0])] if which == 0 else found[-len(rows[-1]) :]

    for lengths in PACKS:
        *some, row = (draw.integers(0, size, length) for length in lengths)
        others = [draw.integers(0, size, length) for length in lengths[:-1]]
        try:
            alone = read([row])
            behind, behind_others = (read([*rows, row], -1) for rows in (some, others))
            before, before_others = (read([row, *rows]) for rows in (some, others))
        except Exception as error:  # a family's own limits, raised in its own words
            return f"a pack fails ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        spread = alone.std().clamp(min=1e-6)

        def apart(one: torch.Tensor, other: torch.Tensor, spread: torch.Tensor = spread) -> float:
            return float((one - other).abs().max() / spread)

        rounding = ROUNDING * apart(before, before_others)
        for difference, limit, what in (
            (apart(behind, behind_others), max(NEIGHBOURS, rounding), "with its neighbours"),
            (apart(behind, alone), ALONE.get(dtype, ALONE[torch.float32]), "beside other rows"),
        ):
            if not difference <= limit:
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
