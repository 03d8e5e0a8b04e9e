"""The gateway in front of real llama.cpp servers: switches under load, a killed and a stopped candidate."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("torch")
pytest.importorskip("llama_cpp")
pytest.importorskip("uvicorn")
pytest.importorskip("aiohttp")
pytest.importorskip("sse_starlette")

from deploy.registry import Registry
from export import gguf_file
from export.merge import Merged
from tests.benchmarks.bench_switch import WAIVED, run
from tests.conftest import Run
from tests.deploy_cases import make_artifact
from tests.gateways import gateway, scripted, until
from tests.tiny_models import make
from unshot.contracts.request_log import read_requests
from unshot.text.chat import Chat, load_tokenizer

pytestmark = pytest.mark.slow

LABELLED = '[task]\nname = "risk"\nlabels = ["low", "high"]\ninstruction = "Risk?"\n'


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three random models of one tokenizer; their answers differ."""
    root = tmp_path_factory.mktemp("ggufs")
    found = []
    for seed in range(3):
        base = make("llama", root / f"base{seed}", seed=seed)
        chat = Chat(load_tokenizer(base))
        config = json.loads((base / "config.json").read_text())
        facts = gguf_file.Facts("tiny", "tiny", None, chat.tokenizer.template.source, chat.end)
        found.append(root / f"model{seed}.gguf")
        gguf_file.write_gguf(
            found[-1], Merged(sorted(base.glob("*.safetensors")), config), base, "f32", facts
        )
    return found


@pytest.mark.parametrize(("keep_warm", "switches"), [(0, 2), (300, 3)])
def test_switches_under_load_drop_nothing_and_mix_nothing(
    tmp_path: Path, ggufs: list[Path], keep_warm: float, switches: int
) -> None:
    seen = run(tmp_path, ggufs[0], (ggufs[1], ggufs[2]), switches=switches, clients=2, keep_warm=keep_warm)
    assert seen["distinguishable"]
    assert seen["failed"] == 0, seen["failures"]
    assert seen["mixed"] == 0, seen["mixed_first"]
    assert set(seen["by_version"]) == {"v1", "v2", "model0.gguf"}
    assert seen["fallbacks"] == 0 and seen["exit_code"] == 0


def test_a_killed_and_a_stopped_candidate_leave_users_with_the_baseline(
    tmp_path: Path, ggufs: list[Path]
) -> None:
    """kill -9 in mid-load: answered by the baseline, then the child is started again; SIGSTOP: the same by time-out."""
    registry = Registry(tmp_path / "store")
    registry.add(make_artifact(tmp_path / "art", ggufs[1], task={"instruction": "Short one."}))
    registry.move("champion", 1, by="test", waivers=WAIVED)
    arms = ["--baseline", f"gguf:{ggufs[0]}", "--store", tmp_path / "store", "--candidate-timeout", 2]
    more = ["--log", tmp_path / "log", "--context", 256, "--threads", 1, "--max-tokens", 8, "--cooldown", 0.5]
    with gateway(tmp_path, *arms, *more) as running:
        assert running.ask("No cap applies.").arm == "candidate"
        done: list[tuple[int, str]] = []
        stop = threading.Event()

        def client() -> None:
            while not stop.is_set():
                got = running.ask("No cap applies.")
                done.append((got.status, got.headers.get("x-unshot-arm", "")))

        thread = threading.Thread(target=client)
        thread.start()
        try:
            assert until(lambda: len(done) > 3)
            running.child("store/versions/v1").send_signal(signal.SIGKILL)
            assert until(lambda: (200, "baseline") in done)
            # Started again by itself, and used again.
            assert until(lambda: running.health()["arms"]["candidate"]["restarts"] == 1, 30)
            count = len(done)
            assert until(lambda: (200, "candidate") in done[count:], 30)
            count = len(done)
            hung = running.child("store/versions/v1")
            hung.send_signal(signal.SIGSTOP)
            assert until(lambda: (200, "baseline") in done[count:], 30)
        finally:
            stop.set()
            thread.join()
        assert {status for status, _ in done} == {200}
        assert running.metric("unshot_fallbacks_total", reason="timeout") >= 1
        assert running.metric("unshot_fallbacks_total") == sum(arm == "baseline" for _, arm in done)
        children = [psutil.Process(running.process.pid), *psutil.Process(running.process.pid).children()]
        hung.send_signal(signal.SIGCONT)
        assert running.stop() == 0
        assert not any(p.is_running() for p in children)
    failed = [r for r in read_requests(tmp_path / "log") if r.error]
    assert failed and {r.arm for r in failed} == {"candidate"}
    shown = {r.id for r in read_requests(tmp_path / "log") if r.fallback and r.error is None}
    assert {r.id for r in failed} == shown


def test_a_model_that_never_keeps_the_labels_is_replaced_and_broken_off(
    tmp_path: Path, ggufs: list[Path]
) -> None:
    """A random model writes no label: every answer is the baseline's, and after five it is asked no more."""
    case = tmp_path / "case.toml"
    case.write_text(LABELLED)
    with scripted("baseline") as url:
        arms = ["--baseline", url, "--candidate", f"gguf:{ggufs[1]}", "--context", 256, "--threads", 1]
        with gateway(tmp_path, "--case", case, *arms, "--max-tokens", 8, "--cooldown", 60) as running:
            for _ in range(7):
                got = running.ask("baseline=say low")
                assert (got.status, got.arm, got.text) == (200, "baseline", "low")
            assert running.metric("unshot_fallbacks_total", reason="schema") == 5
            assert running.metric("unshot_fallbacks_total", reason="breaker open") == 2


def test_servers_end_with_a_gateway_that_is_killed(tmp_path: Path, ggufs: list[Path]) -> None:
    with gateway(tmp_path, "--baseline", f"gguf:{ggufs[0]}", "--context", 256, "--threads", 1) as running:
        child = running.child("model0.gguf")
        running.process.kill()
        running.process.wait()
        gone, _ = psutil.wait_procs([child], timeout=60)
        assert gone


def test_a_version_that_does_not_load_leaves_the_old_one_serving(tmp_path: Path, ggufs: list[Path]) -> None:
    registry = Registry(tmp_path / "store")
    registry.add(make_artifact(tmp_path / "good", ggufs[1]))
    registry.add(make_artifact(tmp_path / "bad", b"GGUF, it says"))
    registry.move("champion", 1, by="test", waivers=WAIVED)
    arms = ["--store", tmp_path / "store", "--baseline", f"gguf:{ggufs[0]}", "--keep-warm", 0]
    with gateway(tmp_path, *arms, "--context", 256, "--threads", 1, "--max-tokens", 4) as running:
        registry.move("champion", 2, by="test", waivers=WAIVED)
        assert until(lambda: running.metric("unshot_switches_total", outcome="failed") == 1, 30)
        got = running.ask("No cap applies.")
        assert got.status == 200 and got.headers["x-unshot-version"] == "v1"
        assert "its server ended" in running.output.read_text()
        registry.set_split(40, by="test")  # the rest of the registry is followed all the same
        assert until(lambda: running.health()["split"] == 40, 10)
        registry.rollback(by="test")
        time.sleep(0.5)
        assert running.health()["arms"]["candidate"]["version"] == "v1"


def test_the_openai_client_unchanged_through_record_promotion_and_rollback(
    tmp_path: Path, ggufs: list[Path], unshot: Run
) -> None:
    """Its code carries the long prompt all the way; the model gets it only as long as no version is promoted."""
    openai = pytest.importorskip("openai", reason="the official client is not installed")
    shots = [(f"Clause {n}: the supplier pays up to {n} times the fees.", "low") for n in range(40)]
    long = [{"role": "system", "content": "You say which risk a clause carries, in one word."}]
    for question, label in shots:
        long += [{"role": "user", "content": question}, {"role": "assistant", "content": label}]
    (tmp_path / "few.jsonl").write_text(
        "".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in shots)
    )
    case = tmp_path / "case.toml"
    case.write_text(
        f'[task]\nname = "risk"\nsystem = "{long[0]["content"]}"\nexamples = "few.jsonl"\ninstruction = "Risk?"\n'
    )
    store = tmp_path / "store"
    registry = Registry(store)
    registry.add(make_artifact(tmp_path / "art", ggufs[1], task={"instruction": "Risk?"}))
    asked: list[tuple[str, int]] = []

    def app(client: Any) -> None:
        """The user's program: never changed."""
        for number in range(3):
            mine = {"role": "user", "content": f"No cap applies to clause {number}."}
            raw = client.chat.completions.with_raw_response.create(
                model="gpt-today", messages=[*long, mine], temperature=0, max_tokens=8
            )
            answer = raw.parse()
            assert answer.choices[0].message.role == "assistant" and answer.usage
            asked.append((raw.headers["x-unshot-arm"], answer.usage.prompt_tokens))

    with scripted("today") as today:
        arms = ["--record", "--baseline", today, "--case", case, "--store", store, "--log", tmp_path / "log"]
        more = ["--log-texts", "--context", 512, "--threads", 1, "--candidate-timeout", 20]
        with gateway(tmp_path, *arms, *more) as running:
            client = openai.OpenAI(base_url=running.url, api_key="sk-the-clients-own", max_retries=0)
            app(client)
            registry.move("champion", 1, by="test", waivers=WAIVED)
            assert until(lambda: running.health()["arms"].get("candidate", {}).get("version") == "v1", 30)
            app(client)
            done = unshot("deploy", "rollback", "--store", store, "--from", "v1", "--by", "test")
            assert done.returncode == 0, done.stderr
            assert until(lambda: not running.health()["arms"].get("candidate"), 30)
            app(client)
            assert running.stop() == 0
    assert [arm for arm, _ in asked] == ["baseline"] * 3 + ["candidate"] * 3 + ["baseline"] * 3
    before, after, again = (asked[i][1] for i in (0, 3, 6))
    # The scripted server counts words, the tuned one its tokens.
    assert before == again > 400 and after < 60
    # What was recorded is read back, with the prompt found.
    done = unshot("data", "import", tmp_path / "log", "--out", tmp_path / "imported", "--json")
    assert done.returncode == 0, done.stderr
    assert "You say which risk a clause carries" in (tmp_path / "imported" / "unshot.toml").read_text()
