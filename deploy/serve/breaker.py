"""A circuit breaker: after some failures in a row a back end gets no requests until a probe of it succeeds."""

from __future__ import annotations

import time

FAILURES = 5
COOLDOWN = 5.0
LONGEST = 60.0


class Breaker:
    """Closed (requests pass), open (none pass), half-open (one probe is under way). Times in seconds.

    Probes are the gateway's own requests: no user waits for a back end that is known to hang. Each failed probe
    doubles the wait for the next, up to a minute.
    """

    def __init__(self, *, failures: int = FAILURES, cooldown: float = COOLDOWN) -> None:
        self.limit = failures
        self.cooldown = cooldown
        self.failures = 0
        self.failed_probes = 0
        self.opened: float | None = None
        self.probing = False

    @property
    def state(self) -> str:
        if self.opened is None:
            return "closed"
        return "half-open" if self.probing else "open"

    @property
    def passes(self) -> bool:
        """Whether a user's request may go to the back end."""
        return self.opened is None

    def success(self) -> None:
        """A request or a probe was answered."""
        self.failures = self.failed_probes = 0
        self.opened, self.probing = None, False

    def failure(self) -> None:
        """A request failed; one that was under way when the breaker opened counts no more."""
        self.failures += 1
        if self.opened is None and self.failures >= self.limit:
            self.opened = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for a probe; the caller then makes one and reports how it went."""
        if self.opened is None or self.probing:
            return False
        wait = min(self.cooldown * 2**self.failed_probes, LONGEST)
        return time.monotonic() >= self.opened + wait

    def probe(self) -> None:
        """A probe starts."""
        self.probing = True

    def probe_failed(self) -> None:
        """The probe failed: open for longer."""
        self.failed_probes += 1
        self.opened, self.probing = time.monotonic(), False
