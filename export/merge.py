"""The tuned model's tensors, merged while they are read: fp32, Hugging Face layout, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from export.adapter import Adapter, Delta
from export.families import Config
from export.tensors import Shards
from unshot.errors import InputError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# How other families name the same two.
EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "embed_in.weight", "wte.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
# Families whose configuration class ties the head where config.json does not say.
TIED_BY_DEFAULT = ("gemma", "cohere", "falcon", "gpt2", "bloom", "mpt")
# Rows are merged in pieces of about this many fp32 bytes: small enough to stay in a core's cache, which is three times
# faster than 64 MiB pieces (measured on q8_0).
CHUNK_BYTES = 4 * 1024 * 1024


class Merged:
    """A base model with its adapter merged in, tensor by tensor.

    Tied embeddings stay one tensor unless the adapter changes only one of the two, as it does while it is
    unmerged; then the head becomes a tensor of its own (`untied` is true). `config` is the effective
    configuration, with the number of tokens that the adapter was trained with.
    """

    def __init__(self, paths: Sequence[Path], config: Config, adapter: Adapter | None = None) -> None:
        self.paths = list(paths)
        self.base = Shards(paths)
        self.adapter = self._named_as_the_base(adapter or Adapter())
        self.embedding = _named(self.base, EMBEDDINGS, EMBEDDING)
        self.head = _named(self.base, HEADS, HEAD)
        said = config.get("tie_word_embeddings")
        if said is None:
            said = str(config.get("model_type", "")).startswith(TIED_BY_DEFAULT) or self.head not in self.base
        self.tied = bool(said) or self.head not in self.base
        self.in_place = self._in_place() if self.tied else set()
        # Rows of a tied embedding that were trained alone change the head with it (peft wraps both).
        apart = {*self.adapter.deltas, *(self.adapter.replaced.keys() - self.in_place), *self.adapter.added}
        self.untied = self.tied and bool(
            {self.embedding, self.head} & apart or self.head in self.adapter.rows
        )
        self.config = dict(config)
        self._check()
        self._check_vocabulary()

    def _named_as_the_base(self, adapter: Adapter) -> Adapter:
        """The adapter with the names of the base's files where its modules are called otherwise."""
        names = {name: self.base.find(name) or name for name in adapter.changed if name not in self.base}
        if all(old == new for old, new in names.items()):
            return adapter

        def renamed(values: dict[str, Any]) -> dict[str, Any]:
            return {names.get(name, name): value for name, value in values.items()}

        return replace(
            adapter, deltas=renamed(adapter.deltas), replaced=renamed(adapter.replaced), rows=renamed(adapter.rows),
            added=renamed(adapter.added),
        )  # fmt: skip

    def _in_place(self) -> set[str]:
        """A tied embedding that the adapter holds as a whole tensor and that peft loads in place, head and all.

        Unlike `modules_to_save`, which trains a copy of one of the two. A head that was saved beside it is dropped.
        """
        replaced = dict(self.adapter.replaced)
        copies = tuple(f".{module}.weight" for module in self.adapter.config.get("modules_to_save") or [])
        loaded = {
            n
            for n in (self.embedding, self.head)
            if n in replaced and not f".{n}".endswith(copies or ("\0",))
        }
        if self.head in loaded:
            value = replaced.pop(self.head)
            replaced.setdefault(self.embedding, value)
            self.adapter = replace(self.adapter, replaced=replaced)
        return {self.embedding} if loaded else set()

    def _check(self) -> None:
        for name in self.adapter.changed:
            if name not in self:
                raise InputError(self._missing(name))
            shape = self.base.shape(self._source(name))
            whole, delta = self.adapter.replaced.get(name), self.adapter.deltas.get(name)
            shapes = [tuple(whole.shape)] if whole is not None else []
            shapes += [delta_shape(delta)] if delta is not None else []
            for found in shapes:
                if found == shape or (self._counts_tokens(name) and found[1:] == shape[1:]):
                    continue
                raise InputError(
                    f"the adapter's `{name}` has shape {list(found)}, the base's {list(shape)}; it was trained on "
                    "another base"
                )

    def _missing(self, name: str) -> str:
        if name in self.adapter.added:
            return (
                f"the adapter was trained with lora_bias, and `{name}` has no place in the base, whose layer has no "
                "bias; tune without lora_bias, or take a base with biases"
            )
        return f"the adapter changes `{name}`, which the base does not have; it was trained on another base"

    def _check_vocabulary(self) -> None:
        """One number of tokens for embedding, head and configuration: the adapter's where it resized them."""
        if self.embedding not in self.base or "vocab_size" not in self.config:
            return
        rows = self.shape(self.embedding)[0]
        if self.resized:
            if self.shape(self.head)[0] != rows:
                raise InputError(
                    f"the adapter has {rows} rows in its embedding and {self.shape(self.head)[0]} in its head; it was "
                    "trained on another base, or saved without one of the two (`save_embedding_layers=True`)"
                )
            self.config["vocab_size"] = rows
        elif rows != self.config["vocab_size"]:
            raise InputError(
                f"config.json says vocab_size {self.config['vocab_size']}, and the embedding has {rows} rows; put "
                f"{rows} there if the tokenizer goes with the weights, else give the right weights"
            )

    @property
    def resized(self) -> int | None:
        """Tokens of the adapter's own embedding where that is not the base's number; None where it is."""
        if self.embedding not in self.base:
            return None
        rows = self.shape(self.embedding)[0]
        return rows if rows != self.base.shape(self.embedding)[0] else None

    def _counts_tokens(self, name: str) -> bool:
        return name in (self.embedding, self.head)

    def names(self) -> Iterator[str]:
        """Tensor names; a tied head appears only where the merge untied it."""
        for name in self.base:
            if name != self.head or not self.tied:
                yield name
        if self.untied:
            yield self.head

    def __contains__(self, name: str) -> bool:
        return name in self.base or (name == self.head and self.tied)

    def _source(self, name: str) -> str:
        return self.embedding if name == self.head and self.tied else name

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        source = self.base.shape(self._source(name))
        if not self._counts_tokens(name):
            return source
        # A tied head grows with its embedding, and an adapter may hold either.
        own = [name, self._source(name)] if self.tied and not self.untied else [name]
        for one in own:
            whole, delta = self.adapter.replaced.get(one), self.adapter.deltas.get(one)
            if whole is not None:
                return tuple(whole.shape)
            if delta is not None:
                return delta_shape(delta)
        return source

    def dtype(self, name: str) -> str:
        """The base's dtype, as safetensors names it."""
        return self.base[self._source(name)].dtype

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        """Rows `start:stop` of the merged tensor, fp32."""
        # peft saves an adapted embedding's own weights beside its LoRA pair: both apply.
        if name in self.adapter.replaced:
            values = self.adapter.replaced[name][start:stop]
        elif self._source(name) in self.in_place:
            values = self.adapter.replaced[self.embedding][start:stop]
        else:
            values = self.base[self._source(name)].read(start, stop).float()
        delta = self.adapter.deltas.get(name)
        if delta is not None:
            values = apply(values, delta, start, stop)
        if name in self.adapter.rows:
            values = put_rows(values, *self.adapter.rows[name], start)
        if name in self.adapter.added:
            values = values + self.adapter.added[name][start:stop]
        return values

    def ranges(self, name: str, multiple: int = 1) -> Iterator[tuple[int, int | None]]:
        """Row ranges that cover a tensor in pieces of `CHUNK_BYTES`, each but the last a multiple of
        `multiple`.
        """
        shape = self.shape(name)
        if len(shape) < 2:
            yield 0, None
            return
        width = 4 * math.prod(shape[1:])
        step = max(multiple, CHUNK_BYTES // width // multiple * multiple)
        for start in range(0, shape[0], step):
            yield start, min(start + step, shape[0])


def _named(base: Shards, tails: Sequence[str], default: str) -> str:
    """The one tensor with such a name, else the usual name."""
    if default in base:
        return default
    found = [name for name in base if name.endswith(tuple(tails)) and "vision" not in name]
    return found[0] if len(found) == 1 else default


def delta_shape(delta: Delta) -> tuple[int, ...]:
    """Shape of the base tensor a delta belongs to."""
    *experts, rows = delta.b.shape[:-1]
    columns = delta.a.shape[-1]
    if experts:
        return (*experts, columns, rows) if delta.transposed else (*experts, rows, columns)
    return (columns, rows) if delta.transposed or delta.embedding else (rows, columns)


def put_rows(values: Any, indices: Sequence[int], new: Any, start: int) -> Any:
    """`values` (rows from `start` on) with the rows of these indices replaced by `new`."""
    values = values.clone()
    for index, row in zip(indices, new, strict=True):
        if 0 <= index - start < len(values):
            values[index - start] = row
    return values


def apply(values: Any, delta: Delta, start: int = 0, stop: int | None = None) -> Any:
    """Rows `start:stop` of `W + scale * B A` (peft `get_delta_weight`), then DoRA's rescaling of each
    output row.

    DoRA (Liu et al. 2024, arXiv 2402.09353): `m * (W + scale * B A) / ||W + scale * B A||`, norm over inputs.
    """
    if delta.a.ndim == 3:  # a piece is some of the experts
        change = delta.b[start:stop] @ delta.a[start:stop]
        change = change.transpose(1, 2) if delta.transposed else change
    elif delta.embedding or delta.transposed:
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
