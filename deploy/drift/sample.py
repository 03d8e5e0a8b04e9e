"""The two things that are compared: what the model was made for, and what came in."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unshot.contracts.manifest import read_manifest
from unshot.contracts.request_log import Request
from unshot.data import personal as pii
from unshot.data.example import fold
from unshot.data.rows import read_examples
from unshot.engines.embedder import Vectors
from unshot.errors import InputError

WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Inputs:
    """Input texts: words of each (shape `(rows,)`, NaN where unknown), the texts and their vectors where logged."""

    lengths: np.ndarray
    texts: list[str] | None
    vectors: Any

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows: np.ndarray) -> Inputs:
        """Some of them."""
        return Inputs(
            self.lengths[rows],
            None if self.texts is None else [self.texts[i] for i in rows],
            None if self.vectors is None else self.vectors[rows],
        )

    def distinct(self) -> Inputs:
        """Without repetitions of a text (after case and whitespace): one caller's loop is no new language."""
        if self.texts is None:
            return self
        first: dict[str, int] = {}
        for row, text in enumerate(self.texts):
            first.setdefault(fold(text), row)
        return self.take(np.array(sorted(first.values()), dtype=int))


def from_texts(texts: Sequence[str], embed: Vectors) -> Inputs:
    """Inputs whose texts are at hand."""
    lengths = np.array([len(text.split()) for text in texts], dtype=float)
    return Inputs(lengths, list(texts), embed(texts))


class Some:
    """Vectors of some rows of a long log; asked for by the log's row numbers."""

    def __init__(self, texts: Sequence[str], embed: Vectors, rows: np.ndarray) -> None:
        self._at = np.full(len(texts), -1)
        self._at[rows] = np.arange(len(rows))
        self._matrix = embed([texts[i] for i in rows]) if len(rows) else None

    def __getitem__(self, rows: np.ndarray) -> Any:
        return self._matrix[self._at[rows]] if self._matrix is not None else None


def from_requests(lines: Sequence[Request], embed: Vectors, rows: np.ndarray) -> Inputs:
    """Inputs of logged requests, with vectors of the given rows; no texts unless every line has its text."""
    texts = [line.input for line in lines if line.input is not None]
    if lines and len(texts) == len(lines):
        lengths = [float(len(text.split())) for text in texts]
        return Inputs(np.array(lengths), texts, Some(texts, embed, rows))
    lengths = [float("nan") if line.input_words is None else float(line.input_words) for line in lines]
    return Inputs(np.array(lengths), None, None)


def training_texts(path: Path, *, most: int, seed: int = 0) -> list[str]:
    """Texts of a run's training rows, or of a data file: at most `most`, drawn by seed, personal data redacted.

    The log's texts are redacted, so that unredacted ones would look like another language. Raises `InputError`.
    """
    if path.is_dir():
        read_manifest(path, stage="tune", verify=False)
        path = path / "splits" / "train.jsonl"
    rows = read_examples(path, answers=False)
    texts = [row.text for row in rows]
    if len(texts) < 20:
        raise InputError(f"{path}: {len(texts)} rows; a reference needs at least 20")
    if len(texts) > most:
        chosen = np.random.default_rng(seed).choice(len(texts), size=most, replace=False)
        texts = [texts[i] for i in sorted(chosen)]
    return [pii.redacted(text) for text in texts]


@functools.lru_cache(maxsize=20_000)
def words(text: str) -> frozenset[str]:
    """The distinct words of a text, lower case, digits folded to one sign."""
    return frozenset(WORD.findall(re.sub(r"\d", "0", text.casefold())))
