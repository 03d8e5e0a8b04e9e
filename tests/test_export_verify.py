"""An artifact is known again on another machine, a changed one is not; two are told apart; its servers answer as it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("llama_cpp")

from export.run import Settings, export_run
from export.verify import diff, verify
from tests.export_cases import make_run
from tests.tiny_models import make
from unshot.catalog.formats import parse_targets
from unshot.console import Output
from unshot.contracts.manifest import sha256
from unshot.contracts.parity import Parity
from unshot.engines.address import call
from unshot.engines.server import LocalServer, free_port
from unshot.errors import InputError
from unshot.text.chat import load_tokenizer

pytestmark = pytest.mark.slow

QUIET = Output(verbosity=-1)


def exported(base: Path, root: Path, seed: int) -> Path:
    run = make_run(base, root / f"run-{seed}", seed=seed)
    targets = parse_targets(["gguf:f32", "gguf:q4_k_m"])
    export_run(str(run), targets, root / f"art-{seed}", QUIET, Settings(check_rows=2))
    return root / f"art-{seed}"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("verify")


@pytest.fixture(scope="module")
def base(root) -> Path:
    return make("llama", root / "base")


@pytest.fixture(scope="module")
def artifact(root, base) -> Path:
    return exported(base, root, 1)


def test_an_artifact_is_known_again_without_its_run(artifact, tmp_path, unshot) -> None:
    moved = shutil.copytree(artifact, tmp_path / "elsewhere")
    done = unshot("export", "verify", moved, "--json", "-q")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["files"]
    assert [f["verdict"] for f in found] == ["equal", "equal"]
    assert all(f["answers"] == f["prompts"] == 4 and f["kl"] < 1e-3 for f in found)


def test_a_changed_file_is_named(artifact, tmp_path, unshot) -> None:
    moved = shutil.copytree(artifact, tmp_path / "elsewhere")
    path = moved / "model-f32.gguf"
    data = bytearray(path.read_bytes())
    data[-60000:-40000] = bytes(20000)
    path.write_bytes(bytes(data))
    done = unshot("export", "verify", moved)
    assert done.returncode == 1 and "model-f32.gguf" in done.stderr and "has changed" in done.stderr
    # With the sums mended its answers still tell.
    sums = (moved / "SHA256SUMS").read_text()
    (moved / "SHA256SUMS").write_text(sums.replace(sha256(artifact / "model-f32.gguf"), sha256(path)))
    whole, coarse = verify(moved)
    assert (whole.verdict, coarse.verdict) == ("differs", "equal") and "KL" in whole.failures[0]


def test_what_cannot_be_known_is_not_proven(artifact, tmp_path, unshot) -> None:
    moved = shutil.copytree(artifact, tmp_path / "elsewhere")
    before = sha256(moved / "parity.json")
    raw = json.loads((moved / "parity.json").read_text())
    for report in raw["reports"]:
        report["probes"] = []
    (moved / "parity.json").write_text(json.dumps(raw))
    assert {f.verdict for f in verify(moved)} == {"differs"}  # the record itself has changed
    sums = (moved / "SHA256SUMS").read_text()
    (moved / "SHA256SUMS").write_text(sums.replace(before, sha256(moved / "parity.json")))
    assert {f.verdict for f in verify(moved)} == {"not proven"}
    done = unshot("export", "verify", tmp_path)
    assert done.returncode == 2 and "parity.json" in done.stderr


def test_two_artifacts_are_told_apart(artifact, base, root, unshot) -> None:
    other = exported(base, root, 2)
    done = unshot("export", "diff", artifact, other, "--json", "-q")
    assert done.returncode == 0, done.stderr
    whole, coarse = json.loads(done.stdout)["files"]
    assert whole["target"] == "gguf:f32" and not whole["same_bytes"] and whole["logits"]["kl"] > 1e-4
    assert {n for n, _ in whole["tensors"]} >= {"blk.0.attn_q.weight"} and coarse["tensors"]
    assert "token_embd.weight" not in {n for n, _ in whole["tensors"]}
    (same,) = diff(artifact / "model-f32.gguf", shutil.copy(artifact / "model-f32.gguf", root / "copy.gguf"))
    assert same.same_bytes
    (coarser,) = diff(artifact / "model-f32.gguf", artifact / "model-q4_k_m.gguf")
    assert not coarser.metadata and coarser.tensors[0][1] < 0.2 and coarser.prompts == 8
    with pytest.raises(InputError, match="neither"):
        diff(artifact, root)


SERVERS = {"llama-server": "llama-server", "llama-cpp-python": "python"}


@pytest.mark.parametrize("server", SERVERS)
def test_a_server_started_by_its_script_answers_as_the_gate(artifact, base, server, monkeypatch) -> None:
    if not shutil.which(SERVERS[server]):
        pytest.skip(f"{SERVERS[server]} is not on the PATH")
    port = free_port()
    monkeypatch.setenv("PORT", str(port))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    running = LocalServer.start(server, ["sh", str(artifact / f"serve-{server}.sh")], port)
    try:
        running.wait()
        tokenizer = load_tokenizer(base)
        for probe in Parity.read(artifact).reports[0].probes:
            body = {
                "messages": [{"role": r, "content": c} for r, c in probe.messages], "max_tokens": 16,
                "temperature": 0, "repeat_penalty": 1.0, "model": running.served_model(),
            }  # fmt: skip
            status, answer = call(
                running.address, "/chat/completions", body=json.dumps(body).encode(), timeout=60
            )
            assert status == 200, answer
            said = json.loads(answer)["choices"][0]["message"]["content"] or ""
            # A random model writes bytes that are no text, which servers show each in their own way.
            wanted = tokenizer.decode(probe.answer).partition("\ufffd")[0].strip()
            assert said.strip().startswith(wanted[:-1]) and (not wanted or said)
    finally:
        running.end()


def test_scripts_are_shell_and_listen_where_they_are_told(artifact) -> None:
    scripts = sorted(p.name for p in artifact.glob("serve*.sh"))
    assert scripts == ["serve-llama-cpp-python.sh", "serve-llama-server.sh", "serve-ollama.sh", "serve.sh"]
    for name in scripts:
        assert os.access(artifact / name, os.X_OK)
        assert subprocess.run(["sh", "-n", artifact / name], check=False).returncode == 0
