"""A file that crosses from one stage to another: a typed record with a version, written and read one way.

A subclass names its file and its version, and is listed in `DOCUMENTS`, from which `python -m
unshot.contracts.schemas docs/schemas` writes the JSON Schemas. Readers get exactly the fields that the record
declares: a file of another version is brought up by `upgrade` or refused by name, never read as something it is not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Self

from unshot.contracts.record import Record, RecordError
from unshot.data.files import read_text, write_text
from unshot.errors import InputError

# "module:class" of every document; strings, so that reading one imports none of the others.
DOCUMENTS: tuple[str, ...] = (
    "unshot.pipeline:PipelineRecord",
    "unshot.contracts.plan:PlanFile",
    "tune.data.label:LabelReport",
    "tune.data.review:LabelReview",
    "unshot.contracts.manifest:Manifest",
    "unshot.contracts.parity:Parity",
    "unshot.contracts.registry:State",
    "unshot.contracts.report:BenchReport",
    "unshot.contracts.request_log:Request",
    "unshot.contracts.request_log:Feedback",
    "unshot.contracts.task:Task",
    "unshot.contracts.evaluation:Evaluation",
)


class Document(Record, kw_only=True):
    """One JSON file. `version` is the file's own; a field that cannot be known is None, never a default figure."""

    FILE: ClassVar[str]
    VERSION: ClassVar[int] = 1
    # What to run to get a current file, for the message that refuses an old one.
    WRITTEN_BY: ClassVar[str] = "the stage that wrote it"

    version: int = 0

    def __post_init__(self) -> None:
        self.version = self.version or type(self).VERSION

    @classmethod
    def upgrade(cls, raw: dict[str, Any], version: int) -> dict[str, Any] | None:
        """The content of an older file in today's form, or None where it cannot be had from it."""
        return None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read `path` (the file, or the directory that holds it). Raises `InputError` naming the file and why."""
        if path.is_dir():
            path = path / cls.FILE
        try:
            raw = json.loads(read_text(path))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not valid JSON ({error}); run {cls.WRITTEN_BY} again") from None
        return cls.parse(raw, str(path))

    @classmethod
    def parse(cls, raw: Any, where: str) -> Self:
        """The record of a loaded JSON value. Raises `InputError` that begins with `where`."""
        if not isinstance(raw, dict):
            raise InputError(f"{where}: expected a JSON object; run {cls.WRITTEN_BY} again")
        try:
            json.dumps(raw, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{where}: holds half of a surrogate pair, which is no text; run {cls.WRITTEN_BY} again"
            ) from None
        version = raw.get("version", raw.get("format", 0))
        if not isinstance(version, int) or isinstance(version, bool):
            raise InputError(f"{where}: `version` is {version!r}; expected a whole number")
        if version > cls.VERSION:
            raise InputError(
                f"{where}: version {version} is newer than this unshot reads ({cls.VERSION}); upgrade unshot"
            )
        if version < cls.VERSION:
            try:
                upgraded = cls.upgrade(raw, version)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise InputError(
                    f"{where}: not a {cls.FILE} of version {version} ({type(error).__name__}: {error}); "
                    f"run {cls.WRITTEN_BY} again"
                ) from None
            if upgraded is None:
                raise InputError(
                    f"{where}: version {version} was written by an older unshot, this one reads {cls.VERSION}; "
                    f"run {cls.WRITTEN_BY} again"
                )
            raw = {**upgraded, "version": cls.VERSION}
        try:
            return cls.of(raw)
        except RecordError as error:
            raise InputError(f"{where}: {error}; run {cls.WRITTEN_BY} again") from None

    def write(self, path: Path) -> None:
        """Write the file by way of a temporary name; a directory gets it under its usual name."""
        write_text(path / self.FILE if path.is_dir() else path, self.to_json(indent=2) + "\n")
