"""The registry: what is taken in, what a promotion asks for, and that every change is whole and on record."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy.registry import Registry, open_registry
from tests.conftest import Run, command
from tests.deploy_cases import make_artifact, make_tuned, three_versions
from unshot.__main__ import main
from unshot.contracts.gates import Gate, add_gate
from unshot.contracts.manifest import read_manifest
from unshot.errors import GateError, InputError


def unshot_(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["deploy", *map(str, args)])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_versions(tmp_path_factory.mktemp("registry"), promoted=False)


@pytest.fixture()
def full(stored: Path, tmp_path: Path) -> Registry:
    """Three versions with all gates passed, none of them promoted."""
    return Registry(shutil.copytree(stored, tmp_path / "store"))


def test_an_artifact_outlives_its_source(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "store")
    source = make_artifact(tmp_path / "art")
    version, new = registry.add(source, note="first")
    assert new and version.name == "v1"
    (source / "model-q8_0.gguf").write_bytes(b"overwritten in place")
    assert (registry.verified(1) / "model-q8_0.gguf").read_bytes() == b"weights"
    (registry.artifact(1) / "model-q8_0.gguf").write_bytes(b"WEIGHTS")
    with pytest.raises(InputError, match="does not match its hash"):
        registry.verified(1)


def test_a_changed_artifact_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    source = make_artifact(tmp_path / "art")
    (source / "model-q8_0.gguf").write_bytes(b"tampered")
    with pytest.raises(InputError, match="does not match its hash"):
        Registry(tmp_path / "store").add(source)
    assert not (tmp_path / "store").exists()


def test_a_manifest_swapped_in_the_store_is_noticed(full: Registry) -> None:
    (full.artifact(1) / "manifest.json").write_bytes((full.artifact(2) / "manifest.json").read_bytes())
    (full.artifact(1) / "model-q8_0.gguf").write_bytes((full.artifact(2) / "model-q8_0.gguf").read_bytes())
    with pytest.raises(InputError, match="not the one that was added"):
        full.verified(1)


def test_promotion_asks_for_every_gate_and_takes_the_worst_word(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "store")
    run = make_tuned(tmp_path / "run", quality=True, forgetting=None)
    registry.add(make_artifact(tmp_path / "art", run=run))
    with pytest.raises(GateError) as refused:
        registry.move("champion", 1, by="ada")
    text = str(refused.value)
    assert "forgetting: undecided" in text and "review: missing" in text
    assert "quality" not in text and "parity" not in text
    assert registry.state().aliases == {} and registry.state().history[-1].action == "add"
    registry.move("challenger", 1, by="ada")  # parity is enough to be measured
    add_gate(run, Gate(name="forgetting", passed=True, detail="0.1 points"))
    add_gate(run, Gate(name="review", passed=True, detail="50 answers read"))
    registry.refresh(1, "ada")
    registry.move("champion", 1, by="ada")
    assert registry.state().aliases == {"champion": 1}
    add_gate(run, Gate(name="quality", passed=False, detail="worse on new rows"))
    registry.refresh(1, "ada")
    assert registry.state().versions[1].verdicts()["quality"][0] is False


def test_a_review_that_comes_later_counts_over_the_copy_in_the_export(tmp_path: Path) -> None:
    run = make_tuned(tmp_path / "run", quality=True, forgetting=True)
    artifact = make_artifact(tmp_path / "art", run=run)
    for passed, at in ((False, "2026-01-01T00:00:00+00:00"), (None, "2026-01-02T00:00:00+00:00")):
        add_gate(artifact, Gate(name="review", passed=passed, detail="copied", at=at))
    registry = Registry(tmp_path / "store")
    registry.add(artifact)
    assert registry.state().versions[1].verdicts()["review"][0] is None
    add_gate(run, Gate(name="review", passed=True, detail="50 answers read"))
    registry.refresh(1, "ada")
    assert registry.state().versions[1].verdicts()["review"] == (True, "tune: 50 answers read")
    add_gate(run, Gate(name="review", passed=False, detail="read again", at="2099-01-01T00:00:00+00:00"))
    registry.refresh(1, "ada")
    with pytest.raises(GateError, match="review: failed"):
        registry.move("champion", 1, by="ada")


def test_gates_of_a_vanished_run_stay(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "store")
    run = make_tuned(tmp_path / "run", quality=True, forgetting=True, review=True)
    registry.add(make_artifact(tmp_path / "art", run=run))
    (run / "manifest.json").unlink()
    registry.refresh(1, "ada")
    assert registry.move("champion", 1, by="ada").after == "v1"


def test_parity_of_an_old_export_without_gates_is_read_from_its_reports(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "art", parity=None)
    raw = json.loads((folder / "manifest.json").read_text())
    raw = {k: raw[k] for k in ("stage", "outputs", "inputs")} | {"format": 1}
    raw["result"] = {"parity": [{"target": "gguf:q8_0", "passed": False}]}
    (folder / "manifest.json").write_text(json.dumps(raw))
    version, _ = Registry(tmp_path / "store").add(folder)
    assert version.verdicts()["parity"] == (False, "export: gguf:q8_0 drifts")


def test_another_run_or_bench_is_refused(tmp_path: Path) -> None:
    own, other = make_tuned(tmp_path / "own"), make_tuned(tmp_path / "other")
    (other / "adapter").mkdir()
    (other / "adapter" / "a.safetensors").write_bytes(b"x")
    manifest = read_manifest(other, verify=False)
    manifest.finish(other)
    artifact = make_artifact(tmp_path / "art", run=own)
    registry = Registry(tmp_path / "store")
    with pytest.raises(InputError, match="not the run"):
        registry.add(artifact, run=other)
    from unshot.contracts.manifest import Manifest

    bench = tmp_path / "bench"
    bench.mkdir()
    Manifest("bench", candidate="gguf:/elsewhere/model.gguf").finish(bench)
    with pytest.raises(InputError, match="its candidate is gguf:/elsewhere"):
        registry.add(artifact, bench=bench)


def test_rollback_walks_back_one_promotion_at_a_time(full: Registry) -> None:
    for number in (1, 2, 3, 2):
        full.move("champion", number, by="ada")
    seen = [full.rollback(by="bob", why="worse").after for _ in range(4)]
    assert seen == ["v3", "v2", "v1", None]
    with pytest.raises(InputError, match="nothing to roll back"):
        full.rollback(by="bob")
    last = full.state().history[-1]
    assert (last.by, last.action, last.before, last.after, last.why) == (
        "bob",
        "rollback",
        "v1",
        None,
        "worse",
    )


def test_promoting_the_champion_again_does_not_make_it_its_own_predecessor(full: Registry) -> None:
    full.move("champion", 1, by="ada")
    full.move("champion", 2, by="ada")
    full.move("champion", 2, by="ada")
    assert full.rollback(by="ada").after == "v1"


def test_changes_from_many_sides_are_neither_lost_nor_torn(full: Registry) -> None:
    """Readers see whole states only; every change is in the history."""
    before = len(full.state().history)

    def split(n: int) -> None:
        Registry(full.folder).set_split(n, by=f"p{n}")

    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(split, n) for n in range(40)]
        while not all(d.done() for d in done):
            full.state()
    history = full.state().history[before:]
    assert sorted(float(e.after or -1) for e in history) == list(range(40))
    assert [e.before for e in history[1:]] == [e.after for e in history[:-1]]


@pytest.mark.cli
def test_a_kill_in_the_middle_of_adding_leaves_a_registry_that_works(full: Registry, tmp_path: Path) -> None:
    big = make_artifact(tmp_path / "big", b"\0" * 60_000_000)
    for delay in (0.25, 0.35, 0.5, 0.7):
        process = subprocess.Popen(
            command(["deploy", "registry", "add", big, "--store", full.folder, "-q"]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(delay)
        process.kill()
        process.wait()
        for version in full.state().versions.values():
            full.verified(version.number)
    version, _ = full.add(big)
    assert full.verified(version.number).is_dir()
    assert len({v.digest for v in full.state().versions.values()}) == 4


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    run = make_tuned(tmp_path / "run", quality=True, forgetting=True)
    artifact = make_artifact(tmp_path / "art", run=run)
    code, _, err = unshot_(capsys, "registry", "list", "--store", store)
    assert code == 2 and "no registry there" in err
    code, text, _ = unshot_(capsys, "registry", "add", artifact, "--store", store, "--json", "--by", "ada")
    assert code == 0 and json.loads(text)["version"] == "v1" and json.loads(text)["by"] == "ada"
    code, text, _ = unshot_(capsys, "registry", "add", artifact, "--store", store, "--json")
    assert code == 0 and json.loads(text) | {"new": False} == json.loads(text)
    code, _, err = unshot_(capsys, "promote", "v1", "--store", store)
    assert code == 1 and "review: missing" in err and err.count("\n") == 1
    code, _, err = unshot_(capsys, "promote", "v1", "--store", store, "--waive", "review=read 50 answers")
    assert code == 2 and "--by" in err
    code, _, err = unshot_(capsys, "promote", "v1", "--store", store, "--waive", "reviw=x", "--by", "ada")
    assert code == 2 and "no gate `reviw`" in err
    code, _, err = unshot_(capsys, "promote", "v7", "--store", store)
    assert code == 2 and "no version `v7`" in err
    waive = ["--waive", "review=read 50 answers", "--by", "ada"]
    assert unshot_(capsys, "promote", "v1", "--store", store, *waive)[0] == 0
    code, text, _ = unshot_(capsys, "registry", "show", "champion", "--store", store, "--json")
    shown = json.loads(text)
    assert shown["waivers"][0]["reason"] == "read 50 answers" and shown["aliases"] == ["champion"]
    assert [e["action"] for e in shown["history"]] == ["add", "gates", "promote"]
    (store / "registry.json").write_text("{")
    code, _, err = unshot_(capsys, "rollback", "--store", store)
    assert code == 2 and "registry.json" in err


def test_rollback_is_one_command(full: Registry, unshot: Run) -> None:
    full.move("champion", 1, by="ada")
    full.move("champion", 2, by="ada")
    done = unshot("deploy", "rollback", "--store", full.folder, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["after"] == "v1"
    assert open_registry(full.folder).state().aliases["champion"] == 1


def test_no_command_of_the_registry_imports_torch() -> None:
    code = (
        "import sys, deploy.registry.command, deploy.registry.store; "
        "sys.exit(bool({'torch', 'mlflow', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
