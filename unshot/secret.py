"""Secrets stay out of everything that is written: the one place that takes them out of texts and of settings.

A key that was read from the environment is remembered here for the life of the process; every file that unshot writes,
and every line that it prints, goes through `hide`. Settings whose name says that they hold a secret are never written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar
from urllib.parse import urlsplit

SHOWN = "[SECRET]"
# Shorter values stand in too many texts by chance.
SHORTEST = 6
NAMES = re.compile(
    r"api[_-]?key|(?:^|[_-])key$|^key$|token$|secret|passw|passphrase|authori[sz]ation|credential|bearer|cookie|signature"
    r"|(?:^|[_-])(?:auth|pwd|sig|session(?:[_-]?id)?)$",
    re.IGNORECASE,
)
# Their names end like a secret's, and they are none.
NOT_SECRET = re.compile(
    r"(?:^|[_-])(?:bos|eos|pad|unk|sep|cls|mask|stop|end|start|special)[_-]?token$", re.IGNORECASE
)
# Also with one slash, as a URL looks that was given where a path is expected.
IN_URL = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*://|https?:/)(?P<user>[^\s/@?#\"'<>]+@)?(?P<rest>[^\s\"'<>]*)",
    re.IGNORECASE,
)
QUERY = re.compile(r"(?P<name>[?&;#](?:[^=&#\s\"'<>]*))=(?P<value>[^&#\s\"'<>]*)")
_known: set[str] = set()

T = TypeVar("T")


def remember(value: str) -> str:
    """Take note of a secret, so that it is never written; returns it."""
    if len(value) >= SHORTEST:
        _known.add(value)
    return value


# A value that was made to be no word: a known prefix, or long, without blanks, letters and digits mixed.
MADE = re.compile(
    r"(?:sk-|hf_|gh[pousr]_|xox[abp]-|AKIA|eyJ|Bearer )\S{6,}|(?=\S*\d)(?=\S*[A-Za-z])[^\s/.:{}\[\]]{16,}"
)


def remember_in(value: object, name: str = "") -> None:
    """Take note of the secrets in a JSON value: by the name that holds a text, or by the text's looks."""
    if isinstance(value, str) and (is_secret(name) or MADE.fullmatch(value)):
        remember(value)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            remember_in(one, str(key))
    elif isinstance(value, list | tuple):
        for one in value:
            remember_in(one, name)


def hide(text: str) -> str:
    """`text` without the secrets that are known, and without credentials in URLs."""
    for value in _known:
        if value in text:
            text = text.replace(value, SHOWN)
    return IN_URL.sub(_url, text) if ":/" in text else text


def _url(match: re.Match[str]) -> str:
    user = f"{SHOWN}@" if match["user"] else ""

    def query(part: re.Match[str]) -> str:
        return f"{part['name']}={SHOWN}" if is_secret(part["name"][1:]) else part[0]

    return f"{match['scheme']}{user}{QUERY.sub(query, match['rest'])}"


def is_secret(name: str) -> bool:
    """Whether a setting's name says that its value is one."""
    return bool(NAMES.search(name)) and not NOT_SECRET.search(name)


def hidden(value: T) -> T:
    """Lists, dicts and texts of a JSON value without secrets; a copy, `value` stays as it is."""
    if isinstance(value, str):
        return hide(value)  # type: ignore[return-value]
    if isinstance(value, Mapping):
        return {  # type: ignore[return-value]
            k: SHOWN if isinstance(v, str) and is_secret(str(k)) else hidden(v) for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(hidden(v) for v in value)  # type: ignore[return-value]
    return value


def without_credentials(url: str) -> str:
    """A URL for a message: no user, password, query or fragment."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return url.partition("?")[0].rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" if parts.scheme else f"{host}{parts.path}"
