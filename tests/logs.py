"""Request logs made up for tests of `deploy ab`, `deploy drift` and `deploy retrain`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unshot.__main__ import main
from unshot.contracts.request_log import Arm, Feedback, Request, Writer

START = 1_790_000_000.0


@dataclass(frozen=True)
class Done:
    """What a command line left."""

    code: int
    out: str
    err: str


def run_here(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Done:
    """Run the command line in this process: many short commands would spend their time on imports."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    text = capsys.readouterr()
    assert "Traceback" not in text.err and "internal error" not in text.err, text.err
    return Done(int(stop.value.code or 0), text.out, text.err)


def request(number: int, *, unit: str | None = None, assigned: Arm = "baseline", **fields: Any) -> Request:
    """A request of a made-up log; its arm is the assigned one unless given."""
    key = unit if unit is not None else f"user {number}"
    return Request(
        **{
            "id": f"r{number}",
            "time": START + 10 * number,
            "arm": assigned,
            "version": "1" if assigned == "baseline" else "2",
            "unit": hashlib.sha256(key.encode()).hexdigest()[:16],
            "assigned": assigned,
            **fields,
        }
    )


def split_log(
    folder: Path,
    requests: int,
    *,
    right: tuple[float, float],
    seed: int = 0,
    per_unit: int = 1,
    seconds: tuple[float, float] = (0.2, 0.2),
    labels: Sequence[str] = ("a", "b"),
) -> Path:
    """Traffic split in half; the arms are right with the given probabilities, and every answer has its feedback."""
    generator = np.random.default_rng(seed)
    writer = Writer(folder)
    for number in range(requests):
        unit = f"user {number // per_unit}"
        candidate = hashlib.sha256(f"{seed} {unit}".encode()).digest()[0] % 2 == 1
        arm: Arm = "candidate" if candidate else "baseline"
        true = labels[int(generator.integers(len(labels)))]
        good = generator.random() < right[candidate]
        label = true if good else next(x for x in labels if x != true)
        time = float(generator.lognormal(np.log(seconds[candidate]), 0.3))
        line = request(
            number, unit=unit, assigned=arm, share=0.5, label=label, answer=label, ttft_s=time / 2, e2e_s=time,
            cost_usd=0.001 * (1 + candidate), schema_ok=True,
        )  # fmt: skip
        writer.write(line)
        writer.write(Feedback(id=line.id, time=line.time + 5, correction=true, by="reviewer"))
    return folder
