"""A golden server in a process or a thread of its own, as a fixture for tests and benchmarks."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from bench.golden import Golden, Script


def certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate of 127.0.0.1 that it signed itself, and what a server speaks TLS with it by."""
    made, key = folder / "cert.pem", folder / "key.pem"
    done = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(made),
         "-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        capture_output=True,
    )  # fmt: skip
    if done.returncode:
        pytest.skip("openssl cannot make a certificate here")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made, key)
    return made, context


@contextmanager
def golden_thread(*, tls: ssl.SSLContext | None = None, **script: Any) -> Iterator[str]:
    """The golden server in a thread of this process: quick to start, and as late as this process is."""
    server, loop, ready = Golden(Script(**script)), asyncio.new_event_loop(), threading.Event()

    def serve() -> None:
        asyncio.set_event_loop(loop)
        task = loop.create_task(server.serve("127.0.0.1", 0, lambda port: ready.set(), tls))
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(60), "the golden server did not start"
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.port}/v1"
    finally:
        loop.call_soon_threadsafe(lambda: [t.cancel() for t in asyncio.all_tasks(loop)])
        thread.join(60)


def wait_for_requests(url: str, count: int, *, limit: float = 180.0) -> None:
    """Wait until a golden server has had `count` more requests than when it was last asked."""
    seen, deadline = 0, time.monotonic() + limit
    while seen < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{seen} of {count} requests came")
        with urllib.request.urlopen(f"{url}/log", timeout=60) as answer:
            seen += len(json.load(answer))
        time.sleep(0.05)


@contextmanager
def golden_server(**script: object) -> Iterator[str]:
    """Start `unshot bench golden` with options from `script`; yields the base URL."""
    options = [
        part
        for k, v in script.items()
        for part in ([f"--{k.replace('_', '-')}"] if v is True else [f"--{k.replace('_', '-')}", str(v)])
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "unshot", "bench", "golden", *options], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://"), "the golden server did not start"
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)
        if process.stdout:
            process.stdout.close()
