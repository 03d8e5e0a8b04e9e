"""The gateway's side of the request log: hands entries to the process that redacts and writes them, counts losses."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import queue
import secrets
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from unshot.child import command, environment
from unshot.contracts.request_log import Feedback, Request, Writer
from unshot.errors import OutsideError

ROOM = 20_000
# Characters of a text that the log keeps; what is longer is cut and marked.
LONGEST_TEXT = 32_768
SALT_FILE = ".salt"
RESTART_AFTER = 1.0
CLOSE_LIMIT = 60.0
# Bytes that go to the writing process in one piece: what a pipe holds.
AT_ONCE = 65_536


@dataclass(frozen=True)
class LogSettings:
    """What is kept: texts or not, in which country phone numbers without a prefix are, how long a text may be."""

    folder: Path
    texts: bool = False
    region: str = "US"
    longest_text: int = LONGEST_TEXT


class RequestLog:
    """Takes entries at once; what does not fit or cannot be written is counted and reported, and never fails a request.

    `counted` gets `written`, `failed`, `dropped` (no room), or `lost` (the writing process ended).
    """

    def __init__(
        self, settings: LogSettings, *, counted: Callable[[str], None], warn: Callable[[str], None]
    ) -> None:
        self.settings = settings
        self._counted = counted
        self._warn = warn
        self._warned: set[str] = set()
        self._queue: queue.Queue[bytes | None] = queue.Queue(ROOM)
        self._sent = self._answered = 0
        self._lock = threading.Lock()
        self._stopped = False
        try:
            torn = Writer(settings.folder).cut
            self._salt = read_salt(settings.folder)
        except OSError as error:
            raise OutsideError(
                f"--log {settings.folder}: cannot be written ({error.strerror}); choose another directory"
            ) from None
        if torn:
            warn(
                f"{settings.folder}: {torn} torn last lines were cut off; a writer was killed or the disk was full"
            )
        self._process = self._start()
        self._thread = threading.Thread(target=self._feed, name="request-log", daemon=True)
        self._thread.start()

    def unit_of(self, key: str) -> str:
        """The salted hash of a sticky key: tells units apart without telling who they are."""
        return hmac.new(self._salt, key.encode("utf-8", "replace"), hashlib.sha256).hexdigest()[:16]

    def token_of(self, number: str) -> str:
        """What whoever got an answer knows, and needs to say something of it."""
        return hmac.new(self._salt, b"feedback " + number.encode(), hashlib.sha256).hexdigest()[:32]

    def put(self, entry: Request | Feedback, *, known_label: bool = True) -> None:
        """Hand over one entry; what is not to be logged is left out here.

        `known_label` False: the label is whatever the model wrote, and so a text.
        """
        try:
            data = self._encoded(entry, known_label)
            self._queue.put_nowait(data)
        except queue.Full:
            self._counted("dropped")
            self._say("the request log's queue is full; lines are dropped and counted")
        except (UnicodeError, ValueError, OverflowError) as error:
            self._counted("failed")
            self._say(f"a line of the request log cannot be written ({type(error).__name__})")

    def _encoded(self, entry: Request | Feedback, known_label: bool) -> bytes:
        longest = self.settings.longest_text
        if isinstance(entry, Feedback):
            return f"F{entry.to_json()}\n".encode()
        if not self.settings.texts:
            label = entry.label if known_label else None
            entry = entry.changed(input=None, answer=None, messages=None, label=label)
        texts = [t for t in (entry.input, entry.answer, entry.label) if t is not None]
        texts += [m.content for m in entry.messages or ()]
        if any(len(t) > longest for t in texts):
            entry = entry.changed(
                input=entry.input and entry.input[:longest],
                answer=entry.answer and entry.answer[:longest],
                label=entry.label and entry.label[:longest],
                messages=entry.messages and [m.changed(content=m.content[:longest]) for m in entry.messages],
                cut=True,
            )
        return f"R{entry.to_json()}\n".encode()

    def close(self) -> None:
        """Write what is left, and say what was not."""
        self._queue.put(None)
        self._thread.join(timeout=CLOSE_LIMIT)
        left = self._sent - self._answered + self._queue.qsize()
        if left > 0:
            self._warn(f"{left} lines of the request log were not known to be written when the gateway ended")

    def _start(self) -> subprocess.Popen[bytes]:
        folder, region = self.settings.folder, self.settings.region
        process = subprocess.Popen(
            command("deploy.serve.log_worker", str(folder), region),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            # Signals to the gateway's group are not for it: it ends when it has written everything.
            start_new_session=True,
        )
        threading.Thread(target=self._count, args=(process,), name="request-log-count", daemon=True).start()
        return process

    def _count(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            outcome, _, why = line.decode(errors="replace").strip().partition(" ")
            with self._lock:
                self._answered += 1
            self._counted(outcome)
            if outcome == "written":
                self._warned.discard("disk")
            elif "disk" not in self._warned:
                self._warned.add("disk")
                self._warn(f"the request log cannot be written ({why}); answers go on")

    def _feed(self) -> None:
        last = False
        while not last and (first := self._queue.get()) is not None:
            batch, size = [first], len(first)
            # What waits goes out in one piece.
            with contextlib.suppress(queue.Empty):
                while size < AT_ONCE:
                    if (data := self._queue.get_nowait()) is None:
                        last = True
                        break
                    batch.append(data)
                    size += len(data)
            self._send(batch)
        process = self._process
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(timeout=CLOSE_LIMIT - 5)
        except subprocess.TimeoutExpired:
            return
        deadline = time.monotonic() + 2
        while self._answered < self._sent and time.monotonic() < deadline:
            time.sleep(0.01)

    def _send(self, batch: list[bytes]) -> None:
        process = self._process
        assert process.stdin is not None
        with self._lock:
            self._sent += len(batch)
        try:
            process.stdin.write(b"".join(batch))
            process.stdin.flush()
        except OSError:
            self._restart()

    def _restart(self) -> None:
        """Begin again after the writing process ended; what it had not confirmed is lost and counted."""
        process = self._process
        process.kill()
        process.wait()
        time.sleep(RESTART_AFTER)
        with self._lock:
            lost, self._sent = self._sent - self._answered, self._answered
        for _ in range(lost):
            self._counted("lost")
        self._warn(
            f"the process that writes the request log ended; it is started again, up to {lost} lines are lost"
        )
        self._process = self._start()

    def _say(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._warn(text)


def read_salt(folder: Path) -> bytes:
    """The log directory's salt, made when the directory is first used; only its owner can read it."""
    path = folder / SALT_FILE
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        for _ in range(100):
            found = path.read_bytes()
            if len(found) == 64:
                return found
            time.sleep(0.02)  # another gateway is writing it
        raise OSError(0, f"{path} is damaged") from None
    with os.fdopen(descriptor, "wb") as handle:
        handle.write(made := secrets.token_hex(32).encode())
    return made
