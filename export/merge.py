"""The tuned model's tensors, merged while they are read: fp32, Hugging Face layout, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export.adapter import Adapter, Delta
from export.tensors import Shards
from unshot.errors import InputError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Rows are merged in pieces of about this many fp32 bytes: small enough to stay in a core's cache, which is 3 times
# faster than 64 MiB pieces (measured on q8_0).
CHUNK_BYTES = 4 * 1024 * 1024


class Merged:
    """A base model with its adapter merged in, tensor by tensor.

    Tied embeddings stay one tensor unless the adapter changes only one of the two, as it does while it is
    unmerged; then `lm_head.weight` becomes a tensor of its own (`untied` is true).
    """

    def __init__(self, paths: list[Path], config: dict[str, Any], adapter: Adapter | None = None) -> None:
        self.base = Shards(paths)
        self.adapter = adapter or Adapter()
        self.config = config
        self.tied = bool(config.get("tie_word_embeddings", HEAD not in self.base)) or HEAD not in self.base
        self.untied = self.tied and bool({EMBEDDING, HEAD} & self.adapter.changed)
        self._check()

    def _check(self) -> None:
        for name in self.adapter.changed:
            if name not in self:
                raise InputError(
                    f"the adapter changes `{name}`, which the base does not have; it was trained on another base"
                )
            shape = self.shape(name)
            whole, delta = self.adapter.replaced.get(name), self.adapter.deltas.get(name)
            shapes = [tuple(whole.shape)] if whole is not None else []
            shapes += [delta_shape(delta)] if delta is not None else []
            for found in shapes:
                if found == shape:
                    continue
                raise InputError(
                    f"the adapter's `{name}` has shape {list(found)}, the base's {list(shape)}; it was trained on "
                    "another base"
                )

    def names(self) -> Iterator[str]:
        """Tensor names; a tied head appears only where the merge untied it."""
        for name in self.base:
            if name != HEAD or not self.tied:
                yield name
        if self.untied:
            yield HEAD

    def __contains__(self, name: str) -> bool:
        return name in self.base or (name == HEAD and self.tied)

    def _source(self, name: str) -> str:
        return EMBEDDING if name == HEAD and self.tied else name

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.base.shape(self._source(name))

    def dtype(self, name: str) -> str:
        """The base's dtype, as safetensors names it."""
        return self.base[self._source(name)].dtype

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        """Rows `start:stop` of the merged tensor, fp32."""
        # peft saves an adapted embedding's own weights beside its LoRA pair: both apply.
        if name in self.adapter.replaced:
            values = self.adapter.replaced[name][start:stop]
        else:
            values = self.base[self._source(name)].read(start, stop).float()
        delta = self.adapter.deltas.get(name)
        if delta is not None:
            values = apply(values, delta, start, stop)
        return values

    def ranges(self, name: str, multiple: int = 1) -> Iterator[tuple[int, int | None]]:
        """Row ranges that cover a tensor in pieces of `CHUNK_BYTES`, each but the last a multiple of `multiple`."""
        shape = self.shape(name)
        if len(shape) < 2:
            yield 0, None
            return
        width = 4 * math.prod(shape[1:])
        step = max(multiple, CHUNK_BYTES // width // multiple * multiple)
        for start in range(0, shape[0], step):
            yield start, min(start + step, shape[0])


def delta_shape(delta: Delta) -> tuple[int, ...]:
    """Shape of the base tensor a delta belongs to."""
    rows, columns = delta.b.shape[0], delta.a.shape[1]
    return (columns, rows) if delta.transposed or delta.embedding else (rows, columns)


def apply(values: Any, delta: Delta, start: int = 0, stop: int | None = None) -> Any:
    """Rows `start:stop` of `W + scale * B A` (peft `get_delta_weight`), then DoRA's rescaling of each output row.

    DoRA (Liu et al. 2024, arXiv 2402.09353): `m * (W + scale * B A) / ||W + scale * B A||`, norm over inputs.
    """
    if delta.embedding or delta.transposed:
        change = (delta.b @ delta.a[:, start:stop]).T
    else:
        change = delta.b[start:stop] @ delta.a
    merged = values + change * delta.scale
    if delta.magnitude is not None:
        if delta.transposed or delta.embedding:
            raise InputError("DoRA on a transposed (fan_in_fan_out) or embedding layer cannot be merged here")
        import torch

        factor = delta.magnitude.flatten()[start:stop] / torch.linalg.norm(merged, dim=1)
        merged = factor[:, None] * merged
    return merged
