"""safetensors read row by row: one shard's header at a time, and only the rows asked for in memory.

The file is mapped anew for each read and unmapped after it, so that the pages of a 5 GB shard do not add up in
the process's resident set.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unshot.errors import InputError

# safetensors dtype -> (numpy dtype of the raw bytes, torch dtype name)
DTYPES = {
    "F64": ("<f8", "float64"),
    "F32": ("<f4", "float32"),
    "F16": ("<f2", "float16"),
    "BF16": ("<u2", "bfloat16"),
}
HEADER_LIMIT = 100 * 1024 * 1024


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: file, byte offset, dtype, shape."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def read(self, start: int = 0, stop: int | None = None) -> Any:
        """Rows `start:stop` as a torch tensor of the stored dtype (a copy, not a view of the file)."""
        import torch

        raw, name = DTYPES[self.dtype]
        rows = self.shape[0] if self.shape else 1
        stop = rows if stop is None else min(stop, rows)
        width = int(np.prod(self.shape[1:], dtype=np.int64)) if self.shape else 1
        count = (stop - start) * width
        if count <= 0:
            return torch.empty((0, *self.shape[1:]), dtype=getattr(torch, name))
        size = np.dtype(raw).itemsize
        mapped = np.memmap(
            self.path, dtype=raw, mode="r", offset=self.offset + start * width * size, shape=(count,)
        )
        values = torch.from_numpy(np.array(mapped))
        if name == "bfloat16":
            values = values.view(torch.bfloat16)
        return values.view(stop - start, *self.shape[1:]) if self.shape else values.view(())


def read_header(path: Path, skip: Collection[str] = ()) -> dict[str, Entry]:
    """The tensors of one file; `InputError` for a damaged or truncated one, or a dtype that is not a float."""
    size = path.stat().st_size
    try:
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(HEADER_LIMIT, size - 8):
                raise ValueError("header longer than the file")
            header = json.loads(handle.read(length))
        entries = {}
        for name, facts in header.items():
            if name == "__metadata__" or name in skip:
                continue
            begin, end = facts["data_offsets"]
            dtype, shape = facts["dtype"], tuple(facts["shape"])
            if 8 + length + end > size:
                raise ValueError(f"truncated: `{name}` ends after the file does")
            if dtype not in DTYPES:
                raise InputError(
                    f"{path}: tensor `{name}` is {dtype}; export reads F32, F16, BF16 and F64 weights, "
                    "so give the model before quantisation"
                )
            if np.prod(shape, dtype=np.int64) * np.dtype(DTYPES[dtype][0]).itemsize != end - begin:
                raise ValueError(f"`{name}` has the wrong size")
            entries[name] = Entry(path, 8 + length + begin, dtype, shape)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged safetensors file ({error}); copy or download it again") from None
    return entries


class Shards:
    """The tensors of a model's safetensors files, by name."""

    def __init__(self, paths: Sequence[Path], skip: Collection[str] = ()) -> None:
        """`skip`: names that are read otherwise, whatever their dtype."""
        self.entries: dict[str, Entry] = {}
        for path in paths:
            self.entries.update(read_header(path, skip))

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    def find(self, name: str) -> str | None:
        """The tensor of this name, else the only one with the same tail: transformers names the modules of some
        models otherwise than their files (`model.language_model.layers.0` for `language_model.model.layers.0`).
        """
        if name in self.entries:
            return name
        wanted, words = tail(name), name.split(".")[::-1]
        same = [n for n in self.entries if tail(n) == wanted and "vision" not in n]

        def shared(other: str) -> int:
            pairs = zip(words, other.split(".")[::-1], strict=False)
            return next((n for n, (a, b) in enumerate(pairs) if a != b), len(words))

        most = max(map(shared, same), default=0)
        found = [n for n in same if shared(n) == most]
        return found[0] if len(found) == 1 else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.entries[name].shape


def tail(name: str) -> str:
    """The part of a tensor's name that is the same whatever holds the model: from its layers on, else two words."""
    numbered = re.search(r"(?:^|\.)((?:layers|h|blocks)\.\d+\..+)$", name)
    return numbered[1] if numbered else ".".join(name.split(".")[-2:])
