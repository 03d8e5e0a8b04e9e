"""Every family: packed rows say what they say alone, or are not packed; what cannot be tuned is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.model_families import FAMILIES, config_of, model_of
from unshot.errors import InputError
from unshot.text.chat import Encoded

torch = pytest.importorskip("torch")

from tune.base import check_weights, inspect_base  # noqa: E402
from tune.batches import pack  # noqa: E402
from tune.kernels import adopt, installed  # noqa: E402
from tune.loss import pack_loss  # noqa: E402
from tune.packing import PACKED, allowed, prove  # noqa: E402
from unshot.models import Source  # noqa: E402

# Families with a state beside attention, whose rows see each other in a pack.
STATEFUL = {"falcon_h1", "lfm2", "mamba2", "qwen3_next"}


BNB = {"quant_method": "bitsandbytes"}


def rows() -> list[Encoded]:
    """Rows of 6 to 27 tokens."""
    draw = np.random.default_rng(1)
    return [Encoded(draw.integers(3, 90, 6 + 7 * n).tolist(), 3 + n) for n in range(4)]


def test_twenty_families_or_more() -> None:
    assert len(FAMILIES) >= 30


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_have_the_loss_of_rows_alone_or_are_not_packed(family: str) -> None:
    if config_of(family) is None:
        pytest.skip(f"the installed transformers has no {family}")
    net, given = model_of(family), rows()
    problem = prove(net, "cpu")
    alone = sum(float(pack_loss(net, pack([row]), "cpu").detach()) for row in given)
    packed = float(pack_loss(net, pack(given), "cpu").detach()) if problem is None else alone
    assert packed == pytest.approx(alone, rel=1e-4), f"{family}: silently different"
    assert (problem is None) == allowed(net, PACKED)
    if family in STATEFUL:
        assert problem is not None


def leaky(monkeypatch: pytest.MonkeyPatch, net: Any, when: int) -> None:
    """A model that carries something from one row of a long enough sequence into the next."""
    inner = net.forward

    def forward(*args: Any, input_ids: Any, **options: Any) -> Any:
        out = inner(*args, input_ids=input_ids, **options)
        if input_ids.shape[1] >= when:
            out.logits = out.logits + 0.1 * torch.cumsum(out.logits, dim=1)
        return out

    monkeypatch.setattr(net, "forward", forward)


def test_rows_that_see_each_other_are_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model_of("llama")
    assert prove(net, "cpu") is None and allowed(net, PACKED)
    net = model_of("llama")
    leaky(monkeypatch, net, 10)
    problem = prove(net, "cpu")
    assert problem is not None and "with its neighbours" in problem and not allowed(net, PACKED)
    assert prove(net, "cpu") is not None, "what was found is remembered"


def folder_of(folder: Path, config: dict[str, Any]) -> Source:
    """A directory with a configuration and one small weight file."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({"w": np.zeros(4, dtype=np.float32)}, folder / "model.safetensors")
    return Source(folder.name, folder)


@pytest.mark.parametrize(
    ("config", "method", "words"),
    [
        ({"model_type": "gemma3", "vision_config": {"a": 1}, "text_config": {"model_type": "gemma3_text"}}, "lora",
         "multimodal.*text tower"),
        ({"model_type": "my_own", "auto_map": {"AutoModel": "x.Y"}}, "lora", "my_own.*is not run"),
        ({}, "lora", "model_type"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}, "lora",
         "GPTQ.*unquantised"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, "qlora", "AWQ.*unquantised"),
        ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, "lora", "MXFP4.*unquantised"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "compressed-tensors"}}, "lora",
         "compressed-tensors"),
        ({"model_type": "llama", "quantization_config": BNB | {"load_in_4bit": True}}, "lora",
         "bitsandbytes.*unquantised.*qlora"),
        ({"model_type": "llama", "quantization_config": BNB | {"load_in_8bit": True}}, "qlora", "bitsandbytes"),
        ({"model_type": "llama", "hidden_size": "wide"}, "lora", "cannot read it as a llama"),
    ],
)  # fmt: skip
def test_a_base_that_cannot_be_tuned_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], method: str, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        inspect_base(folder_of(tmp_path / "base", config), method)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_shape(tmp_path: Path, family: str) -> None:
    config = config_of(family)
    if config is None:
        pytest.skip(f"the installed transformers has no {family}")
    shape = inspect_base(folder_of(tmp_path / "base", config.to_dict()), "lora")
    assert shape.family == family and shape.hidden == 32 and shape.layers >= 2 and shape.vocabulary == 96


def test_weights_that_are_missing_or_cut_short_are_refused(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "base", config_of("llama").to_dict())
    check_weights(source)
    whole = (source.path / "model.safetensors").read_bytes()
    for damaged in (
        whole[:-3],
        whole[:4],
        b"\xff" * 8 + whole[8:],
        whole[:8] + b"[" + whole[9:],
        whole + b"x",
    ):
        (source.path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(InputError, match="download it again"):
            inspect_base(source, "lora")
    (source.path / "model.safetensors").rename(source.path / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (source.path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": names}), encoding="utf-8"
    )
    with pytest.raises(InputError, match=r"00002-of-00002.safetensors is missing"):
        inspect_base(source, "lora")


def test_the_soft_cap_of_gemma_2_is_kept() -> None:
    """torch's fused attention leaves it out: the loss would be another model's."""
    net = model_of("gemma2")
    assert net.config._attn_implementation == "eager"
    ids = torch.tensor([list(range(3, 30))])
    capped = net(ids).logits
    try:
        net.set_attn_implementation("sdpa")
    except ValueError:  # transformers 5 refuses it by itself
        return
    for layer in net.model.layers:
        layer.self_attn.config._attn_implementation = "sdpa"
    assert not torch.allclose(capped, net(ids).logits, atol=1e-3)


def test_a_kernel_is_taken_only_where_it_says_the_same() -> None:
    """The plain attention stands for a faster one here; a Liger kernel needs CUDA (tests/gpu)."""
    from transformers import AttentionInterface

    def half(module: Any, query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> Any:
        out, weights = AttentionInterface()["sdpa"](module, query, key, value, *rest, **more)
        return out / 2, weights

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("built for another GPU")

    AttentionInterface.register("unshot_half", half)
    AttentionInterface.register("unshot_broken", broken)
    net = model_of("llama")
    assert adopt(net, ["unshot_half", "unshot_broken"], "cpu", bf16=False) == ([], None)
    assert net.config._attn_implementation == "sdpa"
    assert adopt(net, ["eager"], "cpu", bf16=False) == (["eager"], None)
    assert net.config._attn_implementation == "eager" and installed("cpu") == []
    capped = model_of("gemma2")
    assert adopt(capped, ["sdpa"], "cpu", bf16=False) == ([], None)


def test_the_way_out_for_a_multimodal_base_gives_its_text_tower(tmp_path: Path) -> None:
    """What the refusal of Gemma 3 says to do, done: the directory is taken, and says what the whole model says."""
    from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(
        text_config=config_of("gemma3_text").to_dict(), vision_config=vision, mm_tokens_per_image=4,
        image_token_index=90, boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(InputError, match=r"text tower \(gemma3_text\).*docs/tune.md"):
        inspect_base(Source("whole", tmp_path / "whole"), "lora")
    page = (ROOT / "docs" / "tune.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(
        r"```python\n(from transformers import AutoModelForCausalLM, AutoModelForIm.*?)```", page, re.S
    )
    exec(
        recipe.replace('"DIR"', repr(str(tmp_path / "whole"))).replace(
            '"TEXT"', repr(str(tmp_path / "text"))
        ),
        {},
    )
    assert inspect_base(Source("text", tmp_path / "text"), "lora").family == "gemma3_text"
    tower = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.allclose(tower(ids).logits, whole(ids).logits, atol=1e-5)
