"""The streaming merge against peft's `merge_and_unload`, for every kind of adapter it takes."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch

from export import merge
from export.adapter import load_adapter
from export.merge import Merged
from tests.export_cases import add_lora
from tests.tiny_models import make
from unshot.errors import InputError

pytestmark = pytest.mark.slow

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"down_proj": 3}},
    "some modules": {"target_modules": ["q_proj", "v_proj"]},
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "bias": {"target_modules": ["q_proj"], "bias": "all"},
}


def merged_by_peft(base, adapter, dtype):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=dtype)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def load(base, adapter):
    config = json.loads((base / "config.json").read_text())
    return Merged(sorted(base.glob("*.safetensors")), config, load_adapter(adapter))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {
        ("llama", "float32"): make("llama", root / "llama"),
        ("llama", "bfloat16"): make("llama", root / "llama16", dtype="bfloat16"),
        ("qwen2", "float32"): make("qwen2", root / "qwen2"),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_peft(bases, tmp_path, kind, dtype, monkeypatch) -> None:
    base = bases["llama", dtype]
    add_lora(base, tmp_path / "adapter", **KINDS[kind])
    reference = merged_by_peft(base, tmp_path / "adapter", getattr(torch, dtype)).state_dict()
    ours = load(base, tmp_path / "adapter")
    assert set(ours.names()) == set(reference)
    for name, expected in reference.items():
        found = ours.rows(name)
        if dtype == "float32":
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-7, msg=name)
        else:
            # peft rounds to bf16 (embeddings twice), we keep fp32: at most a rounding apart.
            atol = 2**-8 * float(expected.abs().max()) if name in ours.adapter.changed else 0.0
            torch.testing.assert_close(found, expected.float(), rtol=2**-7, atol=atol, msg=name)
    changed = [n for n in reference if not torch.equal(ours.base[n].read().float(), ours.rows(n))]
    assert changed


def test_plain_lora_is_bit_equal(bases, tmp_path) -> None:
    for dtype in ("float32", "bfloat16"):
        base = bases["llama", dtype]
        add_lora(base, tmp_path / dtype)
        reference = merged_by_peft(base, tmp_path / dtype, getattr(torch, dtype)).state_dict()
        ours = load(base, tmp_path / dtype)
        for name, expected in reference.items():
            assert torch.equal(ours.rows(name).to(expected.dtype), expected), name


def test_pieces_equal_the_whole(bases, tmp_path, monkeypatch) -> None:
    base = bases["llama", "float32"]
    add_lora(base, tmp_path / "adapter", use_dora=True)
    ours = load(base, tmp_path / "adapter")
    whole = {name: ours.rows(name) for name in ours.names()}
    monkeypatch.setattr(merge, "CHUNK_BYTES", 3000)
    for name, expected in whole.items():
        pieces = [ours.rows(name, start, stop) for start, stop in ours.ranges(name, multiple=16)]
        assert name.endswith("norm.weight") or len(pieces) > 1, name
        torch.testing.assert_close(torch.cat(pieces), expected, rtol=1e-6, atol=1e-7, msg=name)


def test_tied_head_that_is_trained_becomes_its_own(bases, tmp_path) -> None:
    base = bases["qwen2", "float32"]
    add_lora(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    ours = load(base, tmp_path / "adapter")
    assert ours.tied and ours.untied and "lm_head.weight" in set(ours.names())
    assert not torch.equal(ours.rows("lm_head.weight"), ours.rows("model.embed_tokens.weight"))
    plain = Merged(sorted(base.glob("*.safetensors")), ours.config)
    assert "lm_head.weight" not in set(plain.names())


def test_fan_in_fan_out_transposes_the_change() -> None:
    delta = merge.Delta(scale=2.0, a=torch.randn(2, 6), b=torch.randn(4, 2), transposed=True)
    base = torch.randn(6, 4)
    expected = base + ((delta.b @ delta.a) * 2.0).T
    torch.testing.assert_close(merge.apply(base, delta), expected)
    torch.testing.assert_close(merge.apply(base[2:5], delta, 2, 5), expected[2:5])


def test_adapter_of_another_shape_is_refused(bases, tmp_path) -> None:
    add_lora(bases["qwen2", "float32"], tmp_path / "adapter", target_modules=["k_proj", "embed_tokens"])
    with pytest.raises(InputError, match="another base"):
        load(bases["llama", "float32"], tmp_path / "adapter")


def test_damaged_adapter_is_refused(bases, tmp_path) -> None:
    add_lora(bases["llama", "float32"], tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputError, match="truncated"):
        load_adapter(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"IA3"'))
    with pytest.raises(InputError, match="IA3"):
        load_adapter(tmp_path / "adapter")
