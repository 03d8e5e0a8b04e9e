"""Packages that a child process alone needs, in a folder of the cache, so that they clash with nothing here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from unshot.cache import made_once
from unshot.errors import OutsideError


def folder_of(name: str, requirements: Sequence[str], holds: str, why: str, instead: str) -> Path:
    """The folder with these exact packages, installed with one line on stderr where it is not there yet.

    `holds` is a path in it that shows that it is whole. `why` it is needed and what to do `instead` stand in the
    messages; raises `OutsideError` where pip fails.
    """

    def is_whole(folder: Path) -> bool:
        return (folder / holds).exists()

    def install(folder: Path) -> None:
        partial = folder.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        print(f"{why}; installing {', '.join(requirements)} into {folder}, once", file=sys.stderr, flush=True)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(partial)]
        done = subprocess.run([*pip, *requirements], capture_output=True, check=False)
        if done.returncode or not is_whole(partial):
            raise OutsideError(
                f"{why}; {', '.join(requirements)} cannot be installed ({last_line(done.stderr)}); {instead}"
            )
        shutil.rmtree(folder, ignore_errors=True)  # what is not whole
        partial.rename(folder)

    return made_once(name, is_whole, install)


def last_line(words: bytes) -> str:
    """The last line of what a child wrote on stderr."""
    lines = words.decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:200] if lines else "it said nothing"
