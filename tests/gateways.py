"""Gateways and scripted servers as processes of their own, for the deploy tests and benchmarks."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import ROOT, command
from unshot.engines.server import free_port


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: Any

    @property
    def text(self) -> str:
        return str(self.body["choices"][0]["message"]["content"])

    @property
    def arm(self) -> str:
        return self.headers["x-unshot-arm"]


@dataclass
class Running:
    """A gateway that listens."""

    port: int
    process: subprocess.Popen[str]
    output: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def call(self, path: str, body: Any = None, **headers: str) -> Answer:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=data)
        request.add_header("Content-Type", "application/json")
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                status, given, raw = response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            status, given, raw = error.code, error.headers, error.read()
        try:
            value = json.loads(raw)
        except ValueError:
            value = raw.decode()
        return Answer(status, {k.lower(): v for k, v in given.items()}, value)

    def ask(self, text: str, *, user: str | None = None, slice: str | None = None, **more: Any) -> Answer:
        headers = {"x_unshot_user": user} if user else {}
        headers |= {"x_unshot_slice": slice} if slice else {}
        body = {"messages": [{"role": "user", "content": text}], **more}
        return self.call("/v1/chat/completions", body, **headers)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        total = 0.0
        for line in str(self.call("/metrics").body).splitlines():
            head, _, value = line.rpartition(" ")
            if head.split("{")[0] == name and all(f'{k}="{v}"' in head for k, v in labels.items()):
                total += float(value)
        return total

    def health(self) -> Any:
        return self.call("/healthz").body

    def child(self, model: str) -> psutil.Process:
        """The local server of a model file whose path contains `model`."""
        found = [p for p in psutil.Process(self.process.pid).children() if model in " ".join(p.cmdline())]
        assert len(found) == 1, (model, found)
        return found[0]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=120)


@contextlib.contextmanager
def gateway(folder: Path, *args: object, wait: float = 240.0, **env: str) -> Iterator[Running]:
    """Run `unshot deploy serve ARGS` until the block ends."""
    import os

    port = free_port()
    output = folder / f"gateway-{port}.txt"
    with output.open("w") as handle:
        process = subprocess.Popen(
            command(["deploy", "serve", "--port", port, *args]),
            cwd=folder,
            stdout=handle,
            stderr=handle,
            text=True,
            env={**os.environ, **env},
        )
    running = Running(port, process, output)
    try:
        deadline = time.monotonic() + wait
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the gateway did not start: {output.read_text()}")
            with contextlib.suppress(OSError):
                if running.call("/healthz").status in (200, 503):
                    break
            time.sleep(0.05)
        yield running
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=120)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def scripted(name: str) -> Iterator[str]:
    """A scripted server's base URL."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "tests.scripted", str(port), name], cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=1).close()
                break
            time.sleep(0.03)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def until(condition: Any, seconds: float = 60.0) -> bool:
    """Wait for a condition; whether it came."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False
