"""Artifacts for the deploy tests: directories as `unshot export` leaves them, around any file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy.registry.store import Registry
from unshot.contracts.gates import Gate
from unshot.contracts.manifest import BaseModel, Manifest, Score
from unshot.contracts.task import Task

LABELS = ["low", "high"]


def make_artifact(
    folder: Path,
    content: bytes | Path = b"weights",
    *,
    run: Path | None = None,
    parity: bool | None = True,
    task: dict[str, Any] | None = None,
) -> Path:
    """An export directory with one model file."""
    folder.mkdir(parents=True)
    model = folder / "model-q8_0.gguf"
    model.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    gates = [] if parity is None else [Gate(name="parity", passed=parity, detail="KL 0.0")]
    manifest = Manifest("export", base=BaseModel("tiny"), run=str(run) if run else None, gates=gates)
    manifest.task = Task.of(task) if task else None
    manifest.finish(folder)
    return folder


def make_tuned(folder: Path, **gates: bool | None) -> Path:
    """A run directory with the given gates."""
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    written = [Gate(name=n, passed=p, detail=f"{n} figure") for n, p in gates.items()]  # type: ignore[arg-type]
    Manifest("tune", gates=written, score=Score("macro_f1", 0.9, 0.8, 1.0, 50)).finish(folder)
    return folder


def three_versions(folder: Path, *, promoted: bool) -> Path:
    """A registry of three versions with all gates passed, promoted in turn or not at all; copy its directory."""
    registry = Registry(folder / "store")
    for n in (1, 2, 3):
        run = make_tuned(folder / f"run{n}", quality=True, forgetting=True, review=True)
        registry.add(make_artifact(folder / f"art{n}", b"%d" % n, run=run))
        if promoted:
            registry.move("champion", n, by="ada")
    return registry.folder
