"""The command line as a whole: what it imports, what its help says, and that the documents match it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT, Run
from unshot.__main__ import EXTRAS, describe
from unshot.cli import COMMANDS
from unshot.demo.command import copy_case, stages_of
from unshot.reference import reference

HEAVY = {"torch", "transformers", "onnxruntime", "peft", "optimum", "llama_cpp"}


def imported(*arguments: str) -> set[str]:
    """Top-level modules a Python process imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = re.findall(r"^import time:\s+\d+ \|\s+\d+ \| +(\S+)$", done.stderr, flags=re.MULTILINE)
    assert "unshot.cli" in names
    return {name.split(".")[0] for name in names}


@pytest.mark.cli
def test_the_command_line_imports_nothing_heavy() -> None:
    assert not imported("-c", "import unshot.cli") & HEAVY
    assert not imported("-m", "unshot", "--help") & (HEAVY | {"rich", "numpy", "msgspec"})


@pytest.mark.cli
def test_plan_imports_nothing_heavy() -> None:
    demo = str(ROOT / "unshot" / "demo" / "unshot.toml")
    light = HEAVY | {"pydantic", "rich", "scipy"}
    assert not imported("-m", "unshot", "plan", "--case", demo, "--json") & light


def test_help_lists_every_command_with_its_exit_codes(unshot: Run) -> None:
    text = unshot("--help").stdout
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", text, flags=re.MULTILINE)
    assert "Exit codes: 0 done, 1" in text


GROUPS = {
    "data": ("check", "split"),
    "deploy": ("ab", "drift", "promote", "retrain", "rollback", "serve", "split"),
}
BELOW = [f"{group} {name}" for group, names in GROUPS.items() for name in names]
BELOW += [f"deploy registry {name}" for name in ("add", "list", "show")]


@pytest.mark.parametrize("name", [*(n for n in COMMANDS if n not in GROUPS), *BELOW])
def test_every_command_takes_the_common_flags(unshot: Run, name: str) -> None:
    text = unshot(*name.split(), "--help").stdout
    for flag in ("--json", "-q, --quiet", "-v, --verbose"):
        assert flag in text


def test_the_command_reference_is_what_click_says() -> None:
    written = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert written == reference(), "run `make docs`"


def test_init_writes_a_case_that_plan_refuses_only_for_its_missing_files(unshot: Run, tmp_path: Path) -> None:
    done = unshot("init", tmp_path / "unshot.toml", "--json")
    assert json.loads(done.stdout) == {"path": str(tmp_path / "unshot.toml")}
    again = unshot("init", tmp_path / "unshot.toml")
    assert again.returncode == 2 and "already there" in again.stderr
    plan = unshot("plan", "--case", tmp_path / "unshot.toml")
    assert plan.returncode == 2 and "few_shot.jsonl: no such file" in plan.stderr


def readme_commands(program: str) -> list[str]:
    """Lines of the README's shell blocks that start with `program`, continuation lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.startswith(f"{program} ")]


def test_the_stage_commands_of_the_readme_are_those_the_demo_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's own test runs them; here the README's text is held to them."""
    shown = [c for c in readme_commands("unshot") if "unshot-demo" in c]
    monkeypatch.chdir(tmp_path)
    copy_case(Path("unshot-demo/case"))
    demo = stages_of(Path("unshot-demo/case/unshot.toml"), Path("unshot-demo"))
    run = [
        " ".join(["unshot", *demo.arguments(s), "--out", str(demo.folder(s))]) for s in demo.stages("bench")
    ]
    assert shown == run


@pytest.mark.slow
def test_the_other_commands_of_the_readme_run(unshot: Run, tmp_path: Path) -> None:
    others = [c for c in readme_commands("unshot") if "unshot-demo" not in c]
    assert others
    for line in others:
        arguments = [
            str(ROOT / word) if word.startswith("unshot/demo/") else word for word in line.split()[1:]
        ]
        done = unshot(*arguments, cwd=tmp_path)
        assert done.returncode == 0, f"{line}: {done.stderr}"


def test_make_demo_and_make_test_are_the_two_commands() -> None:
    assert readme_commands("make") == ["make demo", "make test"]
    for target, part in (("demo", "-m unshot demo --out unshot-demo"), ("test", "-m pytest")):
        done = subprocess.run(
            ["make", "-n", target, "PY=python"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert part in done.stdout


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("torch.nn", "needs torch, which is not installed; run `pip install 'unshot[tune]'`"),
        ("uvicorn", "'unshot[deploy]'"),
        ("something", "needs something, which is not installed; run `pip install 'unshot[all]'`"),
        ("tune.gone", "internal error"),
    ],
)
def test_a_library_that_is_not_there_is_named_with_its_extra(module: str, words: str) -> None:
    assert words in describe(ModuleNotFoundError(f"No module named {module!r}", name=module))


def test_a_message_that_quotes_a_huge_value_is_still_a_line(unshot: Run) -> None:
    for value in ("a" * 100_000, "9" * 100_000, "\u202e" * 100_000):
        done = unshot("plan", "--gpu-price", value, "--json")
        assert done.returncode == 2 and len(done.stderr) < 20_000, len(done.stderr)
        assert "characters ..." in done.stderr and "give dollars per hour" in done.stderr
        assert len(json.loads(done.stdout)["error"]) < 3000


def test_every_extra_that_is_advised_exists() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    assert {*EXTRAS.values(), "all"} <= set(known)
