"""LoRA on the weights of experts (`target_parameters`) gives peft's own answer, or is named; the adapter alone too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from export.experts import load_on
from export.foreign import bring_in
from export.merge import Merged
from export.peft_adapter import compare_adapters, write_adapter
from export.run import Settings, export_run
from tests.export_cases import add_lora, make_run
from tests.test_export_foreign import by_peft, equal, restyle
from tests.tiny_models import make
from unshot.catalog.formats import parse_targets
from unshot.console import Output
from unshot.contracts.parity import FileReport
from unshot.errors import GateError, InputError
from unshot.models import resolve

pytestmark = pytest.mark.slow

QUIET = Output(verbosity=-1)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def on(base: Path, adapter: Path) -> Merged:
    source = resolve(base)
    foreign = bring_in(adapter, source)
    return Merged(source.weight_files(), source.config(), load_on(foreign.folder, source))


def stacked(base: Path) -> list[str]:
    """The parameters of a family's experts, where this transformers stacks them."""
    net = AutoModelForCausalLM.from_pretrained(str(base))
    return sorted({".".join(n.split(".")[-2:]) for n, p in net.named_parameters() if p.ndim == 3})


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory) -> Path:
    return make("gpt_oss", tmp_path_factory.mktemp("experts") / "base")


@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "rank_pattern": {"down_proj": 2}}])
def test_stacked_experts_are_merged_as_peft_does(gpt_oss, tmp_path, more) -> None:
    add_lora(gpt_oss, tmp_path / "a", target_modules=["q_proj"], target_parameters=EXPERTS, **more)
    found = on(gpt_oss, tmp_path / "a")
    assert {n.rpartition(".")[2] for n in found.adapter.deltas} == {"weight", "gate_up_proj", "down_proj"}
    equal(found, by_peft(gpt_oss, tmp_path / "a"))
    name = next(n for n in found.names() if n.endswith("gate_up_proj"))
    torch.testing.assert_close(found.rows(name)[1:3], found.rows(name, 1, 3))


def test_keys_of_another_trainer_and_one_parameter_alone(gpt_oss, tmp_path) -> None:
    add_lora(gpt_oss, tmp_path / "a", target_modules=[], target_parameters=EXPERTS[:1])
    styled = restyle(
        tmp_path / "a", tmp_path / "b", lambda k: k.replace("base_model.model.", "module._orig_mod.")
    )
    equal(on(gpt_oss, styled), by_peft(gpt_oss, tmp_path / "a"))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_of_their_own_in_the_files(tmp_path, family) -> None:
    base = make(family, tmp_path / "base")
    names = stacked(base)
    if not names:  # transformers 4 keeps a module an expert; its router is a parameter of two dimensions
        names = ["gate.weight"]
    add_lora(base, tmp_path / "a", target_modules=["q_proj"], target_parameters=names)
    net = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    from peft import PeftModel

    PeftModel.from_pretrained(net, str(tmp_path / "a")).merge_and_unload().save_pretrained(tmp_path / "m")
    expected: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "m").glob("*.safetensors"):
        expected |= load_file(path)
    equal(on(base, tmp_path / "a"), expected)


def test_what_nothing_tells_is_named(tmp_path) -> None:
    square = make("gpt_oss", tmp_path / "square", intermediate_size=64)
    add_lora(square, tmp_path / "a", target_modules=[], target_parameters=EXPERTS[1:])
    with pytest.raises(InputError, match=r"square experts.*merge it with peft"):
        on(square, tmp_path / "a")
    # Beside a parameter that is not square the layout is known.
    add_lora(square, tmp_path / "b", target_modules=[], target_parameters=EXPERTS)
    equal(on(square, tmp_path / "b"), by_peft(square, tmp_path / "b"))


def test_the_other_layout_and_a_missing_pair_are_named(gpt_oss, tmp_path) -> None:
    add_lora(gpt_oss, tmp_path / "a", target_modules=[], target_parameters=EXPERTS)
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    turned = {
        k.replace("lora_A", "lora_?")
        .replace("lora_B", "lora_A")
        .replace("lora_?", "lora_B"): v.T.contiguous()
        for k, v in tensors.items()
    }
    save_file(turned, path)
    with pytest.raises(InputError, match=r"another generation of transformers.*merge it with peft"):
        on(gpt_oss, tmp_path / "a")
    save_file({k: v for k, v in tensors.items() if "base_layer" not in k}, path)
    with pytest.raises(InputError, match=r"gate_up_proj.*no pair of it was saved"):
        on(gpt_oss, tmp_path / "a")


def test_a_run_with_tuned_experts_goes_through_the_gate(gpt_oss, tmp_path, monkeypatch) -> None:
    run = make_run(gpt_oss, tmp_path / "run", target_modules=["q_proj"], target_parameters=EXPERTS)
    targets = parse_targets(["hf:f32"])
    done = export_run(str(run), targets, tmp_path / "art", QUIET, Settings(check_rows=2))
    assert done.parity[0].passed and done.parity[0].figures.logits
    with pytest.raises(InputError, match="hf:bf16"):
        export_run(str(run), parse_targets(["peft:bf16"]), tmp_path / "p", QUIET)
    from export import merge

    usual = merge.apply
    monkeypatch.setattr(merge, "apply", lambda v, d, *a: v if d.a.ndim == 3 else usual(v, d, *a))
    with pytest.raises(GateError, match="hf:f32"):
        export_run(str(run), targets, tmp_path / "wrong", QUIET, Settings(check_rows=2))


# The adapter alone, for `vllm serve --enable-lora`.
@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make("llama", tmp_path_factory.mktemp("alone") / "base")


PATTERNS: dict[str, Any] = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}, "use_rslora": True}


def test_an_adapter_alone_has_one_rank_and_answers_as_evaluated(llama, tmp_path) -> None:
    run = make_run(llama, tmp_path / "run", **PATTERNS)
    done = export_run(
        str(run), parse_targets(["peft:bf16", "peft:f32"]), tmp_path / "art", QUIET, Settings(check_rows=2)
    )
    assert all(r.passed and r.figures.logits for r in done.parity) and done.parity[0].against == "peft:f32"
    folder = tmp_path / "art" / "adapter-bf16"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (
        config["r"] == config["lora_alpha"] == 4 and not config["use_rslora"] and "rank_pattern" not in config
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {v.shape[0] for k, v in tensors.items() if "lora_A" in k} == {4}
    script = (tmp_path / "art" / "serve-vllm.sh").read_text()
    assert "--enable-lora --max-lora-rank 8 --lora-modules run=./adapter-" in script and str(llama) in script


@pytest.mark.parametrize("fault", ["a pair left out", "a pair of zeros", "the scale forgotten", "the rank"])
def test_a_wrong_adapter_alone_does_not_pass(llama, tmp_path, fault) -> None:
    """A coarser adapter is held to the full-precision one, whose logits are exact, tensor by tensor."""
    add_lora(llama, tmp_path / "a", lora_alpha=12)
    adapter = load_on(tmp_path / "a", resolve(llama))
    for precision in ("f32", "bf16"):
        write_adapter(tmp_path / precision, adapter, precision, "base")
    right = FileReport("peft:bf16", False)
    compare_adapters(tmp_path / "f32", tmp_path / "bf16", right)
    assert not right.failures
    path = tmp_path / "bf16" / "adapter_model.safetensors"
    tensors = load_file(path)
    first, second = sorted(tensors)[:2]
    if fault == "a pair left out":
        tensors = {k: v for k, v in tensors.items() if k not in (first, second)}
    elif fault == "a pair of zeros":
        tensors[second] = 0 * tensors[second]
    elif fault == "the scale forgotten":
        tensors = {k: v / 3 if "lora_B" in k else v for k, v in tensors.items()}
    else:
        config = json.loads((tmp_path / "bf16" / "adapter_config.json").read_text())
        (tmp_path / "bf16" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 8}))
    save_file(tensors, path)
    wrong = FileReport("peft:bf16", False)
    compare_adapters(tmp_path / "f32", tmp_path / "bf16", wrong)
    assert wrong.failures


@pytest.mark.parametrize(
    "more", [{"use_dora": True}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
def test_what_vllm_does_not_serve_beside_a_base_is_refused(llama, tmp_path, more) -> None:
    run = make_run(llama, tmp_path / "run", **more)
    with pytest.raises(InputError, match="hf:bf16"):
        export_run(str(run), parse_targets(["peft:bf16"]), tmp_path / "art", QUIET)
