"""Interleaved A/B blocks: the machine's drift falls on both sides alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from bench.records import Record
from bench.systems import System
from unshot.data import Example

CACHE_ON, CACHE_OFF = "cache on", "cache off"
MODES = (CACHE_ON, CACHE_OFF)
Progress = Callable[[Record], None]


def plan_blocks(count: int, size: int, sides: int = 2) -> list[tuple[int, int, range]]:
    """`(block, side, requests)` in the order A B, B A, A B, ...: each block of requests runs on every side."""
    order = []
    for block, begin in enumerate(range(0, count, size)):
        picks = range(begin, min(begin + size, count))
        turn = range(sides) if block % 2 == 0 else reversed(range(sides))
        order += [(block, side, picks) for side in turn]
    return order


def run_mode(
    systems: Sequence[System],
    rows: Sequence[Example],
    *,
    mode: str,
    count: int,
    block: int,
    warm_up: int,
    progress: Progress | None = None,
) -> tuple[list[Record], list[Record]]:
    """Run `count` requests per side in interleaved blocks, one at a time; rows are taken in turn.

    Returns `(measured, warm-up)` records. Pairs have the same `row` and `block`. The warm-up fills caches and
    is not measured; with `cache on` its first request holds the cost of filling the prefix.
    """
    clock = time.perf_counter()
    warm, measured = [], []
    for system in systems:
        system.engine.reset()
        for i in range(warm_up):
            # From the end of the rows, so that the first measured request is not the warmed one.
            number = len(rows) - 1 - i % len(rows)
            warm.append(system.run(rows[number], number, mode=mode, block=-1, clock=clock))
    for number, side, picks in plan_blocks(count, block, len(systems)):
        for request in picks:
            index = request % len(rows)
            record = systems[side].run(rows[index], index, mode=mode, block=number, clock=clock)
            record.extra["request"] = request
            measured.append(record)
            if progress:
                progress(record)
    return measured, warm


def pairs(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Baseline and candidate records of the same request, in request order; unpaired or failed ones left out."""
    sides: dict[str, dict[int, Record]] = {"baseline": {}, "candidate": {}}
    for record in records:
        if record.ok:
            sides[record.side][record.extra["request"]] = record
    shared = sorted(sides["baseline"].keys() & sides["candidate"].keys())
    return [sides["baseline"][i] for i in shared], [sides["candidate"][i] for i in shared]
