"""Stages run as a user would, each as a command line in a process of its own; what is there already stays."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from unshot.child import environment
from unshot.console import Output
from unshot.errors import EXIT_NO, EXIT_OK, OutsideError, UnshotError


def run_stage(
    name: str, arguments: list[str], folder: Path, out: Output, *, overwrite: bool
) -> dict[str, Any]:
    """Run `unshot ARGUMENTS --out FOLDER`; a stage whose directory is already there is left as it is.

    Exit code 1 with a directory is an answer, not a failure. Raises `OutsideError` where the stage failed, with its
    own exit code.
    """
    line = shlex.join(["unshot", *arguments, "--out", str(folder)])
    if folder.exists() and not overwrite:
        out.log(f"$ {line}\n  already there")
        return {"stage": name, "command": line, "seconds": 0.0, "exit_code": EXIT_OK}
    out.log(f"\n$ {line}")
    flags = ["--overwrite"] if overwrite else []
    flags += ["--json"] if out.json_mode else []
    flags += {-1: ["-q"], 1: ["-v"]}.get(out.verbosity, [])
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-P", "-m", "unshot", *arguments, "--out", str(folder), *flags],
        env=environment(),
        stdout=subprocess.DEVNULL if out.json_mode else None,
        check=False,
    )
    if process.returncode not in (EXIT_OK, EXIT_NO) or not folder.exists():
        error = OutsideError(
            f"`{line}` ended with exit code {process.returncode}; its own message stands above"
        )
        raise _with_code(error, process.returncode)
    seconds = round(time.perf_counter() - start, 1)
    return {"stage": name, "command": line, "seconds": seconds, "exit_code": process.returncode}


def _with_code(error: UnshotError, code: int) -> UnshotError:
    if 0 < code < 126:
        error.exit_code = code
    return error
