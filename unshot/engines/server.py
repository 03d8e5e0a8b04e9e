"""A model server as a child process: which one is installed, how it is started, waited for, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unshot.engines.address import Address, call
from unshot.engines.openai import served_models
from unshot.errors import OutsideError

START_LIMIT = 120.0
CONTEXT = 8192
# As the engine in process has them (unshot/engines/llama_cpp.py, which imports llama.cpp).
BATCH, MICRO_BATCH = 2048, 512
HOST = "127.0.0.1"
POLL = 0.05
PR_SET_PDEATHSIG = 1


def server_command(
    path: Path, port: int, threads: int, concurrency: int, *, context: int = CONTEXT, logprobs: bool = True
) -> list[str]:
    """The command line of a server that is installed: `llama-server`, else llama-cpp-python's own.

    The first answers `concurrency` requests at once, the second one after the other; there `logprobs` keeps the logits
    of every prompt token, for which a long prompt pays. Raises `OutsideError` where none is installed.
    """
    if shutil.which("llama-server"):
        return llama_server_command(path, port, threads, concurrency, context=context)
    if importlib.util.find_spec("uvicorn") and importlib.util.find_spec("sse_starlette"):
        # By default it cuts a stream short when the next request comes.
        return [
            sys.executable, "-P", "-m", "llama_cpp.server", "--model", str(path), "--host", HOST,
            "--port", str(port), "--n_ctx", str(context), "--n_threads", str(threads),
            "--n_threads_batch", str(threads), "--n_batch", str(BATCH), "--n_ubatch", str(MICRO_BATCH),
            "--logits_all", str(logprobs).lower(), "--interrupt_requests", "false",
        ]  # fmt: skip
    raise OutsideError(
        "a GGUF file needs a llama.cpp server; put llama-server on the PATH or "
        "pip install 'llama-cpp-python[server]'"
    )


def llama_server_command(
    path: Path, port: int, threads: int, concurrency: int, *, context: int = CONTEXT
) -> list[str]:
    """llama.cpp's own server with `concurrency` slots of `context` tokens. Raises `OutsideError` without it."""
    binary = shutil.which("llama-server")
    if not binary:
        raise OutsideError("llama-server is not on the PATH; install llama.cpp, or use serve:gguf:PATH")
    return [
        binary, "-m", str(path), "--port", str(port), "--host", HOST, "-t", str(threads),
        "-c", str(context * concurrency), "-np", str(concurrency), "--metrics",
    ]  # fmt: skip


def _llama_cpp(path: Path, port: int, threads: int, concurrency: int) -> list[str]:
    return server_command(path, port, threads, concurrency, logprobs=False)


def _vllm(path: Path, port: int, threads: int, concurrency: int) -> list[str]:
    binary = shutil.which("vllm")
    if not binary:
        raise OutsideError(
            "vllm is not on the PATH; install vLLM (an environment of its own will do) or give a URL"
        )
    return [binary, "serve", str(path), "--host", HOST, "--port", str(port)]


def _sglang(path: Path, port: int, threads: int, concurrency: int) -> list[str]:
    python = os.environ.get("UNSHOT_SGLANG_PYTHON") or sys.executable
    if python == sys.executable and importlib.util.find_spec("sglang") is None:
        raise OutsideError(
            "sglang is not installed here; name the Python of its environment in UNSHOT_SGLANG_PYTHON or give a URL"
        )
    return [
        python,
        "-m",
        "sglang.launch_server",
        "--model-path",
        str(path),
        "--host",
        HOST,
        "--port",
        str(port),
    ]


@dataclass(frozen=True)
class ServerKind:
    """A server that `serve:NAME:TARGET` starts; `command` gets the model, port, threads and concurrency."""

    name: str
    target: str
    runs: str
    command: Callable[[Path, int, int, int], list[str]]
    # How it says which version it is.
    version_command: Callable[[], list[str]]
    gguf: bool = False
    extra: Mapping[str, float] = field(default_factory=dict)
    start_limit: float = START_LIMIT

    @property
    def form(self) -> str:
        """`gguf:PATH`."""
        return f"{self.name}:{self.target}"

    def version(self) -> str:
        """Name and version in one line, as the server itself says it."""
        try:
            done = subprocess.run(
                self.version_command(), capture_output=True, text=True, timeout=60, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return f"{self.name}, version unknown"
        lines = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
        found = next((line for line in lines if any(c.isdigit() for c in line)), "version unknown")
        return f"{self.name} {found}"[:120]


def _package_version(package: str, python: str = sys.executable) -> list[str]:
    return [python, "-P", "-c", f"from importlib.metadata import version; print(version({package!r}))"]


def _beside(binary: str) -> str:
    """The Python of the environment that a command is from: `vllm --version` itself imports for a minute."""
    python = Path(shutil.which(binary) or "").with_name("python")
    return str(python) if python.is_file() else sys.executable


# llama-cpp-python's server penalises repetition by default, the labels of the prompt among it.
SERVERS = {
    kind.name: kind
    for kind in (
        ServerKind(
            "gguf", "PATH", "a llama.cpp server: `llama-server` where it is on the PATH, else llama-cpp-python's",
            _llama_cpp, lambda: _package_version("llama-cpp-python"), gguf=True, extra={"repeat_penalty": 1.0},
        ),
        ServerKind(
            "llama-server", "PATH", "llama.cpp's own server, from the PATH",
            llama_server_command, lambda: ["llama-server", "--version"], gguf=True,
        ),
        ServerKind(
            "vllm", "DIR", "vLLM, from the PATH", _vllm, lambda: _package_version("vllm", _beside("vllm")),
            start_limit=900.0,
        ),
        ServerKind(
            "sglang", "DIR", "SGLang, of this environment or of UNSHOT_SGLANG_PYTHON's", _sglang,
            lambda: _package_version("sglang", os.environ.get("UNSHOT_SGLANG_PYTHON") or sys.executable),
            start_limit=900.0,
        ),
    )
}  # fmt: skip


def serve_forms() -> str:
    """Every server's form, for help texts: `serve:gguf:PATH, ...`."""
    return ", ".join(f"serve:{kind.form}" for kind in SERVERS.values())


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class LastWords:
    """The end of what a server writes, at most `KEPT` bytes in memory however long it runs."""

    KEPT = 64 * 1024

    def __init__(self) -> None:
        self._out, self._in = os.pipe()
        self._kept = bytearray()
        threading.Thread(target=self._drain, name="server-log", daemon=True).start()

    def fileno(self) -> int:
        """Where the server writes to."""
        return self._in

    def line(self) -> str:
        """The last line that it wrote."""
        lines = [line for line in bytes(self._kept).decode(errors="replace").splitlines() if line.strip()]
        return lines[-1][:200] if lines else "it wrote nothing"

    def close(self) -> None:
        """Take nothing more; the thread ends when the server has closed its side too."""
        if self._in >= 0:
            os.close(self._in)
            self._in = -1

    def _drain(self) -> None:
        with os.fdopen(self._out, "rb", buffering=0) as pipe:
            while data := pipe.read(65536):
                self._kept += data
                del self._kept[: -self.KEPT]


@dataclass
class LocalServer:
    """A server that this process started, and that ends with it. `label` names it in errors."""

    label: str
    command: Sequence[str]
    port: int
    process: subprocess.Popen[bytes]
    log: LastWords = field(repr=False)

    @classmethod
    def start(cls, label: str, command: Sequence[str], port: int) -> LocalServer:
        """Start `command`, whose server will listen on `port`. Raises `OutsideError` where it cannot be run.

        It ends with this process, however this process ends (on Linux; elsewhere by `end`). To be called on a thread
        that lives as long as the server: the kernel's signal follows the thread.
        """
        log = LastWords()
        # Looked up before the fork: a child of a process with threads must not load anything.
        prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
        try:
            process = subprocess.Popen(
                command,
                stdout=log.fileno(),
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                preexec_fn=functools.partial(prctl, PR_SET_PDEATHSIG, signal.SIGKILL) if prctl else None,
            )
        except OSError as error:
            log.close()
            raise OutsideError(f"{label}: {command[0]} cannot be started ({error.strerror})") from None
        return cls(label, command, port, process, log)

    @property
    def address(self) -> Address:
        """Where its API is."""
        return Address(HOST, self.port, False, "/v1")

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self.process.poll() is None

    def answers(self) -> bool:
        """Whether it lists its models, within two seconds. Raises `OutsideError` where it has ended."""
        if not self.running:
            raise OutsideError(
                f"{self.label}: its server ended with status {self.process.returncode}: {self.last_words()}"
            )
        try:
            return call(self.address, "/models", timeout=2)[0] == 200
        except OSError:
            return False

    def served_model(self) -> str | None:
        """The first model name that it lists; None where it lists none."""
        try:
            status, body = call(self.address, "/models", timeout=5)
        except OSError:
            return None
        models = served_models(body) if status == 200 else []
        return models[0][0] if models else None

    def wait(self, *, limit: float = START_LIMIT) -> None:
        """Wait until it answers. Raises `OutsideError` where it ends or does not answer within `limit` seconds."""
        deadline = time.monotonic() + limit
        while not self.answers():
            self._in_time(deadline, limit)
            time.sleep(POLL)

    async def wait_async(self, *, limit: float = START_LIMIT) -> None:
        """`wait` for an event loop."""
        deadline = time.monotonic() + limit
        while not await asyncio.to_thread(self.answers):
            self._in_time(deadline, limit)
            await asyncio.sleep(POLL)

    def _in_time(self, deadline: float, limit: float) -> None:
        if time.monotonic() > deadline:
            raise OutsideError(
                f"{self.label}: its server did not answer within {limit:g} s: {self.last_words()}"
            )

    def last_words(self) -> str:
        """The last line that it wrote."""
        return self.log.line()

    def kill(self) -> None:
        """End it at once, also where it is stopped or hangs."""
        if self.running:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def end(self, *, grace: float = 10.0) -> None:
        """Ask it to end, and make it after `grace` seconds."""
        if self.running:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=grace)
        self.kill()
