"""Fixtures: the real embedded model, a tiny random-weight one with the same tokenizer, one tiny run for all tests.

Lanes: `slow` trains or runs a real model or simulates for seconds, `cli` starts the command line in a process of its
own. Both marks are put on by what a test asks for (`SLOW`, `CLI`) or by hand; a test without them that starts the
command line all the same fails.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
# Fixtures that load a model, and that start the command line.
SLOW = {"embedded_model", "tiny_model", "tiny_run"}
CLI = {"unshot_process"}
# Modules of minutes, the longest first.
FIRST = [
    "test_demo",
    "test_walkthrough",
    "test_tune_methods",
    "test_export_gate",
    "test_export_search",
    "test_tune",
]

# Tests run on one machine with others; a hub that is not there must not be waited for.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Meaning is compared where a test asks for it: an embedder that happens to be installed would change every split.
os.environ.setdefault("UNSHOT_EMBEDDER", "off")
# Readings of test rows are recorded for the user's data, not for the tests'.
os.environ.setdefault("UNSHOT_DATA", tempfile.mkdtemp(prefix="unshot-tests-"))
# This checkout is what processes started elsewhere must run, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: one thread each
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ.setdefault(variable, "1")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A module that is slow as a whole is not even imported in the fast lane: it would bring torch and peft."""
    if collection_path.suffix != ".py" or "not slow" not in config.option.markexpr:
        return None
    return "\npytestmark = pytest.mark.slow\n" in collection_path.read_text(encoding="utf-8") or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        asked = set(getattr(item, "fixturenames", ()))
        for names, mark in ((SLOW, pytest.mark.slow), (CLI, pytest.mark.cli)):
            if names & asked:
                item.add_marker(mark)
    # The longest modules first, so that no worker waits for the other at the end.
    items.sort(key=lambda item: FIRST.index(module_of(item)) if module_of(item) in FIRST else len(FIRST))


def module_of(item: pytest.Item) -> str:
    return item.path.stem


@pytest.fixture(autouse=True)
def _lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast test starts no command line of ours."""
    if any(request.node.get_closest_marker(mark) for mark in ("slow", "cli")):
        return

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, args: Any, *more: Any, **settings: Any) -> None:
            words = args if isinstance(args, list | tuple) else [args]
            if any(str(word) == "unshot" or str(word).startswith("unshot.") for word in words):
                pytest.fail("a test that starts the command line needs the mark `cli` (or `slow`)")
            super().__init__(args, *more, **settings)

    monkeypatch.setattr(subprocess, "Popen", Popen)


def measured(check: Callable[[], None], tries: int = 5) -> None:
    """Run a check of times again where it fails: a busy machine is late now and then, a wrong rule each time."""
    for _ in range(tries - 1):
        with contextlib.suppress(AssertionError):
            return check()
    return check()


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A directory that is made once for all workers of a test run; tests only read it."""
    from unshot.locks import exclusive

    base = factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)
    folder, work = root / name, root / f".{name}"
    with exclusive(root / f"{name}.lock", wait=True):
        if not folder.exists():
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            make(work)
            work.rename(folder)
    return folder


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """Directory of SmolLM2-135M-Instruct."""
    from unshot import embedded

    return embedded.ensure(None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path) -> Path:
    """A random 2-layer Llama with the embedded tokenizer, as a Hugging Face directory."""

    def make(folder: Path) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        source = json.loads((embedded_model / "config.json").read_text(encoding="utf-8"))
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=source["vocab_size"],
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=source["bos_token_id"],
            eos_token_id=source["eos_token_id"],
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        for path in embedded_model.iterdir():
            if path.name.startswith(("tokenizer", "special", "chat_template", "generation")):
                shutil.copy(path, folder / path.name)

    return shared(tmp_path_factory, "tiny", make)


@pytest.fixture(scope="session")
def tiny_run(
    unshot: Run, tiny_model: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A real run of `unshot tune` on the tiny model: read it, or change a copy (`shutil.copytree`)."""

    def make(folder: Path) -> None:
        done = unshot(
            "tune", small_data, "--base", tiny_model, "--out", folder / "run", "--epochs", "1", "--rank", "4", "-q",
            "--instruction", "Classify the clause.",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    return shared(tmp_path_factory, "run", make) / "run"


@pytest.fixture(scope="session")
def clauses() -> list[dict[str, Any]]:
    """The demo's labelled rows."""
    text = (ROOT / "unshot" / "demo" / "data.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory, clauses: list[dict[str, Any]]) -> Path:
    """Sixty short rows."""

    def make(folder: Path) -> None:
        rows = sorted(clauses, key=lambda r: len(r["prompt"]))[:60]
        (folder / "small.jsonl").write_text(
            "".join(json.dumps({"prompt": r["prompt"], "completion": r["completion"]}) + "\n" for r in rows),
            encoding="utf-8",
        )

    return shared(tmp_path_factory, "data", make) / "small.jsonl"


Run = Callable[..., subprocess.CompletedProcess[str]]


def run_unshot(*args: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> Any:
    """Run a command line in this process: exit code, stdout and stderr as of a process of its own."""
    from unshot.__main__ import main

    words = [str(a) for a in args]
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        _environment(env),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main(words)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return subprocess.CompletedProcess(["unshot", *words], code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _environment(env: dict[str, str] | None) -> Iterator[None]:
    """The environment as it was, afterwards."""
    before = dict(os.environ)
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def unshot() -> Run:
    """Run the command line in this process: `unshot("plan", "--rate", "1", cwd=...)`."""
    return run_unshot


@pytest.fixture(scope="session")
def unshot_process() -> Run:
    """Run the command line in a process of its own, for what a process is about (imports, signals, a full disk)."""

    def run(*args: str | Path, cwd: Path = ROOT, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(args), cwd=cwd, text=True, capture_output=True, check=False, **kwargs)

    return run


def command(args: Sequence[str | Path]) -> list[str]:
    """The process's arguments for an unshot command line."""
    return [sys.executable, "-m", "unshot", *map(str, args)]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 300) -> None:
    """Poll until `condition()`; fails where the process ends first."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except (OSError, ValueError):  # read while it was being replaced
            pass
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.01)
    raise AssertionError("the condition never came true")
