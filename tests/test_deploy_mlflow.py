"""The registry in MLflow, on a local SQLite file. MLflow is an extra of its own: `pip install 'unshot[mlflow]'`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("mlflow", reason="MLflow is not installed (extra `mlflow`)")

from deploy.registry import open_registry
from tests.deploy_cases import make_artifact, make_tuned
from unshot.errors import GateError, OutsideError


def test_versions_aliases_and_history_live_in_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    registry = open_registry(tmp_path / "risk", tracking=uri)
    run = make_tuned(tmp_path / "run", quality=True, forgetting=True, review=True)
    assert registry.add(make_artifact(tmp_path / "a1", b"one", run=run), by="ada")[0].name == "v1"
    assert registry.add(make_artifact(tmp_path / "a2", b"two"), by="ada")[0].name == "v2"
    assert not registry.add(tmp_path / "a2", by="ada")[1]
    before = registry.stamp()
    registry.move("champion", 1, by="ada")
    with pytest.raises(GateError, match="quality: missing"):
        registry.move("champion", 2, by="ada")
    registry.move("challenger", 2, by="ada")
    registry.set_split(10, by="ada")
    # Another machine: nothing but the address.
    shutil.rmtree(tmp_path / "risk")
    other = open_registry(tmp_path / "risk", tracking=uri)
    state = other.state()
    assert state.aliases == {"champion": 1, "challenger": 2} and state.split == 10
    assert [e.action for e in state.history] == ["add", "add", "gates", "promote", "promote", "split"]
    assert (other.verified(1) / "model-q8_0.gguf").read_bytes() == b"one"
    assert other.stamp() != before
    assert other.rollback(by="bob").after is None
    assert "champion" not in other.state().aliases
    from mlflow import MlflowClient

    model = MlflowClient(tracking_uri=uri, registry_uri=uri).get_registered_model("risk")
    assert model.aliases == {"challenger": 2} or model.aliases == {"challenger": "2"}


def test_an_address_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutsideError, match="MLflow at"):
        open_registry(tmp_path / "risk", tracking="nonsense://x").state()
