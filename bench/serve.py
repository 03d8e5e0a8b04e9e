"""`serve:gguf:PATH`: a real local server for a GGUF file, started for the run and ended with it."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from bench.remote import Remote, open_remote
from unshot.console import Output
from unshot.engines import Engine, open_engine, parse_spec, usable_cores
from unshot.errors import InputError, OutsideError
from unshot.prompts import Prompt

START_LIMIT = 120.0
CONTEXT = 8192
# As the engine in process has them (unshot/engines/gguf.py, which imports llama.cpp).
BATCH, MICRO_BATCH = 2048, 512


def open_served(
    side: str,
    spec: str,
    prompt: Prompt,
    *,
    max_tokens: int,
    threads: int | None,
    concurrency: int,
    timeout: float,
    out: Output,
) -> Served:
    """Start a server for `gguf:PATH` and wait until it answers.

    `llama-server` where it is on the PATH, else llama-cpp-python's own server. Raises `InputError` for another
    kind of model, `OutsideError` where no server can be started.
    """
    kind, target = parse_spec(spec)
    if kind != "gguf":
        raise InputError(
            f"serve:{spec}: only serve:gguf:PATH can be started here; give a URL for other servers"
        )
    # Also checks the file before a server dies of it; and counts tokens with the model's own tokenizer.
    engine = open_engine(spec, threads=threads)
    port = free_port()
    cores = threads or usable_cores()
    command = server_command(Path(target), port, cores, concurrency)
    out.log(f"{side}: starting {Path(command[0]).name} {' '.join(command[1:4])} on port {port}")
    log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until_healthy(process, port, log)
    except BaseException:
        end(process)
        engine.close()
        raise
    remote = open_remote(
        side,
        f"http://127.0.0.1:{port}/v1",
        prompt,
        model=Path(target).name,
        max_tokens=max_tokens,
        concurrency=concurrency,
        timeout=timeout,
        # llama-cpp-python's server penalises repetition by default, the labels of the prompt among it.
        extra={"repeat_penalty": 1.0},
    )
    return Served(remote, process, engine, spec, cores)


class Served(Remote):
    """A remote system whose server is ours."""

    def __init__(
        self, remote: Remote, process: subprocess.Popen[bytes], engine: Engine, spec: str, cores: int
    ) -> None:
        super().__init__(**{name: getattr(remote, name) for name in Remote.__dataclass_fields__})
        self._process = process
        self.pid = process.pid
        self._engine = engine
        self._spec = spec
        self._cores = cores
        self.count = lambda text: len(engine.tokenize(text))
        self.count_prompt = lambda messages: len(engine.prompt_ids(messages))

    def facts(self) -> dict[str, Any]:
        own = self._engine.facts()
        return {**super().facts(), **own, "spec": f"serve:{self._spec}", "threads": self._cores}

    def close(self) -> None:
        end(self._process)
        self._engine.close()


def server_command(path: Path, port: int, threads: int, concurrency: int) -> list[str]:
    """The command line of a server that is installed; `OutsideError` where none is."""
    binary = shutil.which("llama-server")
    if binary:
        return [
            binary, "-m", str(path), "--port", str(port), "--host", "127.0.0.1", "-t", str(threads),
            "-c", str(CONTEXT * concurrency), "-np", str(concurrency),
        ]  # fmt: skip
    if importlib.util.find_spec("uvicorn") and importlib.util.find_spec("sse_starlette"):
        return [
            sys.executable, "-m", "llama_cpp.server", "--model", str(path), "--host", "127.0.0.1",
            "--port", str(port), "--n_ctx", str(CONTEXT), "--n_threads", str(threads),
            "--n_threads_batch", str(threads), "--n_batch", str(BATCH), "--n_ubatch", str(MICRO_BATCH),
            # Its default keeps the logits of every prompt token: a long prompt would pay for what nobody asked for.
            "--logits_all", "false",
        ]  # fmt: skip
    raise OutsideError(
        "serve: needs a llama.cpp server; put llama-server on the PATH or pip install 'llama-cpp-python[server]'"
    )


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(
    process: subprocess.Popen[bytes], port: int, log: Any, *, limit: float = START_LIMIT
) -> None:
    """Wait until the server lists its models. Raises `OutsideError` where it ends or does not answer in time."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise OutsideError(f"the server ended with status {process.returncode}: {_tail(log)}")
        with (
            contextlib.suppress(OSError, urllib.error.URLError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2) as response,
        ):
            if response.status == 200:
                return
        time.sleep(0.1)
    raise OutsideError(f"the server did not answer within {limit:g} s: {_tail(log)}")


def _tail(log: Any) -> str:
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it wrote nothing"


def end(process: subprocess.Popen[bytes]) -> None:
    """End the server, at the latest after ten seconds."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
