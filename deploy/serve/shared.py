"""What the processes of one gateway have in common: breakers, requests under way, rates, and where its servers are.

A gateway of one process keeps it in its own memory. With `--workers` it lies in small files that every process maps,
so that a worker that is killed takes none of it along. Counts have a column for each worker, which only that worker
writes; everything else is changed under the file's lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import math
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from unshot.data.files import write_text

MOST_WORKERS = 64
FACTS = 8
# Rows of counts: requests under way, requests that a server works on, and whether a worker may ask the back end at all.
ACTIVE, ASKED, HELD = ROWS = range(3)
SERVERS = "servers.json"
# Names the state directory for prometheus_client too, which looks when it is imported: counters lie beside the rest.
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
PAUSE = 0.005


class Cell:
    """Eight facts and three rows of counts, numbers all: of one back end, or of the gateway itself.

    Without `path` it is this process's own. `index` is the worker's column, None for the process that leads them.
    """

    def __init__(self, path: Path | None = None, index: int | None = 0) -> None:
        size = 8 * (FACTS + len(ROWS) * MOST_WORKERS)
        self._descriptor: int | None = None
        if path is not None:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            os.ftruncate(self._descriptor, size)
        self.index = index
        self._map = mmap.mmap(-1 if self._descriptor is None else self._descriptor, size)
        self.facts = memoryview(self._map).cast("d")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among all processes; what is done meanwhile must be short."""
        if self._descriptor is None:
            yield
            return
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def count(self, row: int, by: int) -> None:
        """Add to this worker's count."""
        if self.index is not None:
            self.facts[FACTS + row * MOST_WORKERS + self.index] += by

    def total(self, row: int) -> int:
        """The count of all workers."""
        start = FACTS + row * MOST_WORKERS
        return int(sum(self.facts[start : start + MOST_WORKERS]))

    def forget(self, index: int) -> None:
        """Take out the counts of a worker that has ended."""
        for row in ROWS:
            self.facts[FACTS + row * MOST_WORKERS + index] = 0.0


class Places:
    """The requests that a server works on at once, over all workers: an `asyncio.Semaphore` for several processes."""

    def __init__(self, cell: Cell, number: int) -> None:
        self.cell = cell
        self.number = number

    async def acquire(self) -> None:
        """Take a place, or wait for one."""
        while True:
            with self.cell.locked():
                if self.cell.total(ASKED) < self.number:
                    self.cell.count(ASKED, 1)
                    return
            await asyncio.sleep(PAUSE)

    def release(self) -> None:
        """Give the place back."""
        self.cell.count(ASKED, -1)

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(self, *error: object) -> None:
        self.release()


@dataclass
class Shared:
    """The state directory of a gateway with workers. `index` is None in the process that leads them."""

    folder: Path
    index: int | None = None
    _cells: dict[str, Cell] = field(default_factory=dict)
    _seen: tuple[object, dict[str, dict[str, str]]] = (None, {})

    def cell(self, name: str) -> Cell:
        """The cell of that name, the same one in every process."""
        if name not in self._cells:
            file = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:20]
            self._cells[name] = Cell(self.folder / f"cell-{file}", self.index)
        return self._cells[name]

    def forget(self, index: int) -> None:
        """Take a worker that has ended out of every count, whoever made the cell."""
        for path in self.folder.glob("cell-*"):
            Cell(path, None).forget(index)

    def publish(self, servers: dict[str, dict[str, str]]) -> None:
        """Tell the workers which local servers answer and where (`url`), and which did not start (`error`)."""
        if servers != self._seen[1]:
            self._seen = (None, servers)
            write_text(self.folder / SERVERS, json.dumps(servers))

    def server(self, identity: str) -> dict[str, str]:
        """What was published of a server; empty where nothing was."""
        path = self.folder / SERVERS
        try:
            facts = path.stat()
            stamp = (facts.st_ino, facts.st_mtime_ns)
            if stamp != self._seen[0]:
                self._seen = (stamp, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}
        return self._seen[1].get(identity, {})


@contextlib.contextmanager
def state_folder() -> Iterator[Path]:
    """A directory for what the workers share, in memory where there is such a place; gone at the end."""
    base = os.environ.get(FOLDER)
    folder = Path(base) if base else Path(new_state_folder())
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_state_folder() -> str:
    """The directory's name; readable by its owner only."""
    memory = "/dev/shm"
    return tempfile.mkdtemp(prefix="unshot-gateway-", dir=memory if os.access(memory, os.W_OK) else None)


class Rates:
    """A token bucket for each key: `limit` requests a minute, at once or spread.

    The table has room for some thousands of keys; where it is full, the one that was not seen for longest makes room.
    """

    ROOM, NEAR = 8192, 16

    def __init__(self, limit: float, path: Path | None = None) -> None:
        self.limit = limit
        size = 24 * self.ROOM
        self._descriptor: int | None = None
        if path is not None:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            os.ftruncate(self._descriptor, size)
        self._map = mmap.mmap(-1 if self._descriptor is None else self._descriptor, size)
        self._rows = memoryview(self._map).cast("d")

    def wait(self, key: str) -> float:
        """Take one request of the key's; 0, or the seconds after which there will be room for it."""
        known = float(int(hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()[:13], 16) + 1)
        now = time.monotonic()
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            row = self._row(known)
            left = self.limit
            if self._rows[row] == known:
                left = min(self.limit, self._rows[row + 1] + (now - self._rows[row + 2]) * self.limit / 60)
            taken = float(left >= 1)
            self._rows[row], self._rows[row + 1], self._rows[row + 2] = known, left - taken, now
            return 0.0 if taken else (1 - left) * 60 / self.limit
        finally:
            if self._descriptor is not None:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _row(self, known: float) -> int:
        """Where the key's row is, or is to be."""
        start = int(known) % self.ROOM
        rows = [3 * ((start + step) % self.ROOM) for step in range(self.NEAR)]
        for row in rows:
            if self._rows[row] == known:
                return row
        return min(rows, key=lambda row: self._rows[row + 2] if self._rows[row] else -math.inf)
