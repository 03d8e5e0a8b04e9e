"""Prefill and decode speed of one artifact, in a process of its own: a C++ abort there must not end the tool.

Run as `python -m export.speed SPEC THREADS TOKENS REPEATS PROMPTS.json` by `measure_speed`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.engines import cores
from unshot import child
from unshot.errors import OutsideError


@dataclass(frozen=True)
class Speed:
    """Tokens per second of the prompt's and of the answer's tokens after the first; peak memory in bytes."""

    prefill: float
    decode: float
    memory: int


def measure_speed(
    spec: str,
    prompts: Path,
    *,
    tokens: int,
    repeats: int,
    threads: int | None = None,
) -> Speed:
    """Medians over `repeats` answers of `tokens` tokens, the prompts taken in turn, nothing cached between them."""
    command = child.command(
        "export.speed", spec, str(threads or cores()), str(tokens), str(repeats), str(prompts)
    )
    done = subprocess.run(command, env=child.environment(), capture_output=True, check=False)
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise OutsideError(f"{spec}: could not be timed ({words[-1][:200] if words else 'it said nothing'})")
    return Speed(**json.loads(done.stdout.decode().splitlines()[-1]))


def summarise(prompt_tokens: Sequence[int], ttft: Sequence[float], tpot: Sequence[float]) -> dict[str, float]:
    """Median tokens per second from seconds to the first token and seconds per token after it."""
    prefill = statistics.median(n / t for n, t in zip(prompt_tokens, ttft, strict=True))
    return {"prefill": prefill, "decode": 1 / statistics.median(tpot)}


def main() -> None:
    """The child: one warm-up, then `repeats` timed answers, none of them stopped by an end token."""
    import resource

    from unshot.engines import open_engine
    from unshot.engines.timing import itl

    spec, threads, tokens, repeats, prompts = sys.argv[1:6]
    ids = json.loads(Path(prompts).read_text(encoding="utf-8"))
    sizes, ttft, tpot = [], [], []
    with open_engine(spec, threads=int(threads)) as engine:
        engine.generate(ids[0], max_tokens=4, stop_ids=(), prefix_cache=False)
        for turn in range(int(repeats)):
            row = ids[turn % len(ids)]
            answer = engine.generate(row, max_tokens=int(tokens), stop_ids=(), prefix_cache=False)
            sizes.append(len(row))
            ttft.append(answer.ttft)
            tpot += itl(answer.token_times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({**summarise(sizes, ttft, tpot), "memory": peak}))


if __name__ == "__main__":
    main()
