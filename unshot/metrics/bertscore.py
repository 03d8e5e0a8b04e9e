"""BERTScore (Zhang et al., ICLR 2020) with a local embedder: greedy matching of contextual token vectors.

As the `bert-score` package computes it without idf weights and without rescaling: [CLS] and [SEP] may be matched but
carry no weight, and an empty text scores 0. The values depend on embedder and layer; compare only like with like.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from unshot.engines.embedder import Embedder

KINDS = ("precision", "recall", "f1")


def bertscore(
    embedder: Embedder, truth: Sequence[str], answers: Sequence[str], layer: int | None = None
) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of each answer against its reference, arrays of shape `(answers,)`.

    `layer` is the encoder layer whose states are compared; default: the last.
    """
    distinct = list(dict.fromkeys(t.strip() for t in (*truth, *answers)))
    index = {text: i for i, text in enumerate(distinct)}
    tokens = embedder.tokens(distinct, layer)
    units = [t.states / np.linalg.norm(t.states, axis=1, keepdims=True) for t in tokens]
    table = np.zeros((len(KINDS), len(truth)))
    for row, (reference, answer) in enumerate(zip(truth, answers, strict=True)):
        ours, theirs = units[index[answer.strip()]], units[index[reference.strip()]]
        if len(ours) <= 2 or len(theirs) <= 2:  # special tokens alone
            continue
        similarity = ours @ theirs.T
        precision = float(similarity[1:-1].max(axis=1).mean())
        recall = float(similarity[:, 1:-1].max(axis=0).mean())
        total = precision + recall
        table[:, row] = precision, recall, 2 * precision * recall / total if total else 0.0
    return dict(zip(KINDS, table, strict=True))
