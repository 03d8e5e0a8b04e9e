"""Stages run as a user would, each as a command line in a process of its own; what is there already stays."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

from unshot.child import environment
from unshot.console import Output
from unshot.contracts.record import Record
from unshot.errors import EXIT_NO, EXIT_OK, OutsideError


class StageRun(Record):
    """A stage that was run, or was there already (`seconds` 0)."""

    stage: str
    command: str
    seconds: float
    exit_code: int
    was_there: bool = False


def run_stage(
    name: str,
    arguments: list[str],
    folder: Path,
    out: Output,
    *,
    overwrite: bool,
    option: str = "--out",
    last: Path | None = None,
) -> StageRun:
    """Run `unshot ARGUMENTS --out FOLDER`; a stage whose directory is already there is left as it is.

    `last` is what a stage writes last, if that is not the whole directory at once; `option` is what the stage calls its
    directory. Exit code 1 with a directory is an answer, not a failure. Raises `OutsideError` if the stage failed, with
    its own exit code.
    """
    line = shlex.join(["unshot", *arguments, option, str(folder)])
    if (last or folder).exists() and not overwrite:
        out.log(f"$ {line}\n  already there")
        return StageRun(name, line, 0.0, EXIT_OK, was_there=True)
    out.log(f"\n$ {line}")
    flags = ["--overwrite"] if overwrite and option == "--out" else []
    flags += ["--json"] if out.json_mode else []
    flags += {-1: ["-q"], 1: ["-v"]}.get(out.verbosity, [])
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-P", "-m", "unshot", *arguments, option, str(folder), *flags],
        env=environment(),
        stdout=subprocess.DEVNULL if out.json_mode else None,
        check=False,
    )
    if process.returncode not in (EXIT_OK, EXIT_NO) or not folder.exists():
        error = OutsideError(
            f"`{line}` ended with exit code {process.returncode}; its own message stands above"
        )
        if 0 < process.returncode < 126:
            error.exit_code = process.returncode
        raise error
    return StageRun(name, line, round(time.perf_counter() - start, 1), process.returncode)
