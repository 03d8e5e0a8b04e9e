"""Context distillation on the embedded model: `python -m tests.benchmarks.bench_distil OUT [INPUTS]`.

The task is one that a 135M model does with a prompt: an order in free words becomes one line of a fixed form (twelve
examples); 100 inputs are held out. `unshot tune --teacher self` is given no label: the true lines stand in the rows'
answers only so that all three systems are scored on them.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

NAMES = [
    *("Alice", "Bob", "Carla", "Dmitri", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas"),
    *("Keiko", "Lars", "Maria", "Nadia", "Omar", "Petra", "Quentin", "Rosa", "Sven", "Tara"),
]
ITEMS = [
    "lamp",
    "chair",
    "teapot",
    "rug",
    "desk",
    "shelf",
    "mirror",
    "clock",
    "vase",
    "stool",
    "kettle",
    "blanket",
]
FORMS = (
    "{n} ordered {k} {i}s on order {o}.",
    "Order {o}: {k} {i}s for {n}.",
    "Please send {k} {i}s to {n}, the order number is {o}.",
    "{n} wants {k} {i}s (order {o}).",
)
CASE = """
[task]
name = "orders"
system = "You turn an order into one line: [order] name / item x count. Say nothing else."
examples = "few_shot.jsonl"
instruction = "Order line."
data = "inputs.jsonl"
metric = "exact_match"

[candidate]
model = "smollm2-135m"
gpu = "cpu"

[tune]
teacher = "self"
epochs = 4
embedder = "off"
forgetting = false
robustness = false
"""


def row(draw: random.Random) -> dict[str, str]:
    """An order and its line."""
    facts = {
        "n": draw.choice(NAMES),
        "k": draw.randint(2, 9),
        "i": draw.choice(ITEMS),
        "o": draw.randint(1000, 9999),
    }
    line = f"[{facts['o']}] {facts['n']} / {facts['i']} x {facts['k']}"
    return {"prompt": draw.choice(FORMS).format(**facts), "completion": line}


def main() -> None:
    folder, inputs = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 300
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for name, count in (("few_shot", 12), ("inputs", inputs), ("test", 100)):
        rows = [json.dumps(row(draw)) + "\n" for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / "unshot.toml").write_text(CASE, encoding="utf-8")
    line = ["tune", "--case", str(folder / "unshot.toml"), "--out", str(folder / "run"), "--overwrite"]
    line += ["--test", str(folder / "test.jsonl")]
    subprocess.run([sys.executable, "-m", "unshot", *line], check=True)
    worth = json.loads((folder / "run" / "metrics.json").read_text(encoding="utf-8"))["prompt_worth"]
    print(json.dumps(worth, indent=2))


if __name__ == "__main__":
    main()
