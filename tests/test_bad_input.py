"""Bad input gets one clear line, the right exit code, no traceback, and nothing under the final name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, Run

DEMO = ROOT / "unshot" / "demo"
PLAN = (
    "plan",
    "--prompt",
    DEMO / "few_shot.jsonl",
    "--inputs",
    DEMO / "data.jsonl",
    "--baseline",
    "gpt-4o",
    "--rate",
    "1",
)
GOOD = '{"prompt": "a clause", "completion": "low"}\n'


def refused(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    """One line on stderr that names what, where and what to do; nothing on stdout."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "internal error" not in lines[0]
    assert done.stdout == ""
    for part in parts:
        assert part in lines[0], lines[0]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        pytest.param("none.jsonl", None, ("none.jsonl", "no such file"), id="missing file"),
        pytest.param("d.jsonl", b"", ("d.jsonl", "empty"), id="empty file"),
        pytest.param("d.jsonl", b" \n\n", ("d.jsonl", "empty"), id="blank file"),
        pytest.param(
            "d.jsonl",
            (GOOD * 2 + '{"prompt": \n').encode(),
            ("line 3", "not valid JSON"),
            id="bad JSONL line",
        ),
        pytest.param("d.jsonl", b"[1, 2]\n", ("line 1", "expected an object"), id="not an object"),
        pytest.param(
            "d.jsonl",
            b'{"messages": [{"role": "bot", "content": "x"}, {"role": "assistant", "content": "y"}]}\n',
            ("line 1", "'bot'", "accepted: system, user, assistant"),
            id="wrong role",
        ),
        pytest.param("d.jsonl", b'{"messages": []}\n', ("line 1", "non-empty list"), id="no messages"),
        pytest.param(
            "d.jsonl",
            b'{"question_text": "x"}\n',
            ("line 1", "question_text", "--input-column"),
            id="no known column",
        ),
        pytest.param(
            "d.jsonl", (GOOD + '{"prompt": "a"}\n').encode(), ("line 2", "no answer"), id="row without answer"
        ),
        pytest.param(
            "d.jsonl",
            GOOD.encode() + b'{"prompt": "caf\xe9", "completion": "low"}\n',
            ("not UTF-8", "iconv"),
            id="non-UTF-8",
        ),
        pytest.param(
            "d.csv",
            b"prompt,completion\nan unquoted, comma,low\n",
            ("line 2", "quote"),
            id="CSV with stray comma",
        ),
        pytest.param(
            "d.jsonl", GOOD.encode() * 20, ("1 distinct inputs", "at least 10"), id="one input only"
        ),
    ],
)
def test_a_bad_data_file_is_refused(
    unshot: Run, tmp_path: Path, name: str, content: bytes | None, parts: tuple[str, ...]
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    done = unshot("tune", path, "--base", "smollm2-135m", "--out", tmp_path / "run")
    refused(done, 2, *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        pytest.param(
            (*PLAN, "--model", "llama-3.1-9b"), ("llama-3.1-9b", "llama-3.1-8b"), id="unknown model"
        ),
        pytest.param((*PLAN, "--gpu", "h100-smx"), ("h100-smx", "h100-sxm"), id="unknown GPU"),
        pytest.param((*PLAN, "--baseline", "gpt-4oo"), ("gpt-4oo", "gpt-4o"), id="unknown priced model"),
        pytest.param((*PLAN[:-1], "0"), ("rate", "expected a number > 0"), id="rate 0"),
        pytest.param((*PLAN[:-1], "-3"), ("rate", "expected a number > 0"), id="negative rate"),
        pytest.param((*PLAN[:-1], "nan"), ("rate", "NaN"), id="NaN"),
        pytest.param((*PLAN[:-1], "many"), ("--rate", "many"), id="rate is no number"),
        pytest.param(
            ("plan", "--prompt", "{tmp}", "--baseline", "gpt-4o", "--rate", "1"),
            ("no prompts there",),
            id="directory without prompts",
        ),
        pytest.param(
            ("tune", "unshot", "--base", "smollm2-135m", "--out", "{tmp}/r"),
            ("unshot", "directory"),
            id="directory for a file",
        ),
        pytest.param(
            ("tune", DEMO / "data.jsonl", "--base", "smolm2-135m", "--out", "{tmp}/r"),
            ("smolm2-135m", "smollm2-135m"),
            id="unknown base",
        ),
        pytest.param(
            ("export", "smollm2-135m", "--to", "gguf:q9_0", "--out", "{tmp}/r"),
            ("q9_0", "q8_0"),
            id="unknown format",
        ),
        pytest.param(
            ("export", "{tmp}", "--to", "gguf:q8_0", "--out", "{tmp}/r"),
            ("config.json",),
            id="no run directory",
        ),
        pytest.param(
            (
                "bench",
                "--baseline",
                "ggml:a",
                "--candidate",
                "gguf:b",
                "--data",
                DEMO / "data.jsonl",
                "--out",
                "{tmp}/r",
            ),
            ("ggml", "gguf"),
            id="unknown engine",
        ),
        pytest.param(
            (
                "bench",
                "--baseline",
                "gguf:none.gguf",
                "--candidate",
                "gguf:none.gguf",
                "--data",
                DEMO / "data.jsonl",
                "--out",
                "{tmp}/r",
            ),
            ("none.gguf", "no such file"),
            id="missing artifact",
        ),
        pytest.param(("benhc",), ("benhc", "bench"), id="unknown command"),
        pytest.param(("tune", DEMO / "data.jsonl"), ("--out",), id="missing option"),
    ],
)
def test_a_bad_flag_is_refused(
    unshot: Run, tmp_path: Path, arguments: tuple[str | Path, ...], parts: tuple[str, ...]
) -> None:
    done = unshot(*(str(a).replace("{tmp}", str(tmp_path)) for a in arguments))
    refused(done, 2, *parts)
    assert not (tmp_path / "r").exists()


def test_in_json_mode_the_error_is_json_on_stdout(unshot: Run) -> None:
    done = unshot(*PLAN, "--gpu", "h100-smx", "--json")
    assert done.returncode == 2
    assert "h100-sxm" in json.loads(done.stdout)["error"]


def test_a_corrupted_adapter_is_refused(unshot: Run, tiny_run: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_run, damaged)
    adapter = damaged / "adapter" / "adapter_model.safetensors"
    raw = bytearray(adapter.read_bytes())
    raw[-100] ^= 0x40
    adapter.write_bytes(raw)
    done = unshot("export", damaged, "--to", "gguf:f32", "--out", tmp_path / "out")
    refused(done, 2, "adapter_model.safetensors", "does not match its hash")


def test_a_manifest_that_does_not_match_is_refused(unshot: Run, tiny_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_run, other)
    (other / "splits" / "test.jsonl").unlink()
    refused(
        unshot("export", other, "--to", "gguf:f32", "--out", tmp_path / "out"), 2, "test.jsonl", "missing"
    )
    (other / "manifest.json").write_text("{}")
    refused(unshot("export", other, "--to", "gguf:f32", "--out", tmp_path / "out"), 2, "manifest.json")


def test_an_existing_output_is_kept(unshot: Run, tiny_run: Path, tiny_model: Path, small_data: Path) -> None:
    before = (tiny_run / "manifest.json").read_bytes()
    refused(
        unshot("tune", small_data, "--base", tiny_model, "--out", tiny_run), 2, "already there", "--overwrite"
    )
    assert (tiny_run / "manifest.json").read_bytes() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_is_one_line_and_leaves_nothing(
    unshot_process: Run, tiny_model: Path, small_data: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        done = unshot_process(
            "tune",
            small_data,
            "--base",
            tiny_model,
            "--out",
            disk / "run",
            "--epochs",
            "1",
            "--no-gates",
            "-q",
        )
        refused(done, 3, "no space left", "free some")
        assert not (disk / "run").exists()
    finally:
        subprocess.run(["umount", disk], check=True)
