"""ONNX of the seven families by both back ends: fp32 logits equal transformers', tokens and templates too."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import transformers

pytest.importorskip("torch")
pytest.importorskip("peft")

from export import genai, onnx_graph, reference
from export.engines import Engine
from export.parity import probe_strings
from tests.export_cases import make_run
from tests.tiny_models import FAMILIES, make
from unshot.__main__ import main
from unshot.catalog.formats import Target
from unshot.errors import InputError, OutsideError

pytestmark = pytest.mark.slow

SEVEN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
# GenAI 0.15's own tokenizer gives other ids for SentencePiece vocabularies; the gate refuses such a directory.
OTHER_IDS = {("genai", family) for family in SEVEN if FAMILIES[family][2].startswith("spm")}
# GenAI 0.15 windows Gemma 2's odd layers in place of the even ones; genai.supported refuses it.
WRONG_LOGITS = {("genai", "gemma2")}
LOOP = {
    "onnx": """
import runpy, sys
child = runpy.run_path(sys.argv[1])
for pair in sys.argv[2:]:
    child["export"](*pair.split("::"))
""",
    "genai": """
import runpy, sys
for pair in sys.argv[2:]:
    source, folder = pair.split("::")
    sys.argv = ["builder", "-i", source, "-o", folder, "-p", "fp32", "-e", "cpu", "-c", folder + "/cache"]
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
""",
}


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("seven")
    return {name: make(name, root / name) for name in SEVEN}


@pytest.fixture(scope="module")
def graphs(families, tmp_path_factory):
    """Every family by a back end; one process writes all seven, as most of an export's time is importing."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            needed = {"onnx": "optimum.exporters.onnx", "genai": "onnxruntime_genai"}[kind]
            if not _there(needed):
                pytest.skip(f"{needed} is not installed")
            folder = tmp_path_factory.mktemp(kind)
            child = Path(onnx_graph.__file__).with_name("optimum_child.py")
            pairs = [f"{path}::{folder / name}" for name, path in families.items()]
            command = [sys.executable, "-c", LOOP[kind], str(child), *pairs]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr[-1500:]
            for name, path in families.items():
                onnx_graph.copy_tokenizer(path, folder / name)
            made[kind] = folder
        return made[kind]

    return get


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("family", SEVEN)
@pytest.mark.parametrize("kind", ["onnx", "genai"])
def test_logits_and_tokens_equal_transformers(families, graphs, kind, family) -> None:
    folder = graphs(kind) / family
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(families[family]))
    ids = np.random.default_rng(0).integers(4, 280, 60).tolist()
    expected = reference.evaluated(families[family], None).logits([ids], [0])[0]
    texts = [unicodedata.normalize("NFC", t) for t in probe_strings(list(tokenizer.added_tokens_encoder))]
    with Engine(kind, folder, context=256, threads=1) as engine:
        found = engine.logits(ids)
        theirs = engine.tokenize(texts)
    # What a back end cannot do is asserted too, so that a version that can is noticed.
    assert bool(np.abs(expected - found).max() < 1e-3) == ((kind, family) not in WRONG_LOGITS)
    assert expected.std() > 0.3  # a model that says nothing would agree with anything
    ours = tokenizer(texts, add_special_tokens=False)["input_ids"]
    wrong = [(t, a, b) for t, a, b in zip(texts, ours, theirs, strict=True) if a != b]
    assert bool(wrong) == ((kind, family) in OTHER_IDS), (len(wrong), wrong[:3])


def test_another_architecture_is_refused_before_any_work() -> None:
    with pytest.raises(InputError, match=r"Gemma2ForCausalLM.*odd layers"):
        genai.supported({"architectures": ["Gemma2ForCausalLM"]}, "genai")
    with pytest.raises(InputError, match=r"BloomForCausalLM.*LlamaForCausalLM"):
        genai.supported({"architectures": ["BloomForCausalLM"]}, "genai")
    if _there("optimum.exporters.onnx"):
        with pytest.raises(InputError, match="no ONNX graph"):
            onnx_graph.supported("no-such-model")


def test_cuda_is_refused_without_a_device() -> None:
    pytest.importorskip("onnxruntime_genai")
    if genai.has_driver():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(OutsideError, match="no CUDA device"):
        genai.supported({"architectures": ["LlamaForCausalLM"]}, "genai-cuda")


def test_optimum_may_live_elsewhere(monkeypatch, tmp_path) -> None:
    """An interpreter without optimum says what to do; one that cannot be run too."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho \"No module named 'optimum'\" >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv(onnx_graph.PYTHON, str(fake))
    with pytest.raises(OutsideError, match=r"UNSHOT_OPTIMUM_PYTHON, or use --to genai:fp32"):
        onnx_graph.supported("llama")
    monkeypatch.setenv(onnx_graph.PYTHON, str(tmp_path / "none"))
    with pytest.raises(OutsideError, match="cannot be run"):
        onnx_graph.supported("llama")


def test_a_tuned_run_as_genai_passes_the_gate(tmp_path, capsys) -> None:
    pytest.importorskip("onnxruntime_genai")
    run = make_run(make("llama", tmp_path / "base"), tmp_path / "run")
    out = tmp_path / "art"
    arguments = ["export", run, "--to", "genai:fp32", "--to", "genai:int4", "--out", out, "--json", "-q"]
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments), "--allow-drift"])
    text = capsys.readouterr().out
    assert stop.value.code == 0, text
    whole, coarse = json.loads(text)["parity"]
    assert whole["passed"] and whole["figures"]["logits"]["largest_difference"] < 1e-3
    assert coarse["figures"]["logits"]["kl"] > whole["figures"]["logits"]["kl"]
    assert (out / Target("genai", "int4").name / "model.onnx").is_file()
    from unshot.engines import open_engine

    with open_engine(f"genai:{out / 'genai-fp32'}", threads=1) as engine:
        first = engine.prompt_ids([{"role": "user", "content": "Fees are due in 30 days. Why?"}])
        second = engine.prompt_ids([{"role": "user", "content": "Fees are due in 30 days. When?"}])
        cold = engine.generate(second, max_tokens=6, stop_ids=(), prefix_cache=False)
        engine.generate(first, max_tokens=6, stop_ids=(), prefix_cache=False)
        warm = engine.generate(second, max_tokens=6, stop_ids=())
        assert warm.cached > 5 and warm.ids == cold.ids
        assert engine.generate([1, 2, 3], max_tokens=2, stop_ids=()).cached == 0
        with pytest.raises(InputError, match="the model holds"):
            engine.generate([1] * 10, max_tokens=10**6)
