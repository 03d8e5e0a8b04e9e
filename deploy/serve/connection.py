"""uvicorn's connection with deadlines: a client that sends nothing, or half a request, does not stay."""

from __future__ import annotations

import asyncio
from typing import cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# The application answers a body that is late; a connection that is still waiting after that is cut.
BODY_GRACE = 2.0


class DeadlineProtocol(HttpToolsProtocol):
    """`read_timeout` seconds for a request's head, and from there for its body."""

    read_timeout: float = 10.0
    _deadline: asyncio.TimerHandle | None = None

    def _set(self, seconds: float) -> None:
        self._unset()
        self._deadline = self.loop.call_later(seconds, self._late)

    def _unset(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set(self.read_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._set(self.read_timeout)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._set(self.read_timeout + BODY_GRACE)

    def on_message_complete(self) -> None:
        self._unset()
        super().on_message_complete()


def with_deadline(seconds: float) -> type[asyncio.Protocol]:
    """The connection's class for `uvicorn.Config(http=...)`."""
    kind = type("Connection", (DeadlineProtocol,), {"read_timeout": seconds})
    return cast("type[asyncio.Protocol]", kind)
