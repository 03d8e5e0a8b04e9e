"""Start things at a planned time. asyncio's own timers round up to whole milliseconds; the kernel's do not."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import time
from collections.abc import Callable

CLOCK_MONOTONIC = 1
TFD_NONBLOCK = 0o4000
TFD_TIMER_ABSTIME = 1


class _TimeSpec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", _TimeSpec), ("value", _TimeSpec))


class Alarm:
    """Calls `callback` at an absolute `time.perf_counter()` time; one pending time at once.

    A timerfd on Linux (precise to some ten microseconds), the event loop's own timer elsewhere.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None
        self._descriptor = -1
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._descriptor = self._libc.timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK)
        if self._descriptor >= 0:
            loop.add_reader(self._descriptor, self._fire)

    def set(self, when: float) -> None:
        """Ask for a call at `when`; a time in the past calls as soon as the loop is free."""
        if self._descriptor < 0:
            self._handle = self._loop.call_later(max(0.0, when - time.perf_counter()), self._callback)
            return
        # perf_counter is CLOCK_MONOTONIC on Linux. A value of zero would disarm the timer.
        nanoseconds = max(1, int(when * 1e9))
        spec = _TimerSpec(_TimeSpec(0, 0), _TimeSpec(*divmod(nanoseconds, 1_000_000_000)))
        self._libc.timerfd_settime(self._descriptor, TFD_TIMER_ABSTIME, ctypes.byref(spec), None)

    def _fire(self) -> None:
        try:
            os.read(self._descriptor, 8)
        except BlockingIOError:
            return
        self._callback()

    def close(self) -> None:
        """Forget the pending time."""
        if self._handle:
            self._handle.cancel()
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
