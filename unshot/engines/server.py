"""A llama.cpp server as a child process: which one is installed, how it is started, waited for, and ended."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from unshot.errors import OutsideError

START_LIMIT = 120.0
CONTEXT = 8192
# As the engine in process has them (unshot/engines/llama_cpp.py, which imports llama.cpp).
BATCH, MICRO_BATCH = 2048, 512
PR_SET_PDEATHSIG = 1


def server_command(
    path: Path, port: int, threads: int, concurrency: int, *, context: int = CONTEXT, logprobs: bool = True
) -> list[str]:
    """The command line of a server that is installed: `llama-server`, else llama-cpp-python's own.

    The first answers `concurrency` requests at once, the second one after the other; there `logprobs` keeps the logits
    of every prompt token, for which a long prompt pays. Raises `OutsideError` where none is installed.
    """
    binary = shutil.which("llama-server")
    if binary:
        return [
            binary, "-m", str(path), "--port", str(port), "--host", "127.0.0.1", "-t", str(threads),
            "-c", str(context * concurrency), "-np", str(concurrency),
        ]  # fmt: skip
    if importlib.util.find_spec("uvicorn") and importlib.util.find_spec("sse_starlette"):
        # By default it cuts a stream short when the next request comes.
        return [
            sys.executable, "-P", "-m", "llama_cpp.server", "--model", str(path), "--host", "127.0.0.1",
            "--port", str(port), "--n_ctx", str(context), "--n_threads", str(threads),
            "--n_threads_batch", str(threads), "--n_batch", str(BATCH), "--n_ubatch", str(MICRO_BATCH),
            "--logits_all", str(logprobs).lower(), "--interrupt_requests", "false",
        ]  # fmt: skip
    raise OutsideError(
        "a GGUF file needs a llama.cpp server; put llama-server on the PATH or "
        "pip install 'llama-cpp-python[server]'"
    )


def start(command: list[str], log: Any) -> subprocess.Popen[bytes]:
    """Start a server that ends with this process, however this process ends (on Linux; elsewhere by `end`).

    To be called on a thread that lives as long as the server: the kernel's signal follows the thread.
    """
    linux = sys.platform == "linux"
    # Looked up before the fork: a child of a process with threads must not load anything.
    prctl = ctypes.CDLL(None).prctl if linux else None
    return subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        preexec_fn=functools.partial(prctl, PR_SET_PDEATHSIG, signal.SIGKILL) if prctl else None,
    )


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    """Whether a server lists its models on a local port, within two seconds."""
    with (
        contextlib.suppress(OSError, urllib.error.URLError),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2) as response,
    ):
        return bool(response.status == 200)
    return False


def wait_until_healthy(
    process: subprocess.Popen[bytes], port: int, log: Any, *, limit: float = START_LIMIT
) -> None:
    """Wait until the server lists its models. Raises `OutsideError` where it ends or does not answer in time."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise OutsideError(f"the server ended with status {process.returncode}: {tail(log)}")
        if answers(port):
            return
        time.sleep(0.1)
    raise OutsideError(f"the server did not answer within {limit:g} s: {tail(log)}")


def tail(log: Any) -> str:
    """The last line that the server wrote."""
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it wrote nothing"


def end(process: subprocess.Popen[bytes], *, grace: float = 10.0) -> None:
    """End the server, at the latest after `grace` seconds."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
