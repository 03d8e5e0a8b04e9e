"""The request log's writer: redacts and writes on a thread of its own, so that no answer waits for a disk."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from unshot.contracts.request_log import Feedback, Request, Writer
from unshot.data import personal as pii

ROOM = 20_000
STOP = None


class Journal:
    """Takes entries at once; what does not fit or cannot be written is counted, and never fails a request."""

    def __init__(
        self,
        writer: Writer,
        *,
        texts: bool,
        region: str,
        counted: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._writer = writer
        self._texts = texts
        self._region = region
        self._counted = counted
        self._warn = warn
        self._warned = False
        self._queue: queue.Queue[Request | Feedback | None] = queue.Queue(ROOM)
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._thread.start()

    def put(self, entry: Request | Feedback) -> None:
        """Hand over one entry; texts are left out here where they are not to be logged."""
        if isinstance(entry, Request) and not self._texts:
            entry.input = entry.answer = None
        try:
            self._queue.put_nowait(entry)
        except queue.Full:
            self._counted("dropped")

    def close(self) -> None:
        """Write what is left."""
        self._queue.put(STOP)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while (entry := self._queue.get()) is not STOP:
            try:
                self._writer.write(self._clean(entry))
            except Exception as error:  # a full disk must not end the log for good
                self._counted("failed")
                if not self._warned:
                    self._warn(f"the request log cannot be written ({error}); answers go on")
                    self._warned = True
            else:
                self._counted("written")
                self._warned = False

    def _clean(self, entry: Request | Feedback) -> Request | Feedback:
        names = ("correction",) if isinstance(entry, Feedback) else ("input", "answer")
        clean = {n: self._redacted(v) for n in names if (v := getattr(entry, n)) is not None}
        return entry.changed(**clean)

    def _redacted(self, text: str) -> str:
        return pii.redact(text, pii.find(text, self._region))
