"""In a folder that holds a `planner.py`, a `tune/` or a `click.py`, it is our modules that run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.golden import golden_server
from unshot import child
from unshot.console import Output
from unshot.stages import run_stage

pytestmark = pytest.mark.cli

CASE = ROOT / "unshot" / "demo" / "unshot.toml"
ROOMS = sorted(child.ROOMS - {"unshot"})
THEIRS = "raise SystemExit('this is the file of the user')\n"


def clash(folder: Path, names: list[str]) -> Path:
    """A folder of modules with these names, every second one a package."""
    for number, name in enumerate(names):
        path = folder / (f"{name}.py" if number % 2 else f"{name}/__init__.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(THEIRS)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The names of our rooms, of libraries and of modules of the standard library."""
    return clash(tmp_path / "work", [*ROOMS, "click", "rich", "msgspec", "json", "errno"])


@pytest.mark.parametrize("module", ["unshot", "unshot.child"])
def test_python_m_unshot_runs_our_modules(folder: Path, module: str) -> None:
    command = [sys.executable, "-m", "unshot"] if module == "unshot" else child.command("unshot")
    done = subprocess.run(
        [*command, "plan", "--case", CASE, "--json"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"]


def test_a_python_path_with_the_same_names_runs_our_modules(tmp_path: Path) -> None:
    folder = clash(tmp_path / "work", ROOMS)
    path = os.pathsep.join([str(folder), str(ROOT)])
    for command in ([sys.executable, "-m", "unshot"], child.command("unshot")):
        done = subprocess.run(
            [*command, "plan", "--case", CASE, "--json"], cwd=folder, env={**os.environ, "PYTHONPATH": path},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_a_stage_runs_our_modules(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    done = run_stage(
        "plan", ["plan", "--case", str(CASE)], tmp_path / "plan", Output(verbosity=-1, json_mode=True), overwrite=False
    )  # fmt: skip
    assert done.exit_code == 0 and (tmp_path / "plan" / "plan.json").is_file()


def test_child_processes_run_our_modules(folder: Path) -> None:
    """Each module that some part of unshot starts in a process of its own fails for its missing arguments, in our
    file."""
    for module in ("export.worker", "export.speed", "export.kquants"):
        done = subprocess.run(
            child.command(module), cwd=folder, env=child.environment(), capture_output=True, text=True, check=False
        )  # fmt: skip
        assert "the file of the user" not in done.stderr
        assert str(ROOT / module.replace(".", "/")) in done.stderr, done.stderr


def test_client_processes_run_our_modules(folder: Path, tmp_path: Path) -> None:
    with golden_server(ttft_ms=1, itl_ms=1, tokens=2) as url:
        done = subprocess.run(
            [
                sys.executable, "-m", "unshot", "bench", "load", url, "--requests", "20", "--load", "constant:100",
                "--processes", "2", "--out", str(tmp_path / "r"), "--json", "-q",
            ],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert "the file of the user" not in done.stderr
    assert json.loads(done.stdout)["figures"]["answered"] == 20


def test_a_program_that_imports_unshot_keeps_its_own_modules(tmp_path: Path) -> None:
    (tmp_path / "planner.py").write_text("MINE = True\n")
    code = "import unshot.case, planner; assert planner.MINE"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
