"""What an engine lacks is known before any work, wrong files pass at no precision, bad input is one line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("llama_cpp")

import torch
from safetensors.torch import load_file, save_file

from export import families, fp8, gguf_file, kquants, w4a16
from export.boundaries import boundaries, reach, served_context
from export.merge import Merged
from export.reference import evaluated
from export.run import Settings, export_run
from export.source import open_source
from export.tensor_check import compare_weights
from tests.export_cases import make_run
from tests.export_faults import FAULTS
from tests.tiny_models import make
from unshot.catalog.formats import FORMATS, help_text, known, parse_target, parse_targets
from unshot.console import Output
from unshot.contracts.parity import FileReport, Parity
from unshot.errors import GateError, InputError, OutsideError
from unshot.models import Source, resolve

pytestmark = pytest.mark.slow

QUIET = Output(verbosity=-1)
FIVE = ["gguf:f32", "gguf:q8_0", "gguf:q6_k", "gguf:q5_k_m", "gguf:q4_k_m"]
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
    "max_position_embeddings": 8192, "hidden_act": "silu", "rope_theta": 10000.0,
}  # fmt: skip
GEMMA2 = {
    **LLAMA, "architectures": ["Gemma2ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh", "head_dim": 32,
    "query_pre_attn_scalar": 32, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
}  # fmt: skip
GEMMA3 = {
    **GEMMA2, "architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": None, "final_logit_softcapping": None,
    "sliding_window": 512,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}


def run_of(family: str, root: Path, adapter: dict[str, Any] | None = None, **more: Any) -> Path:
    return make_run(make(family, root / "base", **more), root / "run", **(adapter or {}))


def exported(run: Path, texts: list[str], final: Path, **settings: Any) -> list[FileReport]:
    return export_run(str(run), parse_targets(texts), final, QUIET, Settings(**settings)).parity


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**LLAMA, "hidden_act": "gelu"}, "activation gelu"),
        ({**GEMMA2, "hidden_activation": "gelu"}, "activation gelu"),
        ({**GEMMA2, "query_pre_attn_scalar": 24}, "query_pre_attn_scalar 24"),
        ({**GEMMA3, "query_pre_attn_scalar": 256}, "query_pre_attn_scalar 256"),
        ({**GEMMA2, "attn_logit_softcapping": None}, "attn_logit_softcapping off"),
        ({**GEMMA2, "final_logit_softcapping": None}, "final_logit_softcapping off"),
        ({**GEMMA3, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({**LLAMA, "rope_scaling": {**YARN, "beta_fast": 16}}, "beta_fast 16"),
        ({**LLAMA, "rope_scaling": {**YARN, "beta_slow": 2}}, "beta_slow 2"),
        ({**LLAMA, "rope_scaling": {**YARN, "truncate": False}}, "truncate off"),
        ({**LLAMA, "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": False}, "norm_topk_prob off"),
        ({**LLAMA, "architectures": ["OlmoeForCausalLM"], "norm_topk_prob": True}, "norm_topk_prob on"),
        ({**GEMMA3, "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_what_llama_cpp_never_computes_is_refused_by_name(config, words) -> None:
    with pytest.raises(InputError, match=words):
        boundaries(config)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (LLAMA, None),
        ({**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 4096}, 4096),
        ({**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": None}, None),
        ({**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 8192}, None),
        ({**LLAMA, "architectures": ["Phi3ForCausalLM"], "sliding_window": 2047}, 2047),
        ({**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096, "use_sliding_window": False}, None),
        (
            {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096, "use_sliding_window": True,
             "max_window_layers": 1}, 4096,
        ),
        (
            {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096, "use_sliding_window": True,
             "max_window_layers": 2}, None,
        ),
        (
            {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "sliding_window": 1024, "use_sliding_window": True,
             "layer_types": ["full_attention", "sliding_attention"]}, 1024,
        ),
        (GEMMA2, None),
        (GEMMA3, None),
        (
            {**LLAMA, "architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 2048,
             "rope_scaling": {"type": "longrope", "long_factor": [2.0] * 8, "short_factor": [1.0] * 8}}, 2048,
        ),
    ],
)  # fmt: skip
def test_up_to_how_many_tokens_a_file_is_right(config, tokens) -> None:
    found = boundaries(config)
    assert [b.tokens for b in found] == ([] if tokens is None else [tokens])
    assert served_context(config, found) == min(4096, tokens or 4096)


def test_sequences_reach_past_every_window_that_is_served() -> None:
    assert reach(LLAMA, 4096) is None
    assert reach(GEMMA3, 4096) == 512 + 64
    assert reach(GEMMA2, 4096) is None  # its window is as wide as what is served
    assert reach({**LLAMA, "rope_scaling": YARN}, 4096) == 2048 + 64


def test_a_window_that_llama_cpp_leaves_out_is_refused_or_said(tmp_path) -> None:
    """Rows longer than the window are refused before any work; else it stands how far the file is right."""
    run = run_of("mistral", tmp_path / "narrow", sliding_window=16)
    for text in FIVE:
        with pytest.raises(InputError, match="right only up to 16"):
            exported(run, [text], tmp_path / "x")
    assert not (tmp_path / "x").exists()
    run = run_of("mistral", tmp_path / "wide", sliding_window=200)
    (report,) = exported(run, ["gguf:q4_k_m"], tmp_path / "art")
    assert report.passed and report.right_up_to == 200 and report.against == "gguf:f32"
    assert Parity.read(tmp_path / "art").reports[0].right_up_to == 200
    assert "--ctx-size 200" in (tmp_path / "art" / "serve.sh").read_text()
    assert "right up to 200 tokens" in (tmp_path / "art" / "README.md").read_text()
    assert json.loads((tmp_path / "art" / "manifest.json").read_text())["config"]["right_up_to"] == {
        "gguf:q4_k_m": 200
    }


@pytest.mark.slow
def test_a_tuned_head_of_a_tied_gemma_is_written_or_named(tmp_path) -> None:
    adapter = {"target_modules": ["q_proj", "lm_head"]}
    run = run_of("gemma3", tmp_path / "three", adapter, tie_word_embeddings=True)
    for report in exported(run, ["gguf:f32", "gguf:q4_k_m"], tmp_path / "art"):
        assert report.passed, report.failures
    import gguf

    assert "output.weight" in {
        t.name for t in gguf.GGUFReader(tmp_path / "art" / "model-q4_k_m.gguf").tensors
    }
    run = run_of("gemma2", tmp_path / "two", adapter, tie_word_embeddings=True)
    for text in FIVE:
        with pytest.raises(InputError, match=r"head of its own.*gemma2"):
            exported(run, [text], tmp_path / "x")


@pytest.mark.slow
def test_layers_of_another_pattern_and_yarn_factors_are_written(tmp_path) -> None:
    kinds = ["full_attention", "sliding_attention"] * 3 + ["full_attention"]
    run = run_of("gemma3", tmp_path / "layers", layer_types=kinds, tie_word_embeddings=True)
    (report,) = exported(run, ["gguf:f32"], tmp_path / "a")
    assert report.passed and report.figures.long_logits, report.failures
    yarn = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.7,
    }
    run = run_of("llama", tmp_path / "yarn", rope_scaling=yarn)
    (report,) = exported(run, ["gguf:q8_0"], tmp_path / "b")
    assert report.passed and report.figures.longest == 128, report.failures


def test_yarn_needs_no_original_length(tmp_path) -> None:
    class Writer:
        def __getattr__(self, name: str) -> Any:
            return lambda *values: setattr(self, f"_{name}", values)

    writer = Writer()
    families.FAMILIES["LlamaForCausalLM"].parameters(
        writer,
        {**LLAMA, "intermediate_size": 96, "rms_norm_eps": 1e-5, "vocab_size": 9,
         "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    )  # fmt: skip
    assert writer._add_rope_scaling_orig_ctx_len == (8192,)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    return run_of("llama", tmp_path_factory.mktemp("structure"))


@pytest.mark.slow
def test_a_fault_in_the_source_passes_at_no_precision(tuned, tmp_path, monkeypatch) -> None:
    """tests/benchmarks/bench_export_faults.py plants every fault at all five."""
    FAULTS["rotary base off by a hundredth"].plant(monkeypatch)
    reports = exported(tuned, FIVE, tmp_path / "art", allow_drift=True, check_rows=2)
    assert [r.target for r in reports if r.passed] == []


# Planted in the coarse file alone, after its source passed.
def _other_value(tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.0.attn_v.weight"][0, 2:12] ^= 0x55


def _zeroed(tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.1.ffn_down.weight"][:] = 0


def _rows_swapped(tensors: dict[str, np.ndarray]) -> None:
    values = tensors["blk.0.ffn_up.weight"]
    values[[0, 1]] = values[[1, 0]]


COARSE_FAULTS = {"some bytes": _other_value, "a matrix of zeros": _zeroed, "two rows swapped": _rows_swapped}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["a matrix of zeros", "two rows swapped", "the adapter left out"])
def test_faults_of_the_coarse_file_alone_are_seen(tuned, tmp_path, monkeypatch, fault) -> None:
    from gguf import GGUFReader

    usual = kquants.quantise

    def broken(source: Path, target: Path, kind: str, imatrix: Path | None = None) -> None:
        usual(source, target, kind, imatrix)
        if fault == "the adapter left out":
            base = resolve(tuned.parent / "base")
            plain = target.with_suffix(".plain")
            bare = Merged(base.weight_files(), base.config())
            facts = gguf_file.Facts("tiny", "tiny", None, None, 2)
            gguf_file.write_gguf(plain, bare, base.path, "f32", facts)
            rounded = target.with_suffix(".rounded")
            usual(plain, rounded, kind)
            source_tensors = {t.name: t for t in GGUFReader(rounded).tensors}
            for tensor in GGUFReader(target, "r+").tensors:
                tensor.data[:] = source_tensors[tensor.name].data
            return
        COARSE_FAULTS[fault]({t.name: t.data for t in GGUFReader(target, "r+").tensors})

    monkeypatch.setattr("export.write.quantise", broken)
    for text in ("gguf:q6_k", "gguf:q4_k_m"):
        (report,) = exported(tuned, [text], tmp_path / text[5:], allow_drift=True)
        assert not report.passed and "relative error" in "; ".join(report.failures), fault


def test_a_file_is_compared_by_metadata_and_tensors(tuned, tmp_path) -> None:
    base = resolve(tuned.parent / "base")
    merged = Merged(base.weight_files(), base.config())
    facts = gguf_file.Facts("tiny", "tiny", None, "x", 2)
    gguf_file.write_gguf(tmp_path / "f32.gguf", merged, base.path, "f32", facts)
    gguf_file.write_gguf(tmp_path / "q8_0.gguf", merged, base.path, "q8_0", facts)
    report = FileReport("gguf:q8_0", True)
    compare_weights(tmp_path / "f32.gguf", tmp_path / "q8_0.gguf", report)
    assert report.failures == [] and report.figures.weights and report.figures.weights.worst_error < 0.01
    merged.config = {**merged.config, "rope_theta": 1234.0, "rope_parameters": None}
    gguf_file.write_gguf(tmp_path / "rope.gguf", merged, base.path, "q8_0", facts)
    compare_weights(tmp_path / "f32.gguf", tmp_path / "rope.gguf", report)
    assert "rope.freq_base" in report.failures[0]


def test_no_token_is_put_before_the_prompt(tmp_path) -> None:
    """Without `add_bos_token` in the tokenizer's config llama.cpp's own default would put one there."""
    import llama_cpp

    run = run_of("mistral", tmp_path)
    path = tmp_path / "base" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("add_bos_token")
    path.write_text(json.dumps(config))
    (report,) = exported(run, ["gguf:f32"], tmp_path / "art")
    assert (
        report.figures.served
        and report.figures.served.mismatches == 0
        and report.figures.served.add_bos is False
    )
    llama = llama_cpp.Llama(str(tmp_path / "art" / "model-f32.gguf"), vocab_only=True, verbose=False)
    assert llama.tokenize(b"Fees", add_bos=True, special=True) == llama.tokenize(
        b"Fees", add_bos=False, special=True
    )
    assert llama.metadata["tokenizer.ggml.add_bos_token"] == "false"
    assert llama.metadata["tokenizer.ggml.add_eos_token"] == "false"


def test_an_end_of_turn_that_llama_cpp_does_not_know_is_written(tuned, tmp_path) -> None:
    """`<|endoftext|>` as eos and an end of turn by a name of one's own, and a list of ends in generation_config."""
    root = tmp_path / "run"
    base = tmp_path / "base"
    shutil.copytree(tuned.parent / "base", base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (
            (base / name)
            .read_text()
            .replace("<|im_end|>", "<|fin|>")
            .replace('"eos_token": "<|fin|>"', '"eos_token": "<|endoftext|>"')
        )
        (base / name).write_text(text)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2, 3]}))
    make_run(base, root)
    gguf_report, hf_report = exported(root, ["gguf:f32", "hf:f32"], tmp_path / "art")
    assert gguf_report.passed and hf_report.passed, (gguf_report.failures, hf_report.failures)
    written = json.loads((tmp_path / "art" / "hf-f32" / "generation_config.json").read_text())
    assert set(written["eos_token_id"]) == {1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["cohere", "falcon"])
def test_the_reference_is_the_models_own_forward(tmp_path, family) -> None:
    """Of families outside the streamed ones; `tests/test_export_gguf.py` has others."""
    (report,) = exported(run_of(family, tmp_path), ["hf:f32"], tmp_path / "art")
    assert report.passed, report.failures


def test_other_families_are_refused_by_name_where_there_is_no_converter(tuned, tmp_path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tuned.parent / "base", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["ApertusXForCausalLM"]}))
    empty = tmp_path / "checkout"
    empty.mkdir()
    with pytest.raises(InputError, match=r"no convert_hf_to_gguf.py"):
        export_run(
            str(folder), parse_targets(["gguf:q8_0"]), tmp_path / "x", QUIET, Settings(llama_cpp=empty)
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", "1e-5"), ("rms_norm_eps", None), ("hidden_size", "64"), ("hidden_size", 0),
        ("vocab_size", [3]),
        ("num_hidden_layers", 2.0), ("num_attention_heads", True), ("rope_theta", "10000"), ("head_dim", "16"),
        ("max_position_embeddings", float("nan")), ("rope_scaling", {"rope_type": "linear", "factor": "2"}),
        ("sliding_window", "512"), ("initializer_range", "0.02"), ("bos_token_id", "1"),
    ],
)  # fmt: skip
def test_a_text_in_place_of_a_number_is_refused_by_its_name(tuned, tmp_path, key, value) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tuned.parent / "base", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    name = "factor" if key == "rope_scaling" else key
    with pytest.raises(InputError, match=rf"config\.json: {name} must be a "):
        export_run(str(folder), parse_targets(["hf:f16"]), tmp_path / "x", QUIET, Settings())


def test_the_index_decides_which_weights_belong_to_a_model(tuned, tmp_path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tuned.parent / "base", folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    index = {"metadata": {}, "weight_map": {n: file for file, part in parts.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    source = Source("m", folder)
    assert [f.name for f in source.weight_files()] == sorted(parts)
    assert source.stray_files() == ["consolidated.safetensors"]
    assert set(Merged(source.weight_files(), source.config()).names()) == set(names)
    (folder / "consolidated.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(InputError, match="stale"):
        source.weight_files()
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002.safetensors is missing \(1 of the 2"):
        resolve(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002.safetensors is missing"):
        resolve(folder)


def test_bad_bases_are_one_line(tuned, tmp_path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tuned.parent / "base", folder)
    config = json.loads((folder / "config.json").read_text())
    source = Source("m", folder)
    with pytest.raises(InputError, match=r"vocab_size 999, and the embedding has \d+ rows"):
        Merged(source.weight_files(), {**config, "vocab_size": 999})
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(InputError, match=r"no tokenizer.json there; make one from tokenizer.model"):
        resolve(folder)
    with pytest.raises(InputError, match="NaN or infinity"):
        gguf_file.encode(torch.tensor([[1.0, float("nan")]]), "f16", "blk.0.x")


def test_eight_bit_floats_are_the_models_and_never_equal_unproven(tuned, tmp_path, monkeypatch) -> None:
    """Without compressed-tensors nothing here can run them: their tensors are compared, and that is said."""
    monkeypatch.setattr(fp8, "proven_here", lambda: False)
    (report,) = exported(tuned, ["hf:fp8"], tmp_path / "art", check_rows=2)
    assert report.passed and not report.proven and report.verdict == "not proven here"
    manifest = json.loads((tmp_path / "art" / "manifest.json").read_text())
    assert next(g["passed"] for g in manifest["gates"] if g["name"] == "parity") is None
    folder = tmp_path / "art" / "hf-fp8"
    kept = load_file(folder / "model.safetensors")
    layer = "model.layers.0.mlp.down_proj.weight"
    assert kept[layer].dtype == torch.float8_e4m3fn and kept["lm_head.weight"].dtype == torch.bfloat16
    assert kept[f"{layer}_scale"].shape == (64, 1)
    assert (
        json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == "float-quantized"
    )
    usual = fp8.rounded
    monkeypatch.setattr(fp8, "rounded", lambda v: usual(v.roll(1, 0)))
    (report,) = exported(tuned, ["hf:fp8"], tmp_path / "wrong", check_rows=2, allow_drift=True)
    assert not report.passed and "tensors are not the model's" in report.failures[0]


def test_four_bits_are_refused_by_name_without_llm_compressor(tuned, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(w4a16.PYTHON, raising=False)
    if importlib.util.find_spec("llmcompressor"):
        pytest.skip("llm-compressor is installed here")
    with pytest.raises(OutsideError, match=r"llm-compressor, which is not installed here.*hf:fp8"):
        exported(tuned, ["hf:w4a16"], tmp_path / "art")
    monkeypatch.setenv(w4a16.PYTHON, "/nowhere/python")
    with pytest.raises(InputError, match="128 inputs, and this model has layers of 64"):
        exported(tuned, ["hf:w4a16"], tmp_path / "art")


def test_four_bits_are_read_back() -> None:
    """Eight numbers in an int32, lowest bits first, each plus 8 (compressed-tensors' pack-quantized)."""
    numbers = torch.randint(-8, 8, (3, 256), generator=torch.Generator().manual_seed(0))
    bits = (numbers + 8).reshape(3, 32, 8) << (4 * torch.arange(8))
    scales = torch.tensor([[0.5, 2.0]] * 3)
    packed = bits.sum(2).to(torch.int64).remainder(2**32)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    found = w4a16.values(packed, scales, [3, 256])
    torch.testing.assert_close(found, numbers.float() * scales.repeat_interleave(128, 1))


ENDS = {
    "no number": "2",
    "beyond the vocabulary": 99999,
    "negative": -1,
    "nested": [[2]],
    "yes": True,
    "half": 2.5,
}


@pytest.mark.parametrize("odd", [*ENDS, "no json", "a list"])
def test_a_damaged_generation_config_is_one_line(tuned, tmp_path, odd) -> None:
    base = shutil.copytree(tuned.parent / "base", tmp_path / "base")
    text = {"no json": "{", "a list": "[1]"}.get(odd) or json.dumps({"eos_token_id": ENDS[odd]})
    (base / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=r"generation_config.json: .*(mend|remove)"):
        open_source(str(base), None, QUIET)


def without(base: Path, name: str) -> None:
    path = base / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != name}, path, metadata={"format": "pt"})


def reshaped(base: Path, name: str) -> None:
    path = base / "model.safetensors"
    save_file({**load_file(path), name: torch.ones(96, 60)}, path, metadata={"format": "pt"})


def configured(base: Path, **more: Any) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


NOT_ITS_WEIGHTS: dict[str, tuple[Any, str]] = {
    "a matrix missing": (lambda b: without(b, "model.layers.1.self_attn.v_proj.weight"), r"files lack .*v_proj"),
    "a norm missing": (lambda b: without(b, "model.norm.weight"), r"files lack `model.norm.weight` \(1 tensors"),
    "a head of its own missing": (lambda b: without(b, "lm_head.weight"), "files lack `lm_head.weight`"),
    "more layers than the files": (lambda b: configured(b, num_hidden_layers=3), r"files lack .*layers\.2"),
    "another shape": (lambda b: reshaped(b, "model.layers.0.mlp.up_proj.weight"), "cannot load it"),
    "heads that do not divide": (lambda b: configured(b, num_key_value_heads=3), "cannot load it"),
    "no width of a head": (lambda b: configured(b, head_dim=0), "cannot load it"),
    "no kind of rotary scaling": (lambda b: configured(b, rope_scaling={"type": None, "factor": 2.0}), "cannot"),
}  # fmt: skip


@pytest.mark.parametrize("odd", NOT_ITS_WEIGHTS)
def test_weights_that_are_not_the_configurations_are_one_line(tuned, tmp_path, odd) -> None:
    """transformers fills a missing tensor with random numbers and says so in a warning; else it ends in an error."""
    change, words = NOT_ITS_WEIGHTS[odd]
    base = shutil.copytree(tuned.parent / "base", tmp_path / "base")
    change(base)
    with pytest.raises(InputError, match=words):
        open_source(str(base), None, QUIET).reference()


def test_a_bias_that_llama_cpp_does_not_read_is_refused_by_name(tmp_path) -> None:
    """llama.cpp cannot load such a file: it counts the tensors."""
    base = make("qwen3", tmp_path / "base", attention_bias=True)
    merged = Merged(resolve(base).weight_files(), resolve(base).config())
    with pytest.raises(
        InputError, match=r"a bias `model.layers.0.self_attn.._proj.bias`, which llama.cpp's qwen3"
    ):
        gguf_file.refuse(parse_target("gguf:f32"), merged, base)
    llama = make("llama", tmp_path / "llama", attention_bias=True, mlp_bias=True)
    gguf_file.refuse(
        parse_target("gguf:f32"), Merged(resolve(llama).weight_files(), resolve(llama).config()), llama
    )


def test_an_end_beyond_the_vocabulary_and_a_list_of_settings_are_one_line(tuned, tmp_path) -> None:
    base = shutil.copytree(tuned.parent / "base", tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<elsewhere>"}))
    with pytest.raises(InputError, match=r"<elsewhere>', number \d+, and the model has \d+ tokens"):
        open_source(str(base), None, QUIET)
    (base / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config.json: expected a JSON object"):
        open_source(str(base), None, QUIET)


def test_a_greedy_answer_is_the_likeliest_tokens_whatever_a_model_suppresses(tuned, tmp_path) -> None:
    base = shutil.copytree(tuned.parent / "base", tmp_path / "base")
    ids = [5, 9, 33, 70]
    (first,) = evaluated(base, None).generate([ids], 4, 2)
    odd = {
        "suppress_tokens": first,
        "repetition_penalty": 9.0,
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 3,
    }
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **odd}))
    assert evaluated(base, None).generate([ids], 4, 2) == [first] and first


def test_what_a_quantised_upload_left_behind_does_no_harm(tuned, tmp_path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tuned.parent / "base", folder)
    config = json.loads((folder / "config.json").read_text())
    left = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": left}))
    (report,) = exported(folder, ["hf:f32"], tmp_path / "art", check_rows=2)
    assert report.passed, report.failures
    assert "quantization_config" not in json.loads((tmp_path / "art" / "hf-f32" / "config.json").read_text())


def test_named_templates_take_the_default(tuned, tmp_path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tuned.parent / "base", folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    named = [
        {"name": "default", "template": config["chat_template"]},
        {"name": "tool_use", "template": "{{ x }}"},
    ]
    path.write_text(json.dumps({**config, "chat_template": named}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    for report in exported(folder, ["gguf:f32", "hf:f32"], tmp_path / "art", check_rows=2):
        assert report.passed, report.failures


def test_formats_come_from_one_registry() -> None:
    assert parse_target("GGUF:fp16").precision == "f16" and parse_target("hf").precision == "bf16"
    for text in known():
        assert text.split(":")[1] in help_text()
    for one in FORMATS.values():
        for name in (one.write, one.refuse):
            from export.write import function

            assert callable(function(name))


def test_parity_is_one_typed_file_and_older_ones_are_read(tmp_path) -> None:
    old = {
        "source": "run",
        "reports": [
            {"target": "gguf:f32", "passed": False, "failures": ["died"], "figures": {}, "limits": {}}
        ],
    }
    (tmp_path / "parity.json").write_text(json.dumps(old))
    found = Parity.read(tmp_path)
    assert found.version == 1 and found.reports[0].failures == ["died"] and found.reports[0].limits is None
    (tmp_path / "parity.json").write_text(json.dumps({**old, "version": 9}))
    with pytest.raises(InputError, match="newer"):
        Parity.read(tmp_path)


def test_a_fault_stops_the_export(tuned, tmp_path, monkeypatch) -> None:
    FAULTS["epsilon ten times as large"].plant(monkeypatch)
    with pytest.raises(GateError, match="its full-precision source gguf:f32 is not the model"):
        exported(tuned, ["gguf:q4_k_m"], tmp_path / "x")
    assert not (tmp_path / "x").exists() and Parity.read(tmp_path / "x.parity.json").sources


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set head = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set head = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}[INST] {{ head if loop.first else '' }}{{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
ODD = "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "starts"),
    [
        (LLAMA3, "<|endoftex"),  # the rest stands with each turn, as what turns share allows
        (MISTRAL, "<|endoftext|>[INST] {{ range .Messages }}"),
        (ODD, None),
    ],
)
def test_ollama_gets_the_chat_template_written_out(tuned, tmp_path, template, starts) -> None:
    from export.ollama import modelfile
    from export.source import open_source

    folder = tmp_path / "base"
    shutil.copytree(tuned.parent / "base", folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    text = modelfile(open_source(str(folder), None, QUIET), parse_target("gguf"), 256)
    assert "PARAMETER num_ctx 256" in text
    if starts is None:
        assert "TEMPLATE" not in text and "not proven" in text
    else:
        assert f'TEMPLATE """{starts}' in text
