"""Files of rows: text, JSONL, JSON, CSV, Parquet and Arrow, compressed or not, one by one or as a pattern.

Everything but a `.json` list is streamed: a file of any length costs the memory of its longest row.
"""

from __future__ import annotations

import codecs
import csv
import fcntl
import hashlib
import io
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from unshot.errors import InputError, OutsideError
from unshot.secret import hide

# A CSV field may be as long as the longest document, which is more than the csv module's 128 KiB.
FIELD_LIMIT = 16 * 2**20
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# Keys of a JSON object that is one row, not a wrapper round a list of rows.
ROW_KEYS = {"messages", "conversations", "prompt", "instruction", "question", "text"}


class Problem(ValueError):
    """What is wrong with one row, without the place, which the reader adds."""


@dataclass(frozen=True)
class Place:
    """Where a row stands: the file, and its line, or its row where the format has no lines (JSON lists, Parquet)."""

    file: Path
    line: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.line}"


Raw = tuple[Place, object]


def plain_file(path: Path) -> Path:
    """The path, if it is that of a file with an end. Raises `InputError`: reading a pipe or a device may never end."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a directory; give a file")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: is a pipe or a device; save what comes out of it in a file, and give that")
    return path


def read_text(path: Path) -> str:
    """A UTF-8 text file's content; `InputError` where it cannot be read, or is not UTF-8."""
    try:
        return plain_file(path).read_bytes().decode("utf-8-sig")
    except PermissionError:
        raise InputError(f"{path}: not readable (permission denied)") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: {not_utf8(error.object, error.start)}") from None


def read_object(path: Path, *, wanted: str = "expected a JSON object", advice: str = "") -> dict[str, Any]:
    """A JSON file's object; `InputError` for anything else, with what was `wanted` and `advice` behind it."""
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}){advice}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: {wanted}{advice}")
    return found


def optional_object(path: Path, *, advice: str = "") -> dict[str, Any]:
    """A JSON file's object, empty where there is no such file; `InputError` for anything else that stands there."""
    return read_object(path, advice=advice) if os.path.lexists(path) else {}


def not_utf8(raw: bytes, at: int) -> str:
    """What to do about a text that is not UTF-8."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "not UTF-8 but UTF-16; convert it, e.g. `iconv -f utf-16 -t utf-8`"
    return f"not UTF-8 (byte {at}); convert it, e.g. `iconv -f latin1 -t utf-8`"


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSONL (UTF-8, one object a line)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", errors="backslashreplace") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def data_files(path: Path) -> list[Path]:
    """The files that a path names: itself, those that match it as a pattern, those of a split or of `datasets`.

    Raises `InputError` where there is none.
    """
    if path.is_dir():
        return _dataset_files(path)
    if path.exists():
        return [plain_file(path)]
    pattern = str(path)
    if re.search(r"[*?\[]", pattern):
        import glob

        found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))  # noqa: PTH207
        found = [name for name in found if name.is_file()]
        if not found:
            raise InputError(f"{path}: no file matches")
        return found
    return [plain_file(path)]  # which says why it is none


def split_parts(folder: Path) -> list[Path]:
    """Train, validation and test rows in a directory of `data split`."""
    return [folder / f"{name}.jsonl" for name in ("train", "validation", "test")]


def is_split(folder: Path) -> bool:
    """Whether a directory holds rows that are split already, as `data split` leaves them."""
    train, _, test = split_parts(folder)
    return train.is_file() and test.is_file()


def _dataset_files(folder: Path) -> list[Path]:
    """The parts of a directory of `data split`, the Arrow files of one that `datasets` saved.

    `InputError` for any other directory.
    """
    if is_split(folder):
        return [path for path in split_parts(folder) if path.is_file()]
    if (folder / "dataset_dict.json").is_file():
        names = sorted(p.name for p in folder.iterdir() if p.is_dir())
        raise InputError(
            f"{folder}: holds the splits {', '.join(names)}; give one of them, e.g. {folder / (names or ['train'])[0]}"
        )
    if not (folder / "state.json").is_file():
        raise InputError(f"{folder}: is a directory; give a file, or a pattern such as '{folder}/*.jsonl'")
    try:
        state = json.loads(read_text(folder / "state.json"))
        return [folder / entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{folder / 'state.json'}: not what `datasets` saves; save the data again") from None


def kind_of(path: Path) -> str:
    """`csv`, `tsv`, `json`, `parquet`, `arrow` or `jsonl` (all others), by the name without its compression."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    kind = name.suffix.lower().removeprefix(".")
    if kind in ("arrow", "feather"):
        return "arrow"
    return kind if kind in ("csv", "tsv", "json", "parquet") else "jsonl"


def column_names(path: Path) -> Collection[str]:
    """The columns of a file's first row; none where that is no object or is a conversation."""
    _, first = next(raw_rows(path), (None, None))
    return first.keys() if isinstance(first, dict) and "messages" not in first else ()


def raw_rows(path: Path) -> Iterator[Raw]:
    """Every row of the file or files, as a value or as the `Problem` that it is not one.

    Raises `InputError` where a file itself cannot be read.
    """
    for file in data_files(path):
        readers = {"csv": _csv, "tsv": _csv, "json": _json, "jsonl": _jsonl}
        kind = kind_of(file)
        try:
            if kind in ("parquet", "arrow"):
                yield from _arrow(file, kind)
                continue
            with closing(_open(file)) as handle:
                yield from readers[kind](file, handle)
        except PermissionError:
            raise InputError(f"{file}: not readable (permission denied)") from None
        except (EOFError, OSError, zlib.error) as error:
            raise InputError(f"{file}: cannot be read to its end ({error}); is it whole?") from None


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        import gzip

        return cast("IO[bytes]", gzip.open(path))
    if suffix == ".bz2":
        import bz2

        return cast("IO[bytes]", bz2.open(path))
    if suffix == ".xz":
        import lzma

        return cast("IO[bytes]", io.BufferedReader(_Lzma(lzma.open(path))))
    if suffix == ".zst":
        arrow = _pyarrow(path)
        return cast(
            "IO[bytes]", io.BufferedReader(arrow.CompressedInputStream(arrow.OSFile(str(path)), "zstd"))
        )
    return path.open("rb")


class _Lzma(io.RawIOBase):
    """An .xz stream whose damage is an `OSError`, as it is with the other compressions."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import lzma

        try:
            return int(self._stream.readinto(buffer))
        except lzma.LZMAError as error:
            raise OSError(str(error)) from None

    def close(self) -> None:
        self._stream.close()
        super().close()


def _jsonl(path: Path, handle: IO[bytes]) -> Iterator[Raw]:
    for number, raw in enumerate(handle, start=1):
        place = Place(path, number)
        if number == 1:
            if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise InputError(f"{path}: {not_utf8(raw, 0)}")
            if raw.startswith(b"PK\x03\x04"):
                raise InputError(f"{path}: a workbook or another ZIP archive; save its sheet as CSV (UTF-8)")
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if not raw.strip():
            continue
        try:
            yield place, json.loads(raw.decode(), object_pairs_hook=_once)
        except UnicodeDecodeError as error:
            yield place, Problem(not_utf8(raw, error.start).replace("(byte", "(byte of the line"))
        except Problem as problem:
            yield place, problem
        except (ValueError, RecursionError) as error:
            yield place, Problem(f"not valid JSON ({error}); each line is one object")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of which no key stands twice: of two values one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Problem(f"the key `{twice}` stands twice; keep one of them")
    return found


def _json(path: Path, handle: IO[bytes]) -> Iterator[Raw]:
    raw = handle.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: {not_utf8(raw, error.start)}") from None
    try:
        loaded = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        first = next((line for line in text.split("\n") if line.strip()), "")
        if _is_object(first):  # JSON Lines under the name of JSON
            yield from _jsonl(path, io.BytesIO(raw))
            return
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if isinstance(loaded, dict) and ROW_KEYS & loaded.keys():
        loaded = [loaded]
    elif isinstance(loaded, dict):
        lists = [k for k, v in loaded.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
        if len(lists) > 1:
            raise InputError(
                f"{path}: holds several lists ({', '.join(lists)}); save the one to read by itself"
            )
        loaded = (
            loaded[lists[0]] if lists else next((v for v in loaded.values() if isinstance(v, list)), None)
        )
    if not isinstance(loaded, list):
        raise InputError(f"{path}: expected a JSON list of rows")
    for number, row in enumerate(loaded, start=1):
        yield Place(path, number, "row"), row


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _csv(path: Path, handle: IO[bytes]) -> Iterator[Raw]:
    csv.field_size_limit(FIELD_LIMIT)
    # Bytes that are no UTF-8 pass as surrogates, so that they cost their row and not the file.
    text = io.TextIOWrapper(handle, encoding="utf-8-sig", errors="surrogateescape", newline="")
    # Strict: a quote that is never closed must not swallow the rows behind it in silence.
    reader = csv.reader(text, delimiter="\t" if kind_of(path) == "tsv" else ",", strict=True)
    header: list[str] | None = None
    while True:
        place = Place(path, reader.line_num + 1)
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise InputError(f"{place}: not valid CSV ({error})") from None
            yield place, Problem(f"not valid CSV ({error}); double the quotes inside a quoted field")
            continue
        if header is None:
            if fields:
                header = _header(path, fields)
        elif fields:
            if len(fields) != len(header):
                hint = "tabs" if kind_of(path) == "tsv" else "commas"
                yield (
                    place,
                    Problem(
                        f"{len(fields)} fields, the header has {len(header)}; quote fields that hold {hint}"
                    ),
                )
            else:
                yield place, dict(zip(header, fields, strict=True))


def _header(path: Path, fields: list[str]) -> list[str]:
    twice = sorted({name for name in fields if fields.count(name) > 1})
    if twice:
        raise InputError(
            f"{path}: several columns are named {', '.join(f'`{n}`' for n in twice)}; rename them"
        )
    if any("\x00" in name or name.startswith("\udcff") for name in fields):
        raise InputError(f"{path}: {not_utf8(codecs.BOM_UTF16_LE, 0)}")
    if any("\udc80" <= sign <= "\udcff" for name in fields for sign in name):
        raise InputError(f"{path}, line 1: not UTF-8; convert the file, e.g. `iconv -f latin1 -t utf-8`")
    other = next((sign for sign in (";", "\t", "|") if len(fields) == 1 and sign in fields[0]), None)
    if other:
        raise InputError(
            f"{path}: the columns are separated by {other!r}, not by what its name says; save it with commas (.csv) "
            "or tabs (.tsv)"
        )
    return fields


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise OutsideError(
            f"{path}: reading it needs pyarrow ({error}); run `pip install 'unshot[parquet]'`"
        ) from None
    return pyarrow


def _arrow(path: Path, kind: str) -> Iterator[Raw]:
    """Rows of a Parquet file, or of an Arrow file or stream; class numbers of `datasets` become their names."""
    arrow = _pyarrow(path)
    number = 0
    try:
        if kind == "parquet":
            import pyarrow.parquet

            file = pyarrow.parquet.ParquetFile(path)
            schema, batches = file.schema_arrow, file.iter_batches(1024)
        else:
            import pyarrow.ipc

            source = arrow.memory_map(str(path))
            try:
                opened = pyarrow.ipc.open_file(source)
                batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
            except arrow.ArrowInvalid:
                opened = pyarrow.ipc.open_stream(arrow.memory_map(str(path)))
                batches = iter(opened)
            schema = opened.schema
        names = _class_names(schema)
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                for column, labels in names.items():
                    if isinstance(row[column], int):  # `datasets` writes -1 where there is no label
                        row[column] = labels[row[column]] if 0 <= row[column] < len(labels) else None
                yield Place(path, number, "row"), row
    except arrow.ArrowException as error:
        raise InputError(f"{path}: not a whole {kind.capitalize()} file ({error})") from None


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Columns of `datasets`' type ClassLabel with the names of their numbers."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: kind["names"]
            for name, kind in features.items()
            if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def is_missing(value: object) -> bool:
    """Whether a value is none: null, or NaN as a number."""
    return value is None or (isinstance(value, float) and value != value)


def write_text(path: Path, text: str) -> None:
    """Write `text`, without known secrets, to `path` by way of a temporary name, flushed to disk before the rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as handle:
        handle.write(hide(text))
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def json_digest(value: Any) -> str:
    """Hex SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def append_line(path: Path, line: bytes, *, flush: bool = False) -> None:
    """Append one line among other writers of the file, whole or not at all; readable by its owner alone.

    Raises `OSError`, and nothing of the line stays. With `flush` it is on the disk when this returns; else a power cut
    may lose the last seconds, a crash does not.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        _append(descriptor, line, flush=flush)
    finally:
        os.close(descriptor)


def append_after(path: Path, make: Callable[[list[str]], str]) -> None:
    """Append the line that `make` makes of those that stand there, no other writer in between; flushed to the disk.

    A torn last line is cut off first. Raises `OSError`, and `ValueError` where the file is not UTF-8.
    """
    with path.open("a+b") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        _mend(handle)
        handle.seek(0)
        line = make([found for found in handle.read().decode().split("\n") if found.strip()])
        _append(handle.fileno(), f"{line}\n".encode(), flush=True)


def _append(descriptor: int, line: bytes, *, flush: bool) -> None:
    before = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, line)
        while written < len(line):
            written += os.write(descriptor, line[written:])
        if flush:
            os.fsync(descriptor)
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, before)
        raise


def mend(path: Path) -> bool:
    """Cut a torn last line off; whether there was one."""
    with path.open("r+b") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        return _mend(handle)


def _mend(handle: IO[bytes]) -> bool:
    size = end = handle.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        handle.seek(start)
        position = handle.read(end - start).rfind(b"\n")
        if position >= 0:
            end = start + position + 1
            break
        end = start
    if end == size:
        return False
    handle.truncate(end)
    return True
