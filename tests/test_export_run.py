"""`unshot export` from the command line: what it writes, what it refuses, and what a crash leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("llama_cpp")

from export import gguf_file, kquants, write
from tests.conftest import ROOT, command, wait_for
from tests.export_cases import make_run
from tests.tiny_models import make
from unshot.__main__ import main
from unshot.contracts.manifest import read_manifest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tuned")
    return make_run(make("llama", root / "base"), root / "run")


def unshot(capsys, *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["export", *map(str, args)])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def failure(capsys, *args: object) -> tuple[int, str]:
    code, _, err = unshot(capsys, *args)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err
    return code, lines[0]


def test_writes_what_it_says_and_proves_it(tuned, tmp_path, capsys) -> None:
    out = tmp_path / "art"
    code, text, _ = unshot(
        capsys, tuned, "--to", "gguf:q8_0", "--to", "gguf:f32", "--out", out, "--json", "-q"
    )
    assert code == 0
    result = json.loads(text)
    assert result["files"] == {"gguf:q8_0": "model-q8_0.gguf", "gguf:f32": "model-f32.gguf"}
    assert all(report["passed"] for report in result["parity"])
    manifest = read_manifest(out, stage="export")
    assert set(manifest.outputs) >= {"model-q8_0.gguf", "model-f32.gguf", "parity.json"}
    assert manifest.base and manifest.base.sha256 and manifest.run
    figures = json.loads((out / "parity.json").read_text())["reports"][1]["figures"]
    assert figures["tokens"]["strings"] > 600 and figures["tokens"]["mismatches"] == 0
    assert figures["logits"]["cosine"] > 0.9999 and figures["task"]["loss"] == 0
    check_shipping(out)
    code, line = failure(capsys, tuned, "--to", "gguf:q8_0", "--out", out)
    assert code == 2 and "--overwrite" in line


def check_shipping(out: Path) -> None:
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=out, capture_output=True
    )
    assert done.returncode == 0, done.stdout
    modelfile = (out / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./model-q8_0.gguf") and "<|im_end|>" in modelfile
    assert 'SYSTEM "Say low or high."' in modelfile and "TEMPLATE" in modelfile
    assert subprocess.run(["sh", "-n", out / "serve.sh"]).returncode == 0
    assert "llama-server --model model-q8_0.gguf" in (out / "serve.sh").read_text()
    assert "model-f32.gguf" in (out / "README.md").read_text()


def test_bare_base_uses_the_same_exporter(tuned, tmp_path, capsys) -> None:
    out = tmp_path / "base"
    code, text, _ = unshot(
        capsys, tuned.parent / "base", "--to", "gguf:q8_0", "--out", out, "--json", "-q", "--check-rows", "4"
    )
    assert code == 0
    assert json.loads(text)["parity"][0]["figures"]["greedy"]["rows"] == 4
    assert read_manifest(out, stage="export").run is None


def test_onnx_runs_in_onnxruntime_with_the_same_logits(tuned, tmp_path, capsys) -> None:
    pytest.importorskip("optimum.onnxruntime")
    out = tmp_path / "onnx"
    code, text, _ = unshot(capsys, tuned, "--to", "onnx:fp32", "--out", out, "--json", "-q")
    assert code == 0
    figures = json.loads(text)["parity"][0]["figures"]
    assert figures["logits"]["largest_difference"] < 1e-3
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoTokenizer

    folder = out / "onnx-fp32"
    model = ORTModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    ids = tokenizer("Fees are due", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]


def test_safetensors_are_the_merged_model_in_shards(tuned, tmp_path, capsys) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from export import safetensors_dir
    from export.source import open_source
    from unshot.console import Output

    out = tmp_path / "art"
    code, text, err = unshot(capsys, tuned, "--to", "hf:bf16", "--to", "hf", "--out", out, "--json", "-q")
    assert code == 0, err
    assert json.loads(text)["files"] == {"hf:bf16": "hf-bf16"}
    assert "vllm serve ./hf-bf16" in (out / "serve.sh").read_text()
    model = open_source(str(tuned), None, Output(verbosity=-1))
    merged = model.merged()
    folder = tmp_path / "shards"
    safetensors_dir.write_merged(folder, model.base.path, merged, "f32", shard_bytes=100_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    coarse = AutoModelForCausalLM.from_pretrained(out / "hf-bf16", dtype=torch.bfloat16).state_dict()
    for name in merged.names():
        assert torch.equal(net[name], merged.rows(name)), name
        assert torch.equal(coarse[name], merged.rows(name).to(torch.bfloat16)), name


def test_k_quants_go_through_llama_cpp(tuned, tmp_path, capsys) -> None:
    out = tmp_path / "art"
    wanted = ["--to", "gguf:q6_k", "--to", "gguf:q4_0"]
    code, text, err = unshot(capsys, tuned, *wanted, "--out", out, "--json", "-q", "--allow-drift")
    assert code == 0, err
    result = json.loads(text)
    kl = [report["figures"]["logits"]["kl"] for report in result["parity"]]
    assert 0 < kl[0] < kl[1]
    assert not list(out.rglob(".scratch")) and not list(out.glob("model-f32.gguf"))


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}}]
)
def test_adapter_alone_on_its_base_is_the_tuned_model(tmp_path, capsys, settings) -> None:
    tuned = make_run(make("llama", tmp_path / "base"), tmp_path / "run", **settings)
    code, text, err = unshot(capsys, tuned, "--to", "lora:f32", "--out", tmp_path / "art", "--json", "-q")
    assert code == 0, err
    figures = json.loads(text)["parity"][0]["figures"]
    assert figures["logits"]["cosine"] > 0.9999 and figures["logits"]["kl"] < 1e-5
    assert (tmp_path / "art" / "adapter-f32.gguf").stat().st_size < 100_000


def test_adapter_alone_refuses_what_llama_cpp_cannot_hold(tmp_path, capsys) -> None:
    tuned = make_run(make("llama", tmp_path / "base"), tmp_path / "run", use_dora=True)
    code, line = failure(capsys, tuned, "--to", "lora", "--out", tmp_path / "x")
    assert code == 2 and "DoRA" in line
    code, line = failure(capsys, tmp_path / "base", "--to", "lora", "--out", tmp_path / "x")
    assert code == 2 and "a bare or fully tuned model" in line


def test_a_crash_of_the_quantiser_is_an_error_line(tuned, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(kquants.TYPES, "q4_0", "LLAMA_FTYPE_MOSTLY_NO_SUCH_TYPE")
    code, line = failure(capsys, tuned, "--to", "gguf:q4_0", "--out", tmp_path / "x")
    assert code == 1 and "could not quantise" in line and not (tmp_path / "x").exists()


def test_unknown_format_names_the_nearest(tuned, tmp_path, capsys) -> None:
    code, line = failure(capsys, tuned, "--to", "gguf:q8", "--out", tmp_path / "x")
    assert code == 2 and "gguf:q8_0" in line


def test_a_changed_run_is_refused(tuned, tmp_path, capsys) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(tuned, copy)
    path = copy / "adapter" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    code, line = failure(capsys, copy, "--out", tmp_path / "x")
    assert code == 2 and "hash" in line
    code, line = failure(capsys, copy / "adapter", "--out", tmp_path / "x")
    assert code == 2 and "run directory" in line


def test_another_base_is_refused(tuned, tmp_path, capsys) -> None:
    other = make("llama", tmp_path / "other", seed=5)
    code, line = failure(capsys, tuned, "--base", other, "--out", tmp_path / "x")
    assert code == 2 and "only its own base" in line
    code, line = failure(capsys, "smolm2-135m", "--out", tmp_path / "x")
    assert code == 2 and "smollm2-135m" in line


def test_drift_keeps_the_final_name_free(tuned, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(gguf_file, "to_pairs", lambda values, width: values)
    out = tmp_path / "art"
    code, line = failure(capsys, tuned, "--to", "gguf:f32", "--out", out)
    assert code == 1 and "KL divergence" in line
    assert not out.exists() and (tmp_path / "art.parity.json").is_file()
    code, _, err = unshot(capsys, tuned, "--to", "gguf:f32", "--out", out, "--allow-drift")
    assert code == 0 and "drifts" in err and (out / "model-f32.gguf").is_file()


def test_no_room_is_said_before_work(tuned, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(write, "SPARE", 10**18)
    code, line = failure(capsys, tuned, "--out", tmp_path / "x")
    assert code == 3 and "GB free" in line and not (tmp_path / "x").exists()


def test_kill_9_leaves_nothing_and_the_rerun_finishes(tuned, tmp_path, capsys) -> None:
    """Killed with its file half proven; `tests/benchmarks/kill_export.py` kills at fifty random moments."""
    out = tmp_path / "art"
    arguments = (tuned, "--to", "gguf:q8_0", "--out", out, "-q")
    assert unshot(capsys, *arguments)[0] == 0
    digest = read_manifest(out, stage="export").outputs["model-q8_0.gguf"].sha256
    out.rename(tmp_path / "whole")
    process = subprocess.Popen(
        command(["export", *arguments]), cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True
    )
    wait_for((tmp_path / ".art.partial" / "model-q8_0.gguf").exists, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    if out.exists():  # it was done before the signal came
        read_manifest(out, stage="export")
    assert unshot(capsys, *arguments, "--overwrite")[0] == 0
    assert read_manifest(out, stage="export").outputs["model-q8_0.gguf"].sha256 == digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["art", "whole"]
