"""What a review finds and corrects on banking77: `python -m tests.benchmarks.bench_review [--embedder NAME]`.

Planted: a tenth of the labels of 2,310 training questions (30 of each of 77 intents) is replaced by another intent.
Prints precision and recall of the review queue's first 100 rows, beside those of 100 random rows; and of how many of
300 simulated reviews (100 of 500 test rows judged, labels wrong in the same way) the corrected accuracy's interval
covers the true accuracy of a real classifier's (nearest class mean) answers.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.conftest import SHARED
from tune.data.select import Labelled, select
from unshot.engines.embedder import open_embedder
from unshot.metrics.intervals import corrected

SOURCE = SHARED / "banking77"


def read(name: str) -> list[tuple[str, str]]:
    """Question and intent of each row of a file."""
    with (SOURCE / f"{name}.csv").open(encoding="utf-8", newline="") as handle:
        return [(row["text"], row["category"]) for row in csv.DictReader(handle)]


def misread(labels: Sequence[str], wrong: float, seed: int) -> list[str]:
    """The labels, a share of them replaced by another one drawn at random."""
    chance, names = random.Random(seed), sorted(set(labels))
    chosen = set(chance.sample(range(len(labels)), round(wrong * len(labels))))
    return [
        chance.choice([n for n in names if n != label]) if i in chosen else label
        for i, label in enumerate(labels)
    ]


def planted(
    *, classes: int, per_class: int, wrong: float, seed: int = 0
) -> tuple[list[str], list[str], list[str]]:
    """Questions, true intents, and the teacher's."""
    found: dict[str, list[str]] = defaultdict(list)
    for text, label in read("train"):
        found[label].append(text)
    chance = random.Random(seed)
    names = chance.sample(sorted(found), classes)
    rows = [(t, n) for n in names for t in chance.sample(found[n], min(per_class, len(found[n])))]
    chance.shuffle(rows)
    truth = [n for _, n in rows]
    return [t for t, _ in rows], truth, misread(truth, wrong, seed)


def queue_of(texts: Sequence[str], said: Sequence[str], embedder: str, *, queue: int) -> list[int]:
    """The queue's rows, in its order."""
    nothing = [None] * len(texts)
    vectors: Any = open_embedder(embedder)(texts)
    chosen = select(Labelled(texts, said, nothing, nothing), vectors, queue=queue, sample=1, seed=0)
    return [pick.row for pick in chosen if pick.why != "random"]


def coverage(reviews: int, rows: int, judged: int, wrong: float, embedder: str) -> tuple[float, ...]:
    """Coverage by the corrected score and by the teacher's alone, the truth, and both intervals' mean widths."""
    train, test = read("train")[::4], read("test")
    embed = open_embedder(embedder)
    names = np.array([n for _, n in train])
    kinds, known = np.unique(names), embed([t for t, _ in train])
    centres = np.stack([np.asarray(known[names == kind].mean(axis=0)).ravel() for kind in kinds])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    answers = kinds[np.asarray(embed([t for t, _ in test]) @ centres.T).argmax(axis=1)]
    truth = np.array([n for _, n in test])
    right = answers == truth
    by_teacher = answers == np.array(misread(truth.tolist(), wrong, 1))
    chance, found = np.random.default_rng(0), []
    for _ in range(reviews):
        drawn = chance.integers(0, len(test), rows)
        seen = drawn[:judged]
        found.append(
            corrected(int(by_teacher[drawn].sum()), rows, by_teacher[seen].tolist(), right[seen].tolist())
        )
    inside = [c.corrected.low <= right.mean() <= c.corrected.high for c in found]
    alone = [c.by_teacher.low <= right.mean() <= c.by_teacher.high for c in found]
    widths = [
        np.mean([i.high - i.low for i in each])
        for each in ([c.corrected for c in found], [c.by_people for c in found])
    ]
    return float(np.mean(inside)), float(np.mean(alone)), float(right.mean()), *map(float, widths)


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embedder", default="all-minilm-l6-v2")
    parser.add_argument("--reviews", type=int, default=300)
    options = parser.parse_args()
    if not SOURCE.is_dir():
        sys.exit(f"{SOURCE}: not there; this benchmark needs the banking77 files")
    texts, truth, said = planted(classes=77, per_class=30, wrong=0.1)
    wrong = {i for i, (a, b) in enumerate(zip(truth, said, strict=True)) if a != b}
    rows = queue_of(texts, said, options.embedder, queue=100)
    for first in (rows, rows[:70]):
        hits = len(wrong & set(first))
        print(
            f"first {len(first)} of the queue: precision {hits / len(first):.3f}, recall {hits / len(wrong):.3f}; "
            f"random: precision {len(wrong) / len(texts):.3f}, recall {len(first) / len(texts):.3f}"
        )
    for rows, judged in ((500, 100), (500, 50), (1000, 200)):
        inside, alone, value, corrected_width, people_width = coverage(
            options.reviews, rows, judged, 0.1, options.embedder
        )
        print(
            f"{options.reviews} reviews of {judged} of {rows} rows: the corrected accuracy's interval covers the truth "
            f"({value:.3f}) in {inside:.1%}, the uncorrected one in {alone:.1%}; mean width {corrected_width:.3f}, by "
            f"the judged rows alone {people_width:.3f}"
        )


if __name__ == "__main__":
    main()
