"""`unshot run`: the stages of a case one after the other, up to the first gate that says no."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unshot.__main__ import main
from unshot.contracts.manifest import Gate, Manifest
from unshot.pipeline import PipelineRecord

CASE = """
[task]
system = "Say which risk the clause carries."
instruction = "Which risk?"
data = "rows.jsonl"
target = {target}

[baseline]
model = "smollm2-135m"
gpu = "cpu"

[candidate]
model = "{base}"
gpu = "cpu"

[tune]
epochs = 1
rank = 2
forgetting = false
robustness = false
embedder = "off"

[export]
to = ["gguf:q8_0"]
"""


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(["run", *map(str, args), "-q"])
    return int(stop.value.code or 0), capsys.readouterr().err


@pytest.fixture
def case(tmp_path: Path, small_data: Path, tiny_model: Path) -> Path:
    (tmp_path / "rows.jsonl").write_bytes(small_data.read_bytes())
    path = tmp_path / "unshot.toml"
    path.write_text(CASE.format(target=0.99, base=tiny_model))
    return path


@pytest.mark.slow
def test_the_first_failed_gate_stops_it_and_the_same_command_says_so_again(
    case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    # A random model misses its target.
    made = Manifest("plan")
    (out / "plan").mkdir(parents=True)
    made.finish(out / "plan")
    code, said = run(capsys, "--case", case, "--out", out, "--until", "export")
    assert code == 1 and "stopped after tune: gate quality failed" in said
    record = PipelineRecord.read(out)
    assert [line.stage for line in record.stages] == ["plan", "tune"] and record.verdict is None
    assert "gate quality failed" in (out / "index.html").read_text() and not (out / "artifacts").exists()
    before = (out / "run" / "manifest.json").read_bytes()
    assert run(capsys, "--case", case, "--out", out)[0] == 1
    assert (out / "run" / "manifest.json").read_bytes() == before


def test_a_case_that_changed_is_not_mixed_with_what_is_there(
    case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for stage in ("plan", "run"):
        (out / stage).mkdir(parents=True)
        gates = [Gate(name="quality", passed=False, detail="0.1")] if stage == "run" else []
        Manifest("tune" if stage == "run" else "plan", gates=gates).finish(out / stage)
    assert run(capsys, "--case", case, "--out", out, "--until", "tune")[0] == 1
    with (tmp_path / "rows.jsonl").open("a") as handle:
        handle.write(json.dumps({"prompt": "x", "completion": "ip"}) + "\n")
    code, said = run(capsys, "--case", case, "--out", out, "--until", "tune")
    assert code == 2 and "its data changed since" in said


def test_a_case_without_a_gguf_target_is_refused_before_any_work(
    case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case.write_text(case.read_text().replace("gguf:q8_0", "onnx:fp32"))
    code, said = run(capsys, "--case", case, "--out", tmp_path / "out")
    assert code == 2 and "no gguf target" in said and not (tmp_path / "out" / "plan").exists()
