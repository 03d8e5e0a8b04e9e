"""A list of texts on disk: a million of them cost eight bytes each in memory."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator, Sequence
from typing import overload


class Texts(Sequence[str]):
    """Append-only texts in a temporary file without a name (it goes with the process); read by index."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="unshot-")  # noqa: SIM115
        self._ends = array("Q", [0])
        self._written = True

    def append(self, text: str) -> None:
        """Add a text at the end."""
        raw = text.encode(errors="surrogatepass")
        if not self._written:
            self._file.seek(self._ends[-1])
        self._written = True
        self._file.write(raw)
        self._ends.append(self._ends[-1] + len(raw))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        self._written = False
        self._file.seek(self._ends[index])
        raw = self._file.read(self._ends[index + 1] - self._ends[index])
        return raw.decode(errors="surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for index in range(len(self)):
            yield self[index]
