"""Files that cross rooms: what is written is read back, another version is brought up or refused by name."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from unshot.contracts import schemas
from unshot.contracts.document import DOCUMENTS
from unshot.contracts.manifest import BaseModel, Gate, Manifest, Score, read_manifest, staged
from unshot.contracts.registry import State
from unshot.errors import InputError
from unshot.locks import exclusive

ROOT = Path(__file__).parent.parent
OLD = {
    "format": 1,
    "stage": "tune",
    "config": {
        "base": {"name": "b", "path": None, "license": None, "sha256": {"m": "0"}},
        "tune": {"method": "full"},
    },
    "result": {
        "test": {"metric": "accuracy", "score": 0.5, "low": 0.4, "high": 0.6, "rows": 9, "invalid": 0.0},
        "gates": [{"name": "quality", "passed": None, "detail": "no target"}],
    },
}


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    gates = [Gate(name="parity", passed=True, detail="equal")]
    Manifest("export", base=BaseModel("tiny"), gates=gates, config={"rows": 3}).finish(folder)
    return folder


def written(folder: Path, raw: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return folder


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = read_manifest(made(tmp_path / "a"), stage="export")
    assert found.base == BaseModel("tiny") and found.gates[0].name == "parity" and found.config == {"rows": 3}
    assert found.outputs["a.txt"].bytes == 1 and found.version == Manifest.VERSION and found.hardware.cores


def test_an_old_manifest_says_the_same_in_todays_fields(tmp_path: Path) -> None:
    found = read_manifest(written(tmp_path, OLD), stage="tune")
    assert found.base == BaseModel("b", sha256={"m": "0"}) and found.tune and found.tune.method == "full"
    assert found.score == Score("accuracy", 0.5, 0.4, 0.6, 9) and found.gates[0].passed is None


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ("", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ({}, "version 0 was written by an older unshot"),
        ({**OLD, "format": 99}, "version 99 is newer"),
        ({**OLD, "format": "1"}, "expected a whole number"),
        ({**OLD, "format": True}, "expected a whole number"),
        ({**OLD, "config": [1]}, "not a manifest.json of version 1"),
        ({**OLD, "result": {"test": {"metric": "accuracy"}}}, "not a manifest.json of version 1"),
        ({**OLD, "inputs": {"a": 1}}, "`inputs` is"),
        ({"version": 2, "stage": 3}, "`stage` is 3"),
        ({"version": 2, "stage": "tune", "outputs": {"a": {"bytes": "x", "sha256": "0"}}}, "outputs"),
        ({"version": 2, "stage": "tune", "colour": 1}, "unknown key `colour`"),
        *(
            (
                {"version": 2, "stage": "export", "outputs": {name: {"bytes": 1, "sha256": "0"}}},
                "not a file below",
            )
            for name in ("../registry.json", "/etc/passwd", "a/../../b", "a//b", "", ".", "a\\..\\b", "a/./b")
        ),
    ],
)
def test_a_manifest_that_is_none_is_refused_in_one_line(tmp_path: Path, raw: Any, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        read_manifest(written(tmp_path, raw))
    assert "manifest.json" in str(error.value) and "\n" not in str(error.value)


def test_a_link_out_of_the_directory_is_no_file_of_it(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    secret = tmp_path / "secret"
    secret.write_text("a")
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to(secret)
    with pytest.raises(InputError, match="is a link"):
        read_manifest(folder)


@pytest.mark.parametrize("raw", [None, "{}", json.dumps({"name": "a web app", "version": 3}), "not json"])
def test_overwrite_replaces_only_what_unshot_wrote(tmp_path: Path, raw: str | None) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("years of work")
    if raw is not None:
        written(thesis, raw)
    with pytest.raises(InputError, match="not replaced"), staged(thesis, overwrite=True):
        raise AssertionError("must not get here")
    assert (thesis / "thesis.tex").read_text() == "years of work"


def test_overwrite_keeps_a_file_that_somebody_put_there(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    (folder / "gates.jsonl").write_text("")
    (folder / "notes").mkdir()
    (folder / "notes" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="thesis"), staged(folder, overwrite=True):
        raise AssertionError("must not get here")
    (folder / "notes" / "thesis.tex").unlink()
    with staged(folder, overwrite=True) as work:
        Manifest("export").finish(work)


def test_overwrite_replaces_an_old_artifact_and_an_empty_directory(tmp_path: Path) -> None:
    for folder in (made(tmp_path / "a"), tmp_path / "empty"):
        folder.mkdir(exist_ok=True)
        with staged(folder, overwrite=True) as work:
            (work / "new").write_text("n")
            Manifest("export").finish(work)
        assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "new"]


def test_a_run_killed_between_the_renames_leaves_the_old_artifact(tmp_path: Path) -> None:
    made(tmp_path / "a").rename(tmp_path / ".a.old")
    with pytest.raises(InputError, match="already there"), staged(tmp_path / "a"):
        raise AssertionError("must not get here")
    assert read_manifest(tmp_path / "a").outputs.keys() == {"a.txt"}


def test_every_document_has_its_schema_in_the_docs() -> None:
    assert DOCUMENTS
    for name, schema in schemas.schemas().items():
        kept = json.loads((ROOT / "docs" / "schemas" / name).read_text(encoding="utf-8"))
        assert kept == schema, f"docs/schemas/{name} is stale; run `make docs`"


def test_a_refused_run_leaves_the_lock_of_the_run_that_writes(tmp_path) -> None:
    """The third run at once was let in, and deleted what the first had written so far."""
    with staged(tmp_path / "a") as work:
        (work / "file").write_text("whole")
        for _ in range(2):
            with pytest.raises(InputError, match="another unshot run is writing"), staged(tmp_path / "a"):
                pass
    assert (tmp_path / "a" / "file").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_lock_whose_file_was_removed_while_one_waited_counts_for_nothing(tmp_path) -> None:
    """The lock's file goes with its holder: who waited for it takes the new one, not beside another who did."""
    path, inside, most = tmp_path / "lock", [0], [0]

    def hold() -> None:
        for _ in range(50):
            with exclusive(path, wait=True):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0)
                inside[0] -= 1

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and not path.exists()


def test_half_a_surrogate_pair_in_a_document_is_one_line(tmp_path: Path) -> None:
    """JSON may hold one as an escape; a registry with it was read, and every change of it an internal error."""
    (tmp_path / "registry.json").write_text('{"version": 2, "aliases": {"champion": "\\ud800"}}')
    with pytest.raises(InputError, match="half of a surrogate pair"):
        State.read(tmp_path)
