"""Personal data that can be told by its form: e-mail addresses, phone numbers, IBANs, card numbers.

A form is not enough: phone numbers are checked by `phonenumbers` (Google's libphonenumber), IBANs and the Luhn digit of
cards by `python-stdnum`. Names and postal addresses have no form and are not found.

A text is read in windows that overlap by more than the longest finding, so that the work grows with its length alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from unshot.data.rows import Example, Message
from unshot.errors import InputError, OutsideError

EMAIL = re.compile(
    r"(?<![\w.+-])[\w.!#$%&'*+/=?^`{|}~-]{1,64}(?:@|%40)(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])"
)
IBAN = re.compile(r"(?<!\w)[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]){11,30}(?!\w)")
CARD = re.compile(r"(?<![\d.])[2-6]\d(?:[ -]?\d){10,16}\d(?!\d)")
# Full-width letters and digits, and other blanks and dashes, one sign for one: the places found stay where they are.
PLAIN = {0xFF01 + n: 0x21 + n for n in range(94)}
PLAIN |= dict.fromkeys([0xA0, 0x1680, *range(0x2000, 0x200E), 0x202F, 0x205F, 0x2060, 0x3000, 0xFEFF], 0x20)
PLAIN |= dict.fromkeys([0xAD, *range(0x2010, 0x2016), 0x2212], 0x2D)
DIGITS = re.compile(r"\d(?:[\s().+/-]{0,3}\d){6,}")


@dataclass(frozen=True)
class Found:
    """One piece of personal data: its kind and where in the text it stands."""

    kind: str
    start: int
    end: int


# Characters of a window, and by how much two overlap; a finding is shorter (an address at most 254, RFC 5321).
WINDOW, OVERLAP = 2000, 300


def check_region(region: str) -> str:
    """A country's two letters as the phone library takes them. Raises `InputError` for one that it does not know."""
    try:
        from phonenumbers import SUPPORTED_REGIONS
    except ImportError as error:
        raise OutsideError(_MISSING.format(error)) from None
    found = region.strip().upper()
    if found not in SUPPORTED_REGIONS:
        raise InputError(
            f"--phone-region is `{region}`; give a country's two letters (ISO 3166-1), e.g. US, GB, DE"
        )
    return found


def find(text: str, region: str = "US") -> list[Found]:
    """What `text` holds, in order, without overlaps. National phone numbers are read as of `region`."""
    found: list[Found] = []
    for start in range(0, max(1, len(text) - OVERLAP), WINDOW - OVERLAP):
        window = text[start : start + WINDOW].translate(PLAIN)
        whole = start + WINDOW >= len(text)
        for item in _find(window, region):
            # What touches the end of a window is found whole in the next one.
            if whole or item.start < WINDOW - OVERLAP:
                found.append(Found(item.kind, item.start + start, item.end + start))
    kept: list[Found] = []
    for item in sorted(found, key=lambda f: (f.start, -f.end)):
        if not kept or item.start >= kept[-1].end:
            kept.append(item)
    return kept


def _find(text: str, region: str) -> list[Found]:
    """What one window holds; where two readings overlap, an IBAN goes before a card, a card before a phone number."""
    found: list[Found] = []
    if "@" in text or "%40" in text:
        found += [Found("email", *m.span()) for m in EMAIL.finditer(text)]
    if DIGITS.search(text):
        for kind, items in (
            ("iban", _ibans(text)),
            ("card", _cards(text)),
            ("phone", _phones(text, region)),
        ):
            for start, end in items:
                if all(end <= f.start or start >= f.end for f in found):
                    found.append(Found(kind, start, end))
    return found


def redact(text: str, found: list[Found]) -> str:
    """`text` with each finding replaced by `[EMAIL]`, `[PHONE]`, `[IBAN]` or `[CARD]`."""
    parts, end = [], 0
    for item in found:
        parts += [text[end : item.start], f"[{item.kind.upper()}]"]
        end = item.end
    return "".join([*parts, text[end:]])


def redacted(text: str, region: str = "US") -> str:
    """`text` without the personal data that can be told by its form: what every writer of users' texts goes through."""
    return redact(text, find(text, region))


def scan_row(example: Example, region: str = "US") -> tuple[list[str], Example]:
    """The kinds found in a row's messages and answer, and the row with all of it replaced."""
    kinds: list[str] = []

    def clean(text: str) -> str:
        found = find(text, region)
        kinds.extend(f.kind for f in found)
        return redact(text, found)

    messages: tuple[Message, ...] = tuple({**m, "content": clean(m["content"])} for m in example.messages)
    answer = clean(example.answer) if example.answer is not None else None
    return kinds, replace(example, messages=messages, answer=answer) if kinds else example


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    iban = _stdnum().iban
    for match in IBAN.finditer(text):
        # A capital word behind the number looks like a part of it: shorten at blanks until it fits.
        value = match[0]
        while value:
            if iban.is_valid(value):
                yield match.start(), match.start() + len(value)
                break
            value = value.rpartition(" ")[0]


def _cards(text: str) -> Iterator[tuple[int, int]]:
    luhn = _stdnum().luhn
    for match in CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if 13 <= len(digits) <= 19 and luhn.is_valid(digits):
            yield match.span()


def _phones(text: str, region: str) -> Iterator[tuple[int, int]]:
    try:
        from phonenumbers import PhoneNumberMatcher
    except ImportError as error:
        raise OutsideError(_MISSING.format(error)) from None
    for match in PhoneNumberMatcher(text, region):
        yield match.start, match.end


class _Checks:
    """python-stdnum's modules, imported once."""

    def __init__(self) -> None:
        try:
            from stdnum import iban, luhn
        except ImportError as error:
            raise OutsideError(_MISSING.format(error)) from None
        self.iban, self.luhn = iban, luhn


_MISSING = (
    "looking for personal data needs phonenumbers and python-stdnum ({}); run `pip install 'unshot[tune]'`"
)
_checks: list[_Checks] = []


def _stdnum() -> _Checks:
    if not _checks:
        _checks.append(_Checks())
    return _checks[0]
