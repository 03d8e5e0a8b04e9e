"""Records that are checked where they are read: the case file's tables, gates, logs, the registry's document.

msgspec checks and converts; here its errors become one line that names the key, its value and what is accepted.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta

from unshot.errors import nearest

LARGEST = sys.float_info.max
Positive = Annotated[float, Meta(gt=0, le=LARGEST)]
NotNegative = Annotated[float, Meta(ge=0, le=LARGEST)]
Share = Annotated[float, Meta(ge=0, le=1)]


WORDS = {
    "float": "a number", "int": "a whole number", "str": "a text", "bool": "true or false", "array": "a list",
    "object": "a table", "null": "nothing", "path": "a path",
}  # fmt: skip


def _encoded(value: Any) -> Any:
    """What msgspec cannot write: numpy's numbers as numbers (not as their text), paths and the like as texts."""
    return value.item() if hasattr(value, "item") else str(value)


class RecordError(ValueError):
    """What is wrong with a document, in one line."""


class Record(msgspec.Struct, forbid_unknown_fields=True):
    """A table with named fields; unknown keys and values of another type are errors."""

    @classmethod
    def of(cls, raw: Any) -> Self:
        """The record that dicts, lists and scalars describe. Raises `RecordError`."""
        return _checked(cls, lambda: msgspec.convert(raw, cls, dec_hook=_decoded, str_keys=True), lambda: raw)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The record of a JSON text. Raises `RecordError`."""
        return _checked(
            cls, lambda: msgspec.json.decode(text, type=cls, dec_hook=_decoded), lambda: json.loads(text)
        )

    def plain(self) -> dict[str, Any]:
        """The fields with only JSON types in them, copied; paths become strings."""
        found: dict[str, Any] = msgspec.to_builtins(self, enc_hook=_encoded, str_keys=True)
        return found

    def to_json(self, indent: int = 0) -> str:
        """JSON text, on one line unless `indent` is given; what no file can hold (half a surrogate pair) is `?`."""
        try:
            text = msgspec.json.encode(self, enc_hook=_encoded)
        except UnicodeEncodeError:
            text = json.dumps(self.plain(), ensure_ascii=False).encode("utf-8", "replace")
        return (msgspec.json.format(text, indent=indent) if indent else text).decode()

    def changed(self, **fields: Any) -> Self:
        """A copy with other values in these fields, which are not checked."""
        return msgspec.structs.replace(self, **fields)


def _decoded(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    raise TypeError(f"Expected `{kind.__name__.lower()}`, got `{type(value).__name__}`")


R = TypeVar("R", bound=Record)


def _checked(kind: type[R], make: Callable[[], R], raw: Callable[[], Any]) -> R:
    try:
        return make()
    except msgspec.ValidationError as error:
        try:
            given = raw()
        except (ValueError, RecursionError):  # what follows the wrong part is no JSON at all
            raise RecordError(_said(str(error))) from None
        raise RecordError(_explain(kind, str(error), given)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        text = str(error)
        raise RecordError(f"not valid JSON ({text[0].lower()}{text[1:]})") from None


def _explain(kind: type[Record], message: str, raw: Any) -> str:
    """`key` is VALUE; what is accepted: from msgspec's "what is accepted - at `$.key`"."""
    text, _, place = message.partition(" - at `")
    if "..." in place or place.startswith("key` in"):  # in a dict, whose keys msgspec does not say
        return f"{_said(text)} at {place.replace('`', '')}"
    path = re.findall(r"\w+", place.rstrip("`"))
    value, known = raw, kind
    accepted: Any = kind
    for part in path:
        try:
            value = value[int(part)] if isinstance(value, list) else value.get(part)
        except (
            AttributeError,
            IndexError,
            ValueError,
        ):  # a key stands twice, and the wrong value is the first
            return f"{_said(text)} at {place.rstrip('`')}"
        accepted = {f.name: f.type for f in msgspec.structs.fields(known)}.get(part)
        known = next((k for k in _parts(accepted) if _is_record(k)), known)
    key = f"`{'.'.join(path)}`" if path else "it"
    if unknown := re.match(r"Object contains unknown field `(.*)`", text):
        name = unknown[1]
        return f"unknown key `{'.'.join([*path, name])}`; {nearest(name, known.__struct_fields__)}"
    if missing := re.match(r"Object missing required field `(.*)`", text):
        return f"`{'.'.join([*path, missing[1]])}` is missing"
    choices = [a for k in _parts(accepted) if get_origin(k) is Literal for a in get_args(k)]
    if text.startswith("Invalid enum value") and choices:
        what = f"accepted: {', '.join(map(repr, choices))}"
    elif f"<= {LARGEST!r}" in text:
        what = "expected a finite number"
    else:
        what = _said(text)
    return f"{key} is {json.dumps(value, default=str)[:200]}; {what}"


def _said(text: str) -> str:
    """msgspec's "Expected `int | null`, got `str`" in a user's words."""
    text = re.sub(r"`([\w |]+)`", lambda m: " or ".join(WORDS.get(w, w) for w in m[1].split(" | ")), text)
    return text[0].lower() + re.sub(r"(\d)\.0\b", r"\1", text[1:])


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _parts(kind: Any) -> list[Any]:
    """A type and everything its unions, containers and annotations are made of."""
    inner = () if get_origin(kind) is Literal else get_args(kind)
    return [kind, *(part for one in inner for part in _parts(one))]
