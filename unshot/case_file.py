"""Reading the case file: its keys by name, the file with the flags over it, and texts that may stand in files.

Flags override the file. Paths in the file are relative to the file. Errors name the file, the key and the accepted
values.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import msgspec.inspect

from unshot.case import Case
from unshot.console import Output
from unshot.contracts.record import RecordError
from unshot.data.rows import read_text
from unshot.errors import InputError, nearest

DEFAULT_FILE = Path("unshot.toml")
# Seeds are the largest numbers that anybody means.
MOST = 2**32 - 1


class Key(msgspec.Struct, frozen=True):
    """One key of the case file: its dotted name, type, default (None: no default) and what is said about it."""

    name: str
    kind: msgspec.inspect.Type
    default: Any
    text: str
    init: Any = None
    sample: Any = None
    text_or_file: bool = False
    # "module:object" whose items are the accepted values: a registry.
    choices: str | None = None
    # A name, or a directory.
    name_or_path: bool = False
    # KIND:PATH, or an address.
    spec: bool = False

    @property
    def optional(self) -> bool:
        """Whether nothing may stand there."""
        return any(isinstance(k, msgspec.inspect.NoneType) for k in _alternatives(self.kind))

    @property
    def inner(self) -> msgspec.inspect.Type:
        """The type without the `None` of an optional key."""
        return next(k for k in _alternatives(self.kind) if not isinstance(k, msgspec.inspect.NoneType))

    def accepted(self) -> tuple[str, ...]:
        """The values that an enumerated key accepts; empty for any other."""
        if self.choices is not None:
            module, _, attribute = self.choices.partition(":")
            return tuple(getattr(importlib.import_module(module), attribute))
        return (
            tuple(map(str, self.inner.values)) if isinstance(self.inner, msgspec.inspect.LiteralType) else ()
        )


def _alternatives(kind: msgspec.inspect.Type) -> tuple[msgspec.inspect.Type, ...]:
    while isinstance(kind, msgspec.inspect.Metadata):
        kind = kind.type
    return kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)


@functools.cache
def keys() -> dict[str, Key]:
    """Every key of the case file by its dotted name (`tune.rank`), in the file's order."""
    return {key.name: key for key in _keys(Case, "")}


def _keys(record: type[msgspec.Struct], prefix: str) -> Iterator[Key]:
    info = msgspec.inspect.type_info(record)
    assert isinstance(info, msgspec.inspect.StructType)
    values = record()
    for item in info.fields:
        name = f"{prefix}{item.name}"
        if isinstance(item.type, msgspec.inspect.StructType):
            yield from _keys(item.type.cls, f"{name}.")
            continue
        if isinstance(item.type, msgspec.inspect.DictType):  # tables of the user's own names
            continue
        assert isinstance(item.type, msgspec.inspect.Metadata), f"{name}: say what it is about"
        text = (item.type.extra_json_schema or {})["description"]
        yield Key(name, item.type, getattr(values, item.name), text, **(item.type.extra or {}))


def load_case(path: Path | None, given: Mapping[str, Any] | None = None, out: Output | None = None) -> Case:
    """Read the case file and put the flags over it.

    `path` None means `./unshot.toml` if it is there, else an empty case. `given` holds flags by the key that they
    stand for (`tune.rank`); None is a flag that was not given. What was read from where is logged. Raises `InputError`.
    """
    raw: dict[str, Any] = {}
    log = (out or Output(verbosity=-1)).log
    if path is None and DEFAULT_FILE.is_file():
        path = DEFAULT_FILE
        log(f"case: {path}")
    if path is not None:
        import tomllib

        try:
            raw = tomllib.loads(read_text(path))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not valid TOML ({error})") from None
        raw = _read(raw, path, log)
    over = {name: value for name, value in (given or {}).items() if value is not None}
    if over:
        raw = _checked(raw, str(path)).plain()
    for name, value in over.items():
        table = raw
        *sections, last = name.split(".")
        for section in sections:
            table = table.setdefault(section, {})
        if isinstance(value, FileText):
            log(f"{last}: {value.origin}")
        table[last] = str(value) if isinstance(value, str | Path) else value
    return _checked(raw, "command line" if over else str(path))


def _read(raw: dict[str, Any], path: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """The file's tables with paths made relative to it, files read whose texts are meant, and lists of one."""
    for name, key in keys().items():
        *sections, last = name.split(".")
        table: Any = raw
        for section in sections:
            table = table.get(section) if isinstance(table, dict) else None
        value = table.get(last) if isinstance(table, dict) else None
        _sound(value, key, path)
        if not isinstance(value, str):
            continue
        if key.text_or_file:
            try:
                text = text_or_file(value, path.parent)
            except InputError as error:
                raise InputError(f"{path}: `{name}`: {error}") from None
            if isinstance(text, FileText):
                log(f"{name}: {text.origin}")
            table[last] = str(text)
        elif isinstance(key.inner, msgspec.inspect.CustomType) or (
            key.name_or_path and (value.startswith(("./", "../", "~")) or (path.parent / value).is_dir())
        ):
            table[last] = str(path.parent / home(value))
        elif key.spec and ":" in value and "://" not in value:
            kind, _, file = value.partition(":")
            table[last] = f"{kind}:{path.parent / home(file)}"
        elif isinstance(key.inner, msgspec.inspect.ListType):
            table[last] = [value]
    own = raw.get("model")
    for row in own.values() if isinstance(own, dict) else ():
        if isinstance(row, dict) and isinstance(row.get("config"), str):
            row["config"] = str(path.parent / home(row["config"]))
    return raw


def _sound(value: object, key: Key, path: Path) -> None:
    """Refuse what no key means: an empty name, a NUL character, a number that overflows further in."""
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, str) and "\0" in one:
            raise InputError(f"{path}: `{key.name}` holds a NUL character")
        if isinstance(one, str) and not one.strip() and not key.text_or_file:
            raise InputError(f"{path}: `{key.name}` is empty; leave it out, or give a value")
        if isinstance(one, int) and abs(one) > MOST:
            raise InputError(f"{path}: `{key.name}` is too large; expected a number of at most {MOST:,}")


def home(text: str) -> Path:
    """A path with `~` written out. Raises `InputError` for the home of nobody."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError(f"{text}: there is no such home directory") from None


def _checked(raw: dict[str, Any], where: str) -> Case:
    try:
        case = Case.of(raw)
    except RecordError as error:
        raise InputError(f"{where}: {error}") from None
    for name, key in keys().items():
        if key.choices is None:
            continue
        section, _, last = name.rpartition(".")
        table = getattr(case, section)
        value = getattr(table, last)
        if value is None:
            continue
        found = [one.strip().lower() for one in (value if isinstance(value, list) else [value])]
        for one in found:
            if one not in key.accepted():
                raise InputError(f"{where}: `{name}` is {one!r}; {nearest(one, key.accepted())}")
        setattr(table, last, found if isinstance(value, list) else found[0])
    return case


class FileText(str):
    """A text that was read from the file `path`; `origin` says so."""

    path: Path = Path()
    origin: str = ""


# A value of one line that ends so is the name of a file, not a text; of a single word, any ending is one.
_FILE_NAME = re.compile(
    r"\.(txt|text|md|markdown|rst|prompt|tmpl|template|tpl|jinja2?|j2|mustache|jsonl?|ya?ml|toml|csv|tsv|html?|xml)$"
    r"|^\S*\w\.[a-z]\w{0,7}['\"]?$",
    re.IGNORECASE,
)
LONGEST_PATH = 1024


def text_or_file(value: str, folder: Path = Path()) -> str:
    """The text that a flag or a key means: of the file that the value names, else the value itself.

    It names a file if that is there (relative to `folder`), or if it looks like a path: it begins with `/`, `./`,
    `../`, `~/` or `@`, is one line that ends as text files do (.txt, .md, ...), one word with an ending, or lies in a
    directory that is there. Raises `InputError` for a value that looks like a path to no file, and for a file that is
    empty or not text. A file's text comes as `FileText`.
    """
    marked = value.startswith("@")
    name = value[1:] if marked else value
    one_line = "\n" not in value and 0 < len(name) <= LONGEST_PATH
    looks = one_line and (
        marked or name.startswith(("/", "./", "../", "~/")) or _FILE_NAME.search(name.rstrip()) is not None
    )
    if not one_line or not name.strip():
        return value
    path = folder / home(name)
    try:
        there, directory = path.is_file(), path.is_dir()
    except (OSError, ValueError):  # too long for a name, or with a NUL: no path
        there = directory = False
    if not there:
        if not (looks or ("/" in name and not re.search(r"\s", name) and path.parent.is_dir())):
            return value
        what = "is a directory; give a file" if directory else "no such file"
        raise InputError(f"{path}: {what} (a text that looks like a path: put a line break at its end)")
    text = FileText(read_text(path).strip())
    if not text:
        raise InputError(f"{path}: empty; it needs a text")
    text.path, text.origin = path, f"read from {path} ({len(text):,} characters)"
    return text
