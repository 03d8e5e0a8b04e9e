"""Interleaved A/B blocks: the machine's drift falls on both sides alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.records import Record
from bench.systems import Measured, Progress
from unshot.data.rows import Example

CACHE_ON, CACHE_OFF = "cache on", "cache off"
MODES = (CACHE_ON, CACHE_OFF)


@dataclass
class Measurement:
    """Records, warm-up apart; `interrupted` where Ctrl-C cut it short; `clocks` are the modes' starts."""

    records: list[Record] = field(default_factory=list)
    warm: list[Record] = field(default_factory=list)
    interrupted: bool = False
    clocks: dict[str, float] = field(default_factory=dict)


def plan_blocks(count: int, size: int, sides: int = 2) -> list[tuple[int, int, range]]:
    """`(block, side, requests)` in the order A B, B A, A B, ...: each block of requests runs on every side."""
    order = []
    for block, begin in enumerate(range(0, count, size)):
        picks = range(begin, min(begin + size, count))
        turn = range(sides) if block % 2 == 0 else reversed(range(sides))
        order += [(block, side, picks) for side in turn]
    return order


def run_mode(
    systems: Sequence[Measured],
    rows: Sequence[Example],
    *,
    mode: str,
    count: int,
    block: int,
    warm_up: int,
    progress: Progress | None = None,
    between: Callable[[], None] = lambda: None,
) -> Measurement:
    """Run `count` requests per side in interleaved blocks; rows are taken in turn.

    Pairs have the same `extra["request"]`. The warm-up fills caches and is not measured; with `cache on` its
    first request holds the cost of filling the prefix. `between` is called between blocks. Ctrl-C ends the run with
    what is there.
    """
    clock = time.perf_counter()
    result = Measurement(clocks={mode: clock})
    try:
        for system in systems:
            system.reset()
            # From the end of the rows, so that the first measured request is not the warmed one.
            picks = [len(rows) - 1 - i % len(rows) for i in range(warm_up)]
            items = [(-1, number, rows[number]) for number in picks]
            if items:
                result.warm += system.run_block(items, mode=mode, block=-1, clock=clock)
        between()
        for number, side, wanted in plan_blocks(count, block, len(systems)):
            items = [(i, i % len(rows), rows[i % len(rows)]) for i in wanted]
            result.records += systems[side].run_block(
                items, mode=mode, block=number, clock=clock, progress=progress
            )
            between()
    except KeyboardInterrupt:
        result.interrupted = True
    return result


def pairs(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Baseline and candidate records of the same request, in request order; unpaired or failed ones left out."""
    sides: dict[str, dict[int, Record]] = {"baseline": {}, "candidate": {}}
    for record in records:
        if record.ok:
            sides[record.side][record.extra["request"]] = record
    shared = sorted(sides["baseline"].keys() & sides["candidate"].keys())
    return [sides["baseline"][i] for i in shared], [sides["candidate"][i] for i in shared]


def block_seconds(records: Sequence[Record]) -> dict[str, dict[int, float]]:
    """Machine seconds per answered request of each block, by side: the block's wall time over its answers.

    What a failed request took is counted too, since the machine was paid for meanwhile. At one request at a time
    this is the mean service time; with more, what the system did at once is shared.
    """
    blocks: dict[str, dict[int, list[Record]]] = {"baseline": {}, "candidate": {}}
    for record in records:
        blocks[record.side].setdefault(record.block, []).append(record)
    result: dict[str, dict[int, float]] = {"baseline": {}, "candidate": {}}
    for side, by_block in blocks.items():
        for number, group in by_block.items():
            answered = sum(r.ok for r in group)
            if answered:
                ends = (r.scheduled + (r.e2e if r.ok else r.extra.get("elapsed", 0.0)) for r in group)
                wall = max(ends) - min(r.scheduled for r in group)
                result[side][number] = wall / answered
    return result
