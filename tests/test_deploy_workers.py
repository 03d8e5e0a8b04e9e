"""Several gateway processes behind one port: one split, one breaker, one log, one /metrics; rates, keys, TLS."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("aiohttp")

from deploy.registry.store import Registry
from deploy.serve.breaker import Breaker
from deploy.serve.options import ArmOptions, ServeOptions
from deploy.serve.shared import ACTIVE, ASKED, Cell, Places, Rates, Shared
from deploy.serve.workers import Order
from tests.conftest import ROOT
from tests.gateways import Running, gateway, scripted, until
from tests.inprocess import http, serving, with_limits
from tests.test_deploy_attacks import ask, completion, saying
from unshot.case_file import load_case
from unshot.contracts.request_log import read_requests
from unshot.prices import Prices

FREE = '[task]\nname = "free"\ninstruction = "Be brief."\n'


def test_two_processes_see_one_breaker(tmp_path: Path) -> None:
    one, two = (Breaker(Cell(tmp_path / "cell", i), failures=3, cooldown=0.0) for i in (0, 1))
    one.failure()
    two.failure()
    assert one.passes and two.passes
    one.failure()
    assert not two.passes and two.due()
    assert one.probe() and not two.probe(), "one process probes"
    assert two.state == "half-open"
    one.probe_failed()
    assert two.failed_probes == 1
    two.success()
    assert one.passes and one.failed_probes == 0


def test_places_at_a_server_are_counted_over_all_and_given_back_for_the_dead(tmp_path: Path) -> None:
    import asyncio

    one, two = Shared(tmp_path, 0), Shared(tmp_path, 1)
    first, second = Places(one.cell("a"), 1), Places(two.cell("a"), 1)

    async def main() -> None:
        await first.acquire()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(second.acquire(), 0.05)
        Shared(tmp_path).forget(0)  # the first worker was killed
        await asyncio.wait_for(second.acquire(), 1)

    asyncio.run(main())
    two.cell("a").count(ACTIVE, 2)
    assert one.cell("a").total(ACTIVE) == 2 and one.cell("a").total(ASKED) == 1


def test_where_servers_are_is_read_again_when_it_changes(tmp_path: Path) -> None:
    lead, worker = Shared(tmp_path), Shared(tmp_path, 0)
    assert worker.server("v1") == {}
    lead.publish({"v1": {"url": "http://127.0.0.1:1/v1"}})
    assert worker.server("v1") == {"url": "http://127.0.0.1:1/v1"}
    lead.publish({"v2": {"error": "no"}})
    assert worker.server("v1") == {} and worker.server("v2") == {"error": "no"}


def test_a_rate_holds_for_each_key_over_all_workers(tmp_path: Path) -> None:
    one, two = Rates(60, tmp_path / "rates"), Rates(60, tmp_path / "rates")
    taken = [(one, two)[n % 2].wait("ada") for n in range(62)]
    assert taken[:60] == [0.0] * 60 and 0 < taken[61] <= 1.01
    assert two.wait("bob") == 0
    # A table that is full still answers, and a key that asks all the time keeps its row.
    for n in range(3 * Rates.ROOM):
        one.wait(f"key {n}")
        if n % 100 == 0:
            one.wait("ada")
    assert one.wait("ada") > 0


def test_an_order_reaches_a_worker_as_it_was_given(tmp_path: Path) -> None:
    arm = ArmOptions("http://h/v1", price=Prices("1,2", "given", {"": {"input": 1.0}}))
    case = load_case(ROOT / "unshot" / "demo" / "unshot.toml")
    order = Order(case, tmp_path, None, ServeOptions(arm, ArmOptions(), log_dir=tmp_path), tmp_path)
    assert Order.from_json(order.to_json()) == order


@pytest.mark.cli
def test_keys_and_rates_of_the_gateway(tmp_path: Path) -> None:
    limits = with_limits(key="first-key, second-key", rate=2.0)
    with serving(tmp_path, saying(http(completion())), limits=limits) as served:

        def status(key: str) -> int:
            return ask(served, None, f"Authorization: Bearer {key}")[0]

        assert [status("first-key") for _ in range(3)] == [200, 200, 429]
        answer = ask(served, None, "Authorization: Bearer first-key")[2]
        assert b"retry-after: " in answer.lower() and b"requests a minute" in answer
        assert status("second-key") == 200
        assert status("first-key, second-key") == 401 and status("") == 401


def ask_many(running: Running, count: int) -> list[str]:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda n: running.ask(f"hi {n}", user=f"u{n}").arm, range(count)))


@pytest.mark.cli
def test_workers_share_split_breaker_log_and_metrics_and_survive_a_kill(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(FREE)
    store = Registry(tmp_path / "store")
    store.create(by="ada")
    log = tmp_path / "log"
    with scripted("baseline") as base, scripted("candidate") as candidate, gateway(
        tmp_path, "--case", "c.toml", "--baseline", base, "--candidate", candidate, "--store", "store",
        "--split", 50, "--workers", 2, "--log", log, "--cooldown", 60,
    ) as running:  # fmt: skip
        first = ask_many(running, 200)
        assert 60 < first.count("candidate") < 140
        assert ask_many(running, 200) == first, "a user stays in their arm, whichever worker answers"
        workers = [
            p for p in psutil.Process(running.process.pid).children() if "deploy.serve.worker" in p.cmdline()
        ]
        assert len(workers) == 2
        workers[0].send_signal(signal.SIGKILL)
        assert until(lambda: "started again" in running.output.read_text())
        assert ask_many(running, 100) == first[:100]
        assert running.metric("unshot_answers_total") == 500
        store.set_split(100, by="ada")
        assert until(lambda: set(ask_many(running, 8)) == {"candidate"})
        failing = [running.ask("candidate=http 500").arm for _ in range(12)]
        assert failing == ["baseline"] * 12
        assert running.metric("unshot_fallbacks_total", reason="http 500") == 5, (
            "five failures in all open it"
        )
        assert running.metric("unshot_breaker_state", arm="candidate") == 2
        assert running.metric("unshot_active_requests") == 0
        answers = running.metric("unshot_answers_total")
        assert running.stop() == 0
    lines = list(read_requests(log))
    assert len(lines) == answers and len({r.id for r in lines}) == len(lines) - 12


def certificate(folder: Path) -> tuple[Path, Path]:
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
         "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@pytest.mark.cli
def test_tls_and_files_that_are_none(tmp_path: Path, unshot: object) -> None:
    cert, key = certificate(tmp_path)
    (tmp_path / "c.toml").write_text(FREE)
    (tmp_path / "none.pem").write_text("no certificate")
    start = [
        sys.executable,
        "-m",
        "unshot",
        "deploy",
        "serve",
        "--case",
        "c.toml",
        "--baseline",
        "http://127.0.0.1:9/v1",
    ]
    for more in (
        ["--tls-cert", cert],
        ["--tls-cert", "none.pem", "--tls-key", key],
        ["--tls-cert", cert, "--tls-key", "no"],
    ):
        done = unshot(*start[3:], *more, cwd=tmp_path)  # type: ignore[operator]
        assert done.returncode == 2 and "--tls" in done.stderr and "internal" not in done.stderr, done.stderr
    from unshot.engines.server import free_port

    port = free_port()
    with scripted("baseline") as base:
        process = subprocess.Popen(
            [*start[:7], "--baseline", base, "--port", str(port), "--tls-cert", cert, "--tls-key", key],
            cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        try:
            assert process.stderr is not None
            assert any("https://" in line for line in iter(process.stderr.readline, ""))
            request = urllib.request.Request(
                f"https://localhost:{port}/v1/chat/completions", b'{"messages":[{"role":"user","content":"hi"}]}',
                {"Content-Type": "application/json"},
            )  # fmt: skip
            trust = ssl.create_default_context(cafile=str(cert))
            with urllib.request.urlopen(request, timeout=20, context=trust) as response:
                assert json.loads(response.read())["choices"][0]["message"]["content"] == "ok baseline"
        finally:
            process.terminate()
            assert process.wait(20) == 0
            process.stderr.close()


@pytest.mark.cli
def test_spans_follow_the_conventions_and_hold_no_texts(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from deploy.serve.tracing import Spans

    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    scripts = saying(http(completion("SECRET ANSWER"))), saying(http(b"{}", 500))
    with serving(tmp_path, *scripts, tracing=Spans(provider)) as served:
        body = {"messages": [{"role": "user", "content": "PRIVATE TEXT"}], "temperature": 0.5}
        assert ask(served, body, f"traceparent: 00-{'a' * 32}-{'b' * 16}-01")[0] == 200
    failed, good = kept.get_finished_spans()
    assert (failed.attributes["unshot.arm"], failed.attributes["error.type"]) == ("candidate", "http 500")
    assert good.attributes["unshot.arm"] == "baseline" and "error.type" not in good.attributes
    for span in (failed, good):
        assert span.kind.name == "CLIENT" and span.name == f"chat {span.attributes['gen_ai.request.model']}"
        assert f"{span.context.trace_id:x}" == "a" * 32 and f"{span.parent.span_id:x}" == "b" * 16
        assert span.attributes["gen_ai.operation.name"] == "chat"
        assert span.attributes["gen_ai.request.temperature"] == 0.5
    assert (good.attributes["gen_ai.usage.input_tokens"], good.attributes["gen_ai.usage.output_tokens"]) == (
        3,
        1,
    )
    assert list(good.attributes["gen_ai.response.finish_reasons"]) == ["stop"]
    assert "PRIVATE" not in str([s.to_json() for s in (failed, good)])
    assert "SECRET" not in str([s.to_json() for s in (failed, good)])


def test_a_collector_without_the_packages_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy.serve.tracing import open_tracing
    from unshot.errors import OutsideError

    assert open_tracing({}) is None
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(OutsideError, match="pip install opentelemetry-sdk"):
        open_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"})
