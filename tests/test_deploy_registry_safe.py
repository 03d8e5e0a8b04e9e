"""The registry against several hands, damaged files and versions whose files are gone."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deploy.registry.store import Registry
from tests.deploy_cases import make_artifact, three_versions
from tests.logs import run_here
from unshot.contracts.registry import State
from unshot.errors import InputError


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_versions(tmp_path_factory.mktemp("registry"), promoted=True)


@pytest.fixture()
def full(stored: Path, tmp_path: Path) -> Registry:
    """Three versions with all gates passed, promoted in turn."""
    return Registry(shutil.copytree(stored, tmp_path / "store"))


def at_once(count: int, work: Callable[[], Any]) -> list[Any]:
    """What `work` gave or raised in several threads that begin together."""
    barrier = threading.Barrier(count)

    def one() -> Any:
        barrier.wait()
        try:
            return work()
        except InputError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return [f.result() for f in [pool.submit(one) for _ in range(count)]]


def test_additions_of_one_artifact_at_once_are_one_version(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "art", b"\0" * 2_000_000)
    found = at_once(6, lambda: Registry(tmp_path / "store").add(artifact))
    assert sorted(new for _, new in found) == [False] * 5 + [True]
    state = Registry(tmp_path / "store").state()
    assert list(state.versions) == [1] and [e.action for e in state.history].count("add") == 1
    assert {p.name for p in (tmp_path / "store" / "versions").glob("v*")} == {"v1"}


def test_rollbacks_at_once_go_back_one_version(full: Registry) -> None:
    found = at_once(4, lambda: Registry(full.folder).rollback(by="ada", champion=3))
    assert sum(not isinstance(f, InputError) for f in found) == 1
    assert full.state().aliases["champion"] == 2
    assert [e.action for e in full.state().history].count("rollback") == 1


def test_a_second_rollback_within_seconds_says_from_where(
    full: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ["--store", full.folder]
    assert run_here(capsys, "deploy", "rollback", *store).code == 0
    again = run_here(capsys, "deploy", "rollback", *store)
    assert again.code == 2 and "--from v2" in again.err and full.state().aliases["champion"] == 2
    assert run_here(capsys, "deploy", "rollback", *store, "--from", "v3").code == 2
    assert run_here(capsys, "deploy", "rollback", *store, "--from", "v2").code == 0
    assert full.state().aliases["champion"] == 1


@pytest.mark.parametrize("how", ["gone", "changed", "manifest", "directory"])
def test_a_version_whose_files_are_not_the_added_ones_is_not_promoted(full: Registry, how: str) -> None:
    folder = full.artifact(1)
    model = folder / "model-q8_0.gguf"
    if how == "gone":
        model.unlink()
    elif how == "changed":
        model.write_bytes(b"X")
    elif how == "manifest":
        (folder / "manifest.json").unlink()
    else:
        folder.rename(folder.with_name("elsewhere"))
    before = full.path.read_bytes()
    with pytest.raises(InputError, match="v1"):
        full.move("champion", 1, by="ada")
    assert full.path.read_bytes() == before


def test_a_split_needs_a_registry_and_a_share(
    full: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_here(capsys, "deploy", "split", "10", "--store", tmp_path / "none")
    assert done.code == 2 and "no registry there" in done.err and not (tmp_path / "none").exists()
    for bad in ("nan", "inf", "-1", "101", "1e400"):
        assert run_here(capsys, "deploy", "split", "--store", full.folder, "--", bad).code == 2, bad
    assert full.state().split is None
    with pytest.raises(InputError, match="share"):
        full.set_split(float("nan"), by="ada")
    assert run_here(capsys, "deploy", "registry", "init", "--store", tmp_path / "none").code == 0
    assert run_here(capsys, "deploy", "split", "10", "--store", tmp_path / "none").code == 0
    assert run_here(capsys, "deploy", "registry", "init", "--store", full.folder).code == 0
    assert len(full.state().versions) == 3


HOSTILE_NAMES = ("../../registry.json", "/etc/passwd", "a/../../b", "..", "a\\..\\b", "")


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_name_out_of_the_artifact_is_refused(
    full: Registry, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = make_artifact(tmp_path / "bad")
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["outputs"][name] = manifest["outputs"].pop("model-q8_0.gguf")
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    before = full.path.read_bytes()
    done = run_here(capsys, "deploy", "registry", "add", artifact, "--store", full.folder)
    assert done.code == 2 and "not a file below" in done.err and full.path.read_bytes() == before


def test_a_directory_that_links_out_is_refused(full: Registry, tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "bad")
    outside = tmp_path / "outside"
    outside.mkdir()
    (artifact / "model-q8_0.gguf").rename(outside / "model.gguf")
    (artifact / "sub").symlink_to(outside)
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["outputs"]["sub/model.gguf"] = manifest["outputs"].pop("model-q8_0.gguf")
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="link"):
        full.add(artifact)


ODD = (None, 3, "x", [], [1], {"a": 1}, True, 1.5, [[]], {"": None})


@pytest.mark.parametrize(
    "field", ["stage", "outputs", "inputs", "gates", "task", "base", "result", "version"]
)
def test_odd_manifests_are_bad_input(
    full: Registry, tmp_path: Path, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = make_artifact(tmp_path / "odd")
    good = json.loads((artifact / "manifest.json").read_text())
    for value in ODD:
        (artifact / "manifest.json").write_text(json.dumps({**good, field: value}))
        done = run_here(capsys, "deploy", "registry", "add", artifact, "--store", full.folder)
        assert done.code in (0, 2) and done.err.count("\n") <= 1 + (done.code == 0), (value, done.err)


@pytest.mark.parametrize(
    "field", ["versions", "aliases", "earlier", "split", "history", "version", "rollout"]
)
def test_an_odd_registry_is_bad_input_and_stays_as_it_is(
    full: Registry, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.loads(full.path.read_text())
    for value in (*ODD, {"champion": 9}, [9]):
        text = json.dumps({**good, field: value})
        full.path.write_text(text)
        for command in (["registry", "list"], ["registry", "show", "champion"]):
            done = run_here(capsys, "deploy", *command, "--store", full.folder)
            assert done.code in (0, 2), (value, done.err)
        assert full.path.read_text() == text


def test_a_registry_of_version_1_is_read(full: Registry) -> None:
    raw = json.loads(full.path.read_text())
    raw.pop("version")
    raw.pop("rollout", None)
    raw["format"] = 1
    for version in raw["versions"].values():
        version["scores"] = {"tune": {"score": 0.9}, "bench": {"verdict": "yes", "reason": "so"}}
        version["lineage"]["tune"]["data"] = []
    full.path.write_text(json.dumps(raw))
    state = full.state()
    assert state.version == State.VERSION and len(state.versions) == 3
    assert state.versions[1].scores.bench is not None and state.versions[1].scores.bench.verdict == "yes"
    full.rollback(by="ada")
    assert json.loads(full.path.read_text())["version"] == State.VERSION
