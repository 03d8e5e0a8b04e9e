"""Interleaved A/B blocks: the machine's drift falls on both sides alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.counters import counted
from bench.records import SIDES, RequestRecord, answered_tokens
from bench.sides import Item, Progress, System
from bench.traffic import Fresh
from unshot.contracts.figures import Client, ServerCounters
from unshot.contracts.report import SideName
from unshot.data.rows import Example

# At most this share of a mode's blocks is measured again because the client itself was late in them.
REPEATED = 0.25
# Numbers of pairs, each with the level of the interval that is looked at there.
Looks = Sequence[tuple[int, float]]


@dataclass
class Measurement:
    """What was measured. `records` count; `warm` and `dropped` (blocks that the client spoilt) do not.

    `asked` holds every measured request in the order in which it was asked; `clocks` are the modes' starts.
    """

    records: list[RequestRecord] = field(default_factory=list)
    warm: list[RequestRecord] = field(default_factory=list)
    dropped: list[RequestRecord] = field(default_factory=list)
    asked: list[RequestRecord] = field(default_factory=list)
    clients: dict[SideName, list[Client]] = field(default_factory=lambda: {side: [] for side in SIDES})
    blocks: dict[str, int] = field(default_factory=dict)
    spoilt: dict[str, int] = field(default_factory=dict)
    looks: dict[str, int] = field(default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False
    clocks: dict[str, float] = field(default_factory=dict)
    # What each mode's servers counted themselves.
    servers: dict[str, dict[SideName, ServerCounters | None]] = field(default_factory=dict)

    def add(self, other: Measurement) -> None:
        """Take in another mode's measurement."""
        for name in ("records", "warm", "dropped", "asked"):
            getattr(self, name).extend(getattr(other, name))
        for name in ("blocks", "spoilt", "looks", "levels", "clocks", "servers"):
            getattr(self, name).update(getattr(other, name))
        for side in SIDES:
            self.clients[side] += other.clients[side]
        self.interrupted = self.interrupted or other.interrupted


@dataclass(frozen=True)
class ModeSettings:
    """How one cache mode is measured: requests a block, warm-up requests, and after how many pairs to look.

    A look is a number of pairs and the level of the interval there; the last is the end, and before it the run ends
    where `settled` says so. `repeat` asks for the rows again as they
    are; without it what is asked a second time begins with fresh words. `limit` is in seconds, heeded at the looks.
    """

    mode: str
    looks: Looks
    block: int
    warm_up: int
    repeat: bool = False
    limit: float = float("inf")


def run_mode(
    systems: Sequence[System],
    rows: Sequence[Example],
    settings: ModeSettings,
    *,
    progress: Progress | None = None,
    between: Callable[[], None] = lambda: None,
    settled: Callable[[Sequence[RequestRecord], float], bool] = lambda records, level: False,
) -> Measurement:
    """Measure one mode in blocks A B, B A, A B, ...; rows are taken in turn.

    Pairs have the same `request`. The warm-up fills caches and is not measured; with `cache on` its first request
    holds the cost of filling the prefix. A block in which the client itself was late is dropped and measured again,
    for at most a quarter of the blocks. `between` is called between blocks. Ctrl-C ends the run with what is there.
    """
    runner = _ModeRunner(systems, rows, settings, progress, between)
    before = {s.side: s.counters() for s in systems}
    try:
        runner.warm_up()
        begin = 0
        for end, level in settings.looks:
            runner.result.levels[settings.mode] = level
            for first in range(begin, end, settings.block):
                runner.measure(range(first, min(first + settings.block, end)))
            runner.result.looks[settings.mode] = runner.result.looks.get(settings.mode, 0) + 1
            late = time.perf_counter() - runner.clock > settings.limit
            if end < settings.looks[-1][0] and (late or settled(runner.result.records, level)):
                break
            begin = end
    except KeyboardInterrupt:
        runner.result.interrupted = True
    answered = {s.side: answered_tokens(r for r in runner.result.asked if r.side == s.side) for s in systems}
    runner.result.servers[settings.mode] = {
        s.side: counted(before[s.side], s.counters(), least=answered[s.side]) for s in systems
    }
    return runner.result


class _ModeRunner:
    def __init__(
        self,
        systems: Sequence[System],
        rows: Sequence[Example],
        settings: ModeSettings,
        progress: Progress | None,
        between: Callable[[], None],
    ) -> None:
        self.systems, self.rows, self.settings = systems, rows, settings
        self.progress, self.between = progress, between
        self.fresh = Fresh()
        self.clock = time.perf_counter()
        mode = settings.mode
        self.result = Measurement(
            clocks={mode: self.clock}, blocks={mode: 0}, spoilt={mode: 0}, looks={mode: 0}
        )

    def warm_up(self) -> None:
        for system in self.systems:
            system.reset()
            picks = [i % len(self.rows) for i in range(self.settings.warm_up)]
            # Words of their own: no measured request has been asked before.
            items = [
                Item(-1, n, self.rows[n], None if self.settings.repeat else self.fresh.words()) for n in picks
            ]
            if items:
                done = system.run_block(items, mode=self.settings.mode, block=-1, clock=self.clock)
                self.result.warm += done.records
        self.between()

    def measure(self, wanted: range) -> None:
        """One block on every side; again with fresh words where the client spoilt it."""
        result, mode = self.result, self.settings.mode
        items = [self._item(i, again=False) for i in wanted]
        while True:
            number = result.blocks[mode]
            records, clients, partial = self._both(items, number)
            result.asked += records
            if partial:
                result.records += records
                raise KeyboardInterrupt
            spoilt = any(not c.valid for c in clients.values())
            allowed = max(1, int(REPEATED * (1 + self.settings.looks[-1][0] // self.settings.block)))
            if not spoilt or result.spoilt[mode] >= allowed:
                break
            result.spoilt[mode] += 1
            result.dropped += records
            items = [self._item(i, again=True) for i in wanted]
        result.blocks[mode] += 1
        result.records += records
        for side, client in clients.items():
            result.clients[side].append(client)

    def _both(
        self, items: Sequence[Item], number: int
    ) -> tuple[list[RequestRecord], dict[SideName, Client], bool]:
        turn = self.systems if number % 2 == 0 else tuple(reversed(self.systems))
        records: list[RequestRecord] = []
        clients: dict[SideName, Client] = {}
        try:
            for system in turn:
                done = system.run_block(
                    items, mode=self.settings.mode, block=number, clock=self.clock, progress=self.progress
                )
                records += done.records
                if done.client is not None:
                    clients[system.side] = done.client
                self.between()
        except KeyboardInterrupt:
            return records, clients, True
        return records, clients, False

    def _item(self, request: int, *, again: bool) -> Item:
        row = request % len(self.rows)
        repeated = again or request >= len(self.rows)
        words = self.fresh.words() if repeated and not self.settings.repeat else None
        return Item(request, row, self.rows[row], words)


def pairs(records: Sequence[RequestRecord]) -> tuple[list[RequestRecord], list[RequestRecord]]:
    """Baseline and candidate records of the same request, in request order; unpaired or failed ones left out."""
    sides: dict[SideName, dict[int, RequestRecord]] = {side: {} for side in SIDES}
    for record in records:
        if record.ok:
            sides[record.side][record.request] = record
    shared = sorted(sides["baseline"].keys() & sides["candidate"].keys())
    return [sides["baseline"][i] for i in shared], [sides["candidate"][i] for i in shared]
