"""The commands of docs/walkthrough.md, run as they stand there, on a tiny random model."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Run
from unshot.contracts.request_log import read_feedback, read_requests
from unshot.engines.server import free_port

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "walkthrough.md"
# `ab`, `drift` and `retrain` answer by exit code 1 as well.
SHIM = """#!/bin/bash
case "$1 ${{2:-}}" in
  "deploy ab" | "deploy drift" | "deploy retrain")
    "{python}" -m unshot "$@" || {{ code=$?; [ $code = 1 ] || exit $code; }} ;;
  *) exec "{python}" -m unshot "$@" ;;
esac
"""


def commands() -> str:
    """The shell blocks of the page, joined."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return "\n".join(blocks)


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, clauses: list[dict[str, Any]], unshot: Run
) -> Path:
    """What `make demo` leaves, with the tiny model: the case and the baseline's file."""
    folder = tmp_path_factory.mktemp("walkthrough")
    case = folder / "unshot-demo" / "case"
    case.mkdir(parents=True)
    # Short texts: a random model learns nothing from long ones.
    rows = [
        {"prompt": " ".join(r["prompt"].split()[:15]), "completion": json.dumps({"risk": r["completion"]})}
        for r in clauses
    ]
    (case / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    (case / "few_shot.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:2]), encoding="utf-8")
    labels = sorted({r["completion"] for r in clauses})
    (case / "unshot.toml").write_text(
        '[task]\nname = "clauses"\nsystem = "Classify the clause."\nexamples = "few_shot.jsonl"\n'
        'instruction = "Classify."\nanswer_field = "risk"\n'
        f"labels = {json.dumps(labels)}\n[candidate]\nmodel = {json.dumps(str(tiny_model))}\n"
        '[tune]\nepochs = 2\nforgetting = false\nrobustness = false\nembedder = "off"\n',
        encoding="utf-8",
    )
    baseline = folder / "unshot-demo" / "baseline"
    done = unshot("export", tiny_model, "--to", "gguf:q8_0", "--check-rows", "1", "--out", baseline, "-q")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def walked(place: Path) -> tuple[Path, str]:
    """The directory after the whole walkthrough, and what it printed."""
    shim = place / "bin" / "unshot"
    shim.parent.mkdir()
    shim.write_text(SHIM.format(python=sys.executable))
    shim.chmod(0o755)
    script = place / "walkthrough.sh"
    text = commands()
    assert "8765" in text
    # The page's port may be taken on this machine.
    text = text.replace("8765", str(free_port()))
    script.write_text("set -euo pipefail\n" + text, encoding="utf-8")
    process = subprocess.Popen(
        ["bash", str(script)], cwd=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, env=os.environ | {"PATH": f"{shim.parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=1450)
    finally:
        # The gateway of a walkthrough that broke off.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    assert process.returncode == 0, out[-3000:] + err[-5000:]
    return place / "walk", out


@pytest.mark.timeout(1500)
def test_the_walkthrough_runs_as_it_is_written(walked: tuple[Path, str]) -> None:
    walk, out = walked
    lines = list(read_requests(walk / "log"))
    assert len({line.id for line in lines if line.assigned == "candidate"}) > 20
    assert len(read_feedback(walk / "log")) == 118
    proposal = json.loads((walk / "retrain" / "proposal.json").read_text())
    assert proposal["rows"]["added"] > 60 and proposal["champion"] == "v1"
    assert (walk / "ab" / "report.html").is_file() and (walk / "drift" / "drift.json").is_file()
    state = json.loads((walk / "registry" / "registry.json").read_text())
    assert state["aliases"]["champion"] == 1
    moves = [(e["action"], e["after"]) for e in state["history"] if e["action"] in ("promote", "rollback")]
    assert moves == [("promote", "v1"), ("promote", "v2"), ("rollback", "v1")]
    # A random model breaks the schema, so that the baseline answers; who was tried first is in the log.
    tried = [line.version for line in lines if line.arm == "candidate"]
    assert tried[0] == "v1" and "v2" in tried and tried[-1] == "v1", tried
    assert len([line for line in out.splitlines() if line.startswith("{'")]) == 3


def texts(path: Path) -> set[str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {next(m["content"] for m in row["messages"] if m["role"] == "user") for row in rows}


@pytest.mark.timeout(1500)
def test_the_sealed_test_was_not_trained_on_and_the_same_command_goes_on(
    walked: tuple[Path, str], unshot: Run
) -> None:
    walk, _ = walked
    sealed = texts(walk / "run" / "splits" / "test.jsonl")
    splits = [
        texts(walk / "retrain" / "run" / "splits" / f"{n}.jsonl") for n in ("train", "validation", "test")
    ]
    assert sealed and not sealed & set().union(*splits)
    fresh = texts(walk / "retrain" / "data" / "fresh.jsonl")
    assert len(fresh) > 15 and not fresh & set().union(*splits)
    first = json.loads((walk / "retrain" / "proposal.json").read_text())
    shutil.rmtree(walk / "retrain" / "eval-fresh")
    again = unshot(
        "deploy", "retrain", "walk/log", "--store", "walk/registry", "--data", "walk/known.jsonl",
        "--check-rows", "8", "--out", "walk/retrain", "--json", "-q", cwd=walk.parent,
    )  # fmt: skip
    report = json.loads(again.stdout)
    assert [s["stage"] for s in report["stages"] if s["seconds"]] == ["eval-fresh"]
    assert (report["verdict"], report["rows"]) == (first["verdict"], first["rows"])
