"""Server-sent events, by the event stream interpretation of the WHATWG HTML standard, section 9.2.6.

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

from __future__ import annotations

from dataclasses import dataclass

BOM = b"\xef\xbb\xbf"
DONE = "[DONE]"


@dataclass(frozen=True, slots=True)
class Event:
    """A dispatched event: its data (lines joined by LF), its type and the last event id so far."""

    data: str
    type: str = "message"
    id: str = ""


class EventParser:
    """Takes a stream's bytes as they come and gives the events that they complete.

    Lines end with CR, LF or CRLF, wherever the pieces are cut, in the middle of a character too; a leading BOM and
    comments are passed over, several `data` lines make one event. An event that no blank line ends is dropped.
    """

    def __init__(self) -> None:
        # The line that is not complete yet, in the pieces in which it came, and bytes of the whole event so far.
        self._tail: list[bytes] = []
        self.pending = 0
        self._began = False
        self._after_cr = False
        self._data: list[bytes] = []
        self._type = b""
        self._id = b""

    def feed(self, piece: bytes) -> list[Event]:
        """Events that end in `piece`. `pending` counts the bytes of the one that is not complete yet."""
        self.pending += len(piece)
        if self._began and not self._after_cr and b"\n" not in piece and b"\r" not in piece:
            self._tail.append(piece)
            return []
        text = b"".join([*self._tail, piece])
        if not self._began:
            if len(text) < len(BOM) and BOM.startswith(text):
                self._tail = [text]
                return []
            self._began = True
            text = text.removeprefix(BOM)
        if self._after_cr and text:
            self._after_cr = False
            text = text.removeprefix(b"\n")
        if b"\r" in text:
            self._after_cr = text.endswith(b"\r")
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, tail = text.split(b"\n")
        self._tail = [tail]
        events = []
        for line in lines:
            if line:
                self._field(line)
            elif (event := self._dispatch()) is not None:
                events.append(event)
        if b"" in lines:
            last = len(lines) - lines[::-1].index(b"")
            self.pending = len(tail) + sum(map(len, lines[last:]))
        return events

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._type = value
        elif name == b"id" and b"\0" not in value:
            self._id = value

    def _dispatch(self) -> Event | None:
        data, kind = self._data, self._type
        self._data, self._type = [], b""
        if not data:
            return None
        return Event(_text(b"\n".join(data)), _text(kind) or "message", _text(self._id))


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")
