"""A 135M model tuned on 1,500 customer questions of 77 kinds, against its base with a 10-shot and a 77-shot prompt.

    python -m tests.benchmarks.bench_banking77 OUT [--epochs 2] [--base-gguf FILE] [--rows 500]

Everything goes through the product's own commands: `unshot tune` on 1,875 rows of ../shared/data/banking77/train.csv
(80% of them are trained on), `unshot eval --data` on 500 rows of its test.csv (all 77 classes, columns as they come),
`unshot export` of the bare base to GGUF. The base is then asked the same 500 questions with the labels listed and 10 or
77 examples (one per class) as turns, in llama.cpp with its prefix cached. Prints accuracy and macro-F1 with 95%
intervals, the near-duplicates of training rows, wall and CPU minutes. OUT is kept; a step whose result is there is not
done again.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.conftest import SHARED
from tune.evaluate.scores import Answers
from unshot.contracts.task import Task
from unshot.engines import open_engine

SOURCE = SHARED / "banking77"
INSTRUCTION = "Banking intent?"
Row = dict[str, str]


def read(name: str) -> list[Row]:
    """Rows of a CSV file of the data set."""
    with (SOURCE / f"{name}.csv").open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def sample(rows: list[Row], count: int, seed: int) -> list[Row]:
    """`count` rows, the classes as even as they can be."""
    classes: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        classes[row["category"]].append(row)
    chance = random.Random(seed)
    for members in classes.values():
        chance.shuffle(members)
    chosen: list[Row] = []
    while len(chosen) < count:
        for name in sorted(classes):
            if classes[name] and len(chosen) < count:
                chosen.append(classes[name].pop(0))
    return chosen


def write(path: Path, rows: list[Row]) -> Path:
    """The rows as a CSV with the columns of the data set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, ["text", "category"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def command(*arguments: object) -> tuple[str, float, float]:
    """Run `unshot ...`; its stdout, wall minutes and CPU minutes (user and system, all threads)."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "unshot", *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, (time.perf_counter() - start) / 60, cpu / 60


def few_shot(gguf: Path, shots: list[Row], test: list[Row], labels: list[str]) -> tuple[list[str], int]:
    """The base's answers to the test rows behind a few-shot prompt, and that prompt's tokens."""
    system = (
        "You sort messages of a bank's customers by intent. Answer with exactly one of these intents and nothing "
        "else: " + ", ".join(labels)
    )
    turns = [{"role": "system", "content": system}]
    for shot in shots:
        turns += [
            {"role": "user", "content": shot["text"]},
            {"role": "assistant", "content": shot["category"]},
        ]
    with open_engine(f"gguf:{gguf}") as engine:
        size = len(engine.prompt_ids(turns))
        return [
            engine.generate(
                engine.prompt_ids([*turns, {"role": "user", "content": row["text"]}]), max_tokens=20
            ).text
            for row in test
        ], size


def main() -> None:
    """Tune, evaluate, ask the base, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--base-gguf", type=Path)
    options = parser.parse_args()
    if not SOURCE.is_dir():
        sys.exit(f"{SOURCE}: not there; this benchmark needs the banking77 files")
    out: Path = options.out
    train = sample(read("train"), 1875, 0)
    test = sample(read("test"), options.rows, 0)
    labels = sorted({row["category"] for row in read("train")})
    data, held_out = write(out / "train.csv", train), write(out / "test.csv", test)
    if not (out / "run").exists():
        _, wall, cpu = command(
            "tune", data, "--base", "smollm2-135m", "--out", out / "run", "--instruction", INSTRUCTION,
            "--epochs", options.epochs, "--patience", options.epochs, "--embedder", "off",
        )  # fmt: skip
        (out / "tune.json").write_text(json.dumps({"wall_minutes": wall, "cpu_minutes": cpu}))
    took = json.loads((out / "tune.json").read_text()) if (out / "tune.json").exists() else {}
    if not (out / "scores").exists():
        command("eval", out / "run", "--data", held_out, "--out", out / "scores", "--json")
    tuned: dict[str, Any] = json.loads((out / "scores" / "scores.json").read_text())
    gguf = options.base_gguf
    if gguf is None:
        if not (out / "base").exists():
            command("export", "smollm2-135m", "--to", "gguf:q8_0", "--out", out / "base", "--check-rows", 8)
        gguf = out / "base" / "model-q8_0.gguf"
    task = Task(labels=labels, metric="macro_f1")
    lines = []
    for name, count in (("base, 10-shot", 10), ("base, 77-shot", 77)):
        kept = out / f"{count}-shot.json"
        if not kept.exists():
            # One example of each class, in random order; ten of them for the short prompt.
            shots = sample(train, 77, 1)
            random.Random(1).shuffle(shots)
            answers, size = few_shot(gguf, shots[:count], test, labels)
            kept.write_text(json.dumps({"answers": answers, "prompt_tokens": size}))
        found = json.loads(kept.read_text())
        report = Answers(task, [r["category"] for r in test], found["answers"]).report()
        lines.append(
            (name, report["accuracy"], report["macro_f1"], report["invalid"], found["prompt_tokens"])
        )
    print("| model | accuracy | macro-F1 | invalid | prompt tokens |\n|---|---|---|---|---|")
    for name, accuracy, macro, invalid, size in lines:
        print(f"| {name} (llama.cpp, Q8_0) | {accuracy} | {macro} | {invalid:.1%} | {size} |")
    first = {k: "{value:.3f} [{low:.3f}, {high:.3f}]".format(**tuned[k]) for k in ("accuracy", "macro_f1")}
    print(
        f"| tuned | {first['accuracy']} | {first['macro_f1']} | {tuned['invalid']:.1%} | instruction alone |"
    )
    metrics = json.loads((out / "run" / "metrics.json").read_text())
    print(
        f"\n{metrics['rows']['train']} training rows, {metrics['epochs']} epochs, {metrics['trained_tokens']} tokens; "
        f"{took}"
    )
    print(
        f"{len(tuned['like_training'])} of {tuned['rows']} test rows have a near-duplicate among the training rows"
    )
    for row in tuned["like_training"]:
        print(f"  line {row['line']} like training line {row['train_line']}, similarity {row['similarity']}")
    if "without_like_training" in tuned:
        score = tuned["without_like_training"]
        print("  macro-F1 without them ({rows} rows): {score[value]:.3f}".format(**score))
    for gate in metrics["gates"]:
        print(f"gate {gate['name']}, passed: {gate['passed']}: {gate['detail']}")


if __name__ == "__main__":
    main()
