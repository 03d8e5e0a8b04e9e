"""A server behind a proxy: asked for by name, by its URL or the environment's, and its password is written nowhere."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from bench.single import LoadJob, load_run
from bench.target import LoadOptions
from bench.traffic import ServerOptions
from tests.golden import certificate, golden_thread
from tests.logs import run_here
from tests.raw_server import listening
from unshot.console import Output
from unshot.contracts.report import LoadReport
from unshot.engines.address import parse_url, through_proxy
from unshot.errors import InputError

QUIET = Output(verbosity=-1)
Capture = pytest.CaptureFixture[str]


@contextmanager
def proxy(password: str | None = None, status: int = 200) -> Iterator[tuple[str, list[str]]]:
    """An HTTP proxy on a real socket; yields `HOST:PORT` and the request lines that it sees."""
    seen: list[str] = []
    wanted = "Basic " + base64.b64encode(f"me:{password}".encode()).decode()

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            line = head.split("\r\n")[0]
            seen.append(line)
            verb, target, _ = line.split(" ")
            if password and wanted not in head:
                writer.write(b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            elif verb == "CONNECT":
                host, _, number = target.partition(":")
                far_reader, far = await asyncio.open_connection(host, int(number))
                writer.write(f"HTTP/1.1 {status} X\r\n\r\n".encode())
                await asyncio.gather(pipe(reader, far), pipe(far_reader, writer))
            else:
                parts = urlsplit(target)
                far_reader, far = await asyncio.open_connection(parts.hostname, parts.port)
                own = head.replace(target, parts.path, 1).replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n")
                far.write(own.encode())
                await asyncio.gather(pipe(reader, far), pipe(far_reader, writer))
        writer.close()

    with listening(client) as port:
        yield f"127.0.0.1:{port}", seen


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def run(url: str, out: Path, proxied: str | None, **more: str) -> LoadReport:
    server = ServerOptions("golden", proxy=proxied, timeout=5.0, **more)
    return load_run(LoadJob(LoadOptions(url, server), out, "closed:2", 4, warm_up=1), QUIET)


@pytest.mark.parametrize("tls", [False, True])
def test_requests_go_through_the_proxy_that_was_given(tmp_path: Path, tls: bool) -> None:
    made, context = certificate(tmp_path) if tls else (None, None)
    more = {"authorities": str(made)} if tls else {}
    with golden_thread(tls=context, ttft_ms=20, itl_ms=5, tokens=3) as url, proxy() as (place, seen):
        report = run(url, tmp_path / "r", f"http://{place}", **more)
        direct = run(url, tmp_path / "d", None, **more)
    assert (report.figures.answered, direct.figures.answered) == (4, 4)
    assert report.conditions.proxy == f"http://{place}" and direct.conditions.proxy == "none"
    where = url.split("://")[1].removesuffix("/v1")
    wanted = f"CONNECT {where} HTTP/1.1" if tls else f"POST {url}/chat/completions HTTP/1.1"
    assert wanted in seen
    if not tls:  # what is asked outside the measurement goes there too
        assert f"GET {url}/models HTTP/1.1" in seen


@pytest.mark.parametrize("tls", [False, True])
def test_the_environments_proxy_is_used_on_request_alone_and_its_password_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tls: bool
) -> None:
    _, context = certificate(tmp_path) if tls else (None, None)
    with (
        golden_thread(tls=context, ttft_ms=1, itl_ms=0, tokens=2) as url,
        proxy("sesame-42") as (place, seen),
    ):
        monkeypatch.setenv("HTTPS_PROXY" if tls else "HTTP_PROXY", f"http://me:sesame-42@{place}")
        command = ["bench", "load", url, "--insecure", "--requests", "3", "--warm-up", "1"]
        direct = run_here(capsys, *command, "--out", tmp_path / "d", "-q")
        assert direct.code in (0, 1) and not seen
        done = run_here(capsys, *command, "--proxy", "env", "--out", tmp_path / "p", "--json")
        assert seen and LoadReport.read(tmp_path / "p").figures.answered == 3
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        count = len(seen)
        run_here(capsys, *command, "--proxy", "env", "--out", tmp_path / "n", "-q")
        assert len(seen) == count and LoadReport.read(tmp_path / "n").conditions.proxy == "none"
    coded = base64.b64encode(b"me:sesame-42").decode()
    texts = [done.out, done.err, *(f.read_text() for f in (tmp_path / "p").iterdir())]
    assert any(place in text for text in texts)
    assert not any("sesame-42" in text or coded in text for text in texts)


def test_a_proxy_that_refuses_is_counted_as_what_it_is(tmp_path: Path) -> None:
    made, context = certificate(tmp_path)
    with golden_thread(tls=context, ttft_ms=1, itl_ms=0, tokens=2) as url, golden_thread(tokens=1) as plain:
        with proxy("needed") as (place, _):
            refused = run(url, tmp_path / "a", f"http://{place}", authorities=str(made))
            asked = run(plain, tmp_path / "b", f"http://{place}")
        with proxy(status=502) as (place, _):
            broken = run(url, tmp_path / "c", f"http://{place}", authorities=str(made))
        gone = run(url, tmp_path / "d", f"http://{place}", authorities=str(made))
        # Not a proxy at all: the server itself.
        server = run(plain, tmp_path / "e", plain.removesuffix("/v1"))
    assert refused.figures.errors == {"proxy": 4} and "407" in (refused.failure or "")
    assert asked.figures.errors == {"http 407": 4}
    assert broken.figures.errors == {"proxy": 4} and "502" in (broken.failure or "")
    assert gone.figures.errors == {"connect": 4} and f"the proxy http://{place}" in (gone.failure or "")
    assert server.figures.requests == 4


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("http://me:secret@127.0.0.1:1", "holds credentials"),
        ("socks5://127.0.0.1:1", "not an HTTP proxy"),
        ("https://127.0.0.1:1", "not an HTTP proxy"),
        ("http://127.0.0.1:99999", "not a URL"),
        ("http://", "not an HTTP proxy"),
    ],
)
def test_what_is_no_proxy_is_refused_without_its_password(given: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as raised:
        through_proxy(parse_url("http://h/v1"), given)
    assert "secret" not in str(raised.value)
