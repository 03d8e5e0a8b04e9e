"""Build the wheel and try it in an empty environment, without torch, in a folder full of name clashes.

`make wheel-test`. The planner's libraries alone are installed; constraints.txt pins them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLASHES = (
    "planner.py",
    "tune.py",
    "export.py",
    "deploy.py",
    "bench/__init__.py",
    "click.py",
    "rich/__init__.py",
)
PLAN = (
    "plan", "--prompt", "few_shot.jsonl", "--inputs", "data.jsonl", "--baseline", "gpt-4o", "--rate", "2",
    "--model", "llama-3.1-8b", "--gpu", "l4", "--approximate",
)  # fmt: skip


def main() -> None:
    """Raises `CalledProcessError` or `AssertionError` if the wheel does not do what the checkout does."""
    with tempfile.TemporaryDirectory(prefix="unshot-wheel-") as name:
        folder = Path(name)
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
        wheel = build(folder / "dist", environment)
        python = install(folder / "env", wheel, environment)
        work = folder / "work"
        for clash in CLASHES:
            path = work / clash
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("raise SystemExit('this is the file of the user')\n", encoding="utf-8")
        for data in ("few_shot.jsonl", "data.jsonl"):
            shutil.copy(ROOT / "unshot" / "demo" / data, work / data)
        script = str(python.with_name("unshot"))
        for program in ([script], [str(python), "-m", "unshot"]):
            for arguments in (
                ("--help",), ("--version",), ("init", "--overwrite"), PLAN, (*PLAN, "--case", "unshot.toml", "--json"),
                (*PLAN, "--out", "plan", "--overwrite"), ("tune", "--help"), ("deploy", "registry", "list", "--help"),
            ):  # fmt: skip
                done = subprocess.run(
                    [*program, *arguments],
                    cwd=work,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                line = " ".join(["unshot", *arguments])
                assert done.returncode == 0, f"{line}: exit code {done.returncode}\n{done.stderr}"
                assert "the file of the user" not in done.stdout + done.stderr, line
                print(f"ok: {line}")
        # Without the extra, a command that needs it says so in one line.
        done = subprocess.run(
            [script, "tune", "data.jsonl", "--base", "smollm2-135m", "--out", "run"],
            cwd=work, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 3 and "unshot[tune]" in done.stderr, done.stderr
        assert "internal error" not in done.stderr, done.stderr
        print("ok: unshot tune says what to install")


def build(folder: Path, environment: dict[str, str]) -> Path:
    """The wheel of this checkout, built from a copy: a `build/` of an earlier one would go into it."""
    source = folder.with_name("source")
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("unshot", "planner", "tune", "export", "bench", "deploy"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder), str(source)],
        env=environment, check=True,
    )  # fmt: skip
    (wheel,) = folder.glob("unshot-*.whl")
    return wheel


def install(folder: Path, wheel: Path, environment: dict[str, str]) -> Path:
    """A new environment with the wheel and what it needs; its interpreter."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    constraints = str(ROOT / "constraints.txt")
    subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "-c", constraints, str(wheel)],
        env=environment,
        check=True,
    )
    return python


if __name__ == "__main__":
    main()
