"""Several processes behind one port: started, waited for, started again where they end, and told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from deploy.serve.options import ServeOptions
from deploy.serve.shared import FOLDER, Shared
from unshot.case import Case
from unshot.child import command, environment
from unshot.console import Output
from unshot.contracts.record import Record
from unshot.engines.server import PR_SET_PDEATHSIG
from unshot.errors import OutsideError

LOOK = 0.1
START_LIMIT = 120.0
# Seconds until a worker that ended is started again; twice as long each time, up to the second.
AGAIN, LONGEST = 0.2, 30.0
# One that ran for so long is started again at once.
GOOD = 60.0


class Order(Record):
    """What a worker is to do: the command line, and where the state is that it shares."""

    case: Case
    store: Path
    tracking: str | None
    options: ServeOptions
    folder: Path


class Workers:
    """The worker processes of one gateway; worker `n` answers on socket `n`, also the one that comes after it.

    A socket is kept open here, so that connections wait while its worker is started again.
    """

    def __init__(self, order: Order, sockets: Sequence[socket.socket], shared: Shared, out: Output) -> None:
        self.order = order
        self.sockets = sockets
        self.shared = shared
        self.out = out
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._started: dict[int, float] = {}
        self._due: dict[int, float] = {}
        self._pause: dict[int, float] = {}

    async def start(self, stopping: asyncio.Task[None]) -> bool:
        """Start all and wait until each accepts connections; False where it was told to stop meanwhile.

        Raises `OutsideError` where one ends before.
        """
        for bound in self.sockets:
            bound.listen(1024)  # before any worker is there: connections wait
        for index in range(len(self.sockets)):
            self._start(index)
        deadline = time.monotonic() + START_LIMIT
        while not all((self.shared.folder / f"ready-{i}").exists() for i in self._processes):
            if stopping.done():
                return False
            ended = [p.returncode for p in self._processes.values() if p.poll() is not None]
            if ended or time.monotonic() > deadline:
                why = f"ended with status {ended[0]}" if ended else f"did not start within {START_LIMIT:g} s"
                raise OutsideError(f"a worker of the gateway {why}; its own message stands above")
            await asyncio.sleep(LOOK)
        return True

    def _start(self, index: int) -> None:
        prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
        descriptor = self.sockets[index].fileno()
        process = subprocess.Popen(
            command("deploy.serve.worker", str(descriptor), str(index)),
            stdin=subprocess.PIPE,
            env=environment(**{FOLDER: str(self.shared.folder)}),
            pass_fds=[descriptor],
            preexec_fn=functools.partial(prctl, PR_SET_PDEATHSIG, signal.SIGKILL) if prctl else None,
        )
        assert process.stdin is not None
        with contextlib.suppress(OSError), process.stdin:
            process.stdin.write(self.order.to_json().encode())
        self._processes[index] = process
        self._started[index] = time.monotonic()

    async def keep(self, stopping: asyncio.Task[None]) -> None:
        """Start again what ends, until told to stop."""
        while not stopping.done():
            await asyncio.wait({stopping}, timeout=LOOK)
            now = time.monotonic()
            for index, process in self._processes.items():
                if process.poll() is None or stopping.done():
                    continue
                if index not in self._due:
                    self.shared.forget(index)
                    good = now - self._started[index] > GOOD
                    self._pause[index] = (
                        AGAIN if good else min(2 * self._pause.get(index, AGAIN / 2), LONGEST)
                    )
                    self._due[index] = now + self._pause[index]
                    self.out.warn(
                        f"worker {index} ended with status {process.returncode}; it is started again, its requests "
                        "under way are lost"
                    )
                elif now >= self._due[index]:
                    del self._due[index]
                    self._start(index)

    async def stop(self, limit: float) -> None:
        """Tell all to finish their requests, and wait for that, `limit` seconds at most."""
        running = [p for p in self._processes.values() if p.poll() is None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + limit
        while any(p.poll() is None for p in running) and time.monotonic() < deadline:
            await asyncio.sleep(LOOK / 2)
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()
