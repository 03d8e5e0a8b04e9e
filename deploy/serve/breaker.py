"""A circuit breaker: after some failures in a row a back end gets no requests until a probe of it succeeds."""

from __future__ import annotations

import time

from deploy.serve.shared import Cell

FAILURES = 5
COOLDOWN = 5.0
LONGEST = 60.0
# Seconds after which a probe counts as lost with the process that made it; a probe ends before.
PROBE_LOST = 30.0
FAILED, OPENED, FAILED_PROBES, PROBING = range(4)


class Breaker:
    """Closed (requests pass), open (none pass), half-open (one probe is under way). Times in seconds.

    Probes are the gateway's own requests: no user waits for a back end that is known to hang. Each failed probe
    doubles the wait for the next, up to a minute. All workers of a gateway see one state, in `cell`.
    """

    def __init__(
        self, cell: Cell | None = None, *, failures: int = FAILURES, cooldown: float = COOLDOWN
    ) -> None:
        self.limit = failures
        self.cooldown = cooldown
        self._cell = cell or Cell()
        self._facts = self._cell.facts

    @property
    def failed_probes(self) -> int:
        """Probes that failed since the last answer."""
        return int(self._facts[FAILED_PROBES])

    @property
    def state(self) -> str:
        if self.passes:
            return "closed"
        return "half-open" if self._probing else "open"

    @property
    def passes(self) -> bool:
        """Whether a user's request may go to the back end."""
        return not self._facts[OPENED]

    @property
    def _probing(self) -> bool:
        return time.monotonic() < self._facts[PROBING] + PROBE_LOST if self._facts[PROBING] else False

    def success(self) -> None:
        """A request or a probe was answered."""
        if any(self._facts[: PROBING + 1]):
            with self._cell.locked():
                for fact in (FAILED, OPENED, FAILED_PROBES, PROBING):
                    self._facts[fact] = 0.0

    def failure(self) -> None:
        """A request failed; one that was under way when the breaker opened counts no more."""
        with self._cell.locked():
            self._facts[FAILED] += 1
            if self.passes and self._facts[FAILED] >= self.limit:
                self._facts[OPENED] = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for a probe; the caller then makes one and reports how it went."""
        if self.passes or self._probing:
            return False
        wait = min(self.cooldown * 2**self.failed_probes, LONGEST)
        return time.monotonic() >= self._facts[OPENED] + wait

    def probe(self) -> bool:
        """Whether the caller is the one to probe: the others must not, until it has."""
        with self._cell.locked():
            if not self.due():
                return False
            self._facts[PROBING] = time.monotonic()
            return True

    def probe_failed(self) -> None:
        """The probe failed: open for longer."""
        with self._cell.locked():
            self._facts[FAILED_PROBES] += 1
            self._facts[OPENED], self._facts[PROBING] = time.monotonic(), 0.0
