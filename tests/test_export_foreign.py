"""Adapters trained elsewhere: each key style gives the merge that peft gives; what cannot be merged is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from export.adapter import load_adapter
from export.foreign import bring_in, is_adapter, named_base
from export.merge import Merged
from export.run import Settings, export_run
from export.source import open_source
from tests.export_cases import add_lora
from tests.tiny_models import make
from unshot.catalog.formats import parse_targets
from unshot.console import Output
from unshot.errors import InputError
from unshot.models import resolve

pytestmark = pytest.mark.slow

QUIET = Output(verbosity=-1)
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make("llama", tmp_path_factory.mktemp("foreign") / "base")


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return make("qwen2", tmp_path_factory.mktemp("foreign") / "tied")


def by_peft(base: Path, adapter: Path, rows: int | None = None) -> dict[str, torch.Tensor]:
    net = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    if rows:
        net.resize_token_embeddings(rows, mean_resizing=False)
    merged: dict[str, torch.Tensor] = (
        PeftModel.from_pretrained(net, str(adapter)).merge_and_unload().state_dict()
    )
    return merged


def ours(base: Path, folder: Path) -> Merged:
    source = resolve(base)
    foreign = bring_in(folder, source)
    return Merged(source.weight_files(), source.config(), load_adapter(foreign.folder))


def equal(found: Merged, expected: dict[str, torch.Tensor]) -> None:
    changed = 0
    for name in found.names():
        value = found.rows(name)
        torch.testing.assert_close(value, expected[name], rtol=2e-6, atol=2e-6, msg=name)
        same = found.base.shape(name) == found.shape(name) if name in found.base else False
        changed += not same or not torch.equal(value, found.base[name].read().float())
    assert changed


def restyle(adapter: Path, folder: Path, rename: Any, **config: Any) -> Path:
    """A copy of a peft adapter with other key names."""
    folder.mkdir(parents=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({rename(k): v for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return folder


STYLES = {
    "peft": lambda k: k,
    "no prefix": lambda k: k.removeprefix(PREFIX),
    "compiled": lambda k: k.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled layers": lambda k: k.replace(".self_attn.", "._orig_mod.self_attn."),
    "fsdp": lambda k: k.replace(".layers.", "._fsdp_wrapped_module.layers."),
    "data parallel": lambda k: "module." + k.removeprefix(PREFIX),
    "language model": lambda k: k.replace("model.model.layers", "model.model.language_model.layers"),
    "older language model": lambda k: k.replace("model.model.layers", "model.language_model.model.layers"),
    "adapter's name": lambda k: k.replace(".weight", ".default.weight"),
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_key_styles_give_pefts_answer(base, tmp_path, style) -> None:
    add_lora(
        base, tmp_path / "adapter", rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3}, use_rslora=True
    )
    folder = restyle(tmp_path / "adapter", tmp_path / "styled", STYLES[style], target_modules=".*language.*")
    equal(ours(base, folder), by_peft(base, tmp_path / "adapter"))


def test_dora_and_biases_keep_their_kind(base, tmp_path) -> None:
    add_lora(base, tmp_path / "adapter", use_dora=True)
    folder = restyle(tmp_path / "adapter", tmp_path / "styled", STYLES["language model"])
    equal(ours(base, folder), by_peft(base, tmp_path / "adapter"))


def to_mlx(adapter: Path, folder: Path, *, dora: bool = False) -> Path:
    """mlx-lm's own form of a peft adapter."""
    folder.mkdir(parents=True)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    tensors = {}
    for name, value in load_file(adapter / "adapter_model.safetensors").items():
        plain = name.removeprefix(PREFIX).removesuffix(".weight")
        if plain.endswith("lora_magnitude_vector"):
            tensors[plain.replace("lora_magnitude_vector", "m")] = value
        else:
            tensors[plain.replace("lora_A", "lora_a").replace("lora_B", "lora_b")] = value.T.contiguous()
    save_file(tensors, folder / "adapters.safetensors")
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "model": "mlx-community/tiny-4bit",
        "lora_parameters": {
            "rank": settings["r"],
            "scale": settings["lora_alpha"] / settings["r"],
            "dropout": 0.0,
        },
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dora", [False, True])
def test_mlx_pairs_give_pefts_answer(base, tmp_path, dora) -> None:
    add_lora(base, tmp_path / "adapter", use_dora=dora, target_modules=["q_proj", "down_proj"])
    folder = to_mlx(tmp_path / "adapter", tmp_path / "mlx", dora=dora)
    assert is_adapter(folder)
    equal(ours(base, folder), by_peft(base, tmp_path / "adapter"))


def to_torchtune(adapter: Path, folder: Path) -> Path:
    """torchtune's own form of a peft adapter on heads of 16: it keeps the rows of q and k in pairs."""
    names = {"self_attn.": "attn.", "mlp.down_proj": "mlp.w2", "lm_head": "output", "model.layers": "layers"}

    def rename(key: str) -> str:
        key = key.removeprefix(PREFIX).replace("lora_A", "lora_a").replace("lora_B", "lora_b")
        for ours_, theirs in names.items():
            key = key.replace(ours_, theirs)
        return key

    restyle(adapter, folder, rename)
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, value in tensors.items():
        if "attn.q_proj.lora_b" in key:  # halves become pairs
            pairs = value.view(-1, 2, 8, value.shape[-1]).transpose(1, 2)
            tensors[key] = pairs.reshape(value.shape).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_torchtune_names_and_rotary_layout(base, tmp_path) -> None:
    """Its names and its rotary layout are undone."""
    add_lora(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "down_proj", "lm_head"])
    folder = to_torchtune(tmp_path / "adapter", tmp_path / "tune")
    equal(ours(base, folder), by_peft(base, tmp_path / "adapter"))


# What each trainer leaves beside the weights, and how it names them.
TRAINERS: dict[str, Any] = {
    "peft": lambda a, f: restyle(a, f, STYLES["peft"]),
    "TRL": lambda a, f: restyle(a, f, STYLES["peft"], peft_version="0.17.0", task_type="CAUSAL_LM"),
    "unsloth": lambda a, f: restyle(
        a,
        f,
        STYLES["peft"],
        base_model_name_or_path="unsloth/tiny-bnb-4bit",
        target_modules=r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj))",
    ),
    "axolotl": lambda a, f: restyle(a, f, STYLES["compiled layers"], lora_dropout=0.05),
    "LLaMA-Factory": lambda a, f: restyle(a, f, STYLES["data parallel"], loftq_config={}),
    "FSDP": lambda a, f: restyle(a, f, STYLES["fsdp"]),
    "torchtune": to_torchtune,
    "mlx-lm": to_mlx,
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_exported_adapter_answers_as_peft_does(base, tmp_path, trainer) -> None:
    """The whole way: the file that comes out says what peft says of the adapter in its own form."""
    pytest.importorskip("llama_cpp")
    add_lora(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "down_proj"])
    folder = TRAINERS[trainer](tmp_path / "adapter", tmp_path / "foreign")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Fees are due in 30 days.", "completion": "low"}\n' * 2)
    settings = Settings(base=str(base), data=rows)
    (report,) = export_run(str(folder), parse_targets(["gguf:f32"]), tmp_path / "art", QUIET, settings).parity
    assert report.passed and report.figures.greedy and report.figures.greedy.rows == 2
    net = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    ids = report.probes[0].ids
    with torch.inference_mode():
        told = PeftModel.from_pretrained(net, str(tmp_path / "adapter"))(torch.tensor([ids])).logits[0, -1]
    found = torch.log_softmax(told, 0)[report.probes[0].top]
    torch.testing.assert_close(
        found, torch.tensor(report.probes[0].log_probabilities), rtol=0, atol=1e-4, msg=trainer
    )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_resized_vocabulary(family, tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = make(family, tmp_path / "base")
    net = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    rows = net.config.vocab_size + 5
    torch.manual_seed(3)
    net.resize_token_embeddings(rows, mean_resizing=False)
    net = get_peft_model(net, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, value in net.named_parameters():
            if "lora_B" in name or "embed" in name or "lm_head" in name:
                value.add_(0.05 * torch.randn_like(value))
    net.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    found = ours(folder, tmp_path / "adapter")
    assert found.resized == rows and found.config["vocab_size"] == rows
    assert found.untied is False
    equal(found, by_peft(folder, tmp_path / "adapter", rows))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rows_trained_alone(family, tmp_path) -> None:
    folder = make(family, tmp_path / "base")
    from peft import LoraConfig, get_peft_model

    net = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    options = {
        "r": 4,
        "target_modules": ["q_proj"],
        "trainable_token_indices": [3, 7, 300],
        "task_type": "CAUSAL_LM",
    }
    net = get_peft_model(net, LoraConfig(**options))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if "token_adapter" in name and value.requires_grad:
                value.add_(torch.randn_like(value))
    net.save_pretrained(str(tmp_path / "adapter"))
    found = ours(folder, tmp_path / "adapter")
    assert not found.untied
    equal(found, by_peft(folder, tmp_path / "adapter"))


def test_lora_bias(tmp_path) -> None:
    folder = make("qwen2", tmp_path / "base")
    add_lora(folder, tmp_path / "adapter", lora_bias=True, target_modules=["q_proj"])
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, value in tensors.items():
        if name.endswith("lora_B.bias"):
            tensors[name] = torch.randn_like(value)
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    equal(ours(folder, tmp_path / "adapter"), by_peft(folder, tmp_path / "adapter"))


def test_lora_bias_without_a_place_is_named(base, tmp_path) -> None:
    add_lora(base, tmp_path / "adapter", lora_bias=False, target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors |= {
        k.replace(".weight", ".bias"): torch.ones(v.shape[0]) for k, v in tensors.items() if "lora_B" in k
    }
    save_file(tensors, path)
    with pytest.raises(InputError, match="lora_bias"):
        ours(base, tmp_path / "adapter")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq", "corda"])
def test_starts_that_change_the_base_are_named_with_the_way_out(base, tmp_path, start) -> None:
    add_lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    folder = restyle(tmp_path / "adapter", tmp_path / "styled", lambda k: k, init_lora_weights=start)
    with pytest.raises(InputError, match=rf"{start}.*path_initial_model_for_weight_conversion"):
        ours(base, folder)


def test_what_cannot_be_merged_is_one_line(base, tmp_path) -> None:
    add_lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", pickled)
    (pickled / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"save_file.*weights_only=True"):
        open_source(str(pickled), str(base), QUIET)
    quantised = restyle(
        tmp_path / "adapter", tmp_path / "q", lambda k: k, base_model_name_or_path="unsloth/tiny-bnb-4bit"
    )
    with pytest.raises(InputError, match="--base"):
        open_source(str(quantised), None, QUIET)
    nameless = restyle(tmp_path / "adapter", tmp_path / "n", lambda k: k, base_model_name_or_path=None)
    with pytest.raises(InputError, match="names no base"):
        open_source(str(nameless), None, QUIET)
    odd = restyle(tmp_path / "adapter", tmp_path / "o", lambda k: k.replace("q_proj", "query"))
    with pytest.raises(InputError, match="query"):
        open_source(str(odd), str(base), QUIET)
    with pytest.raises(InputError, match="names no base"):
        named_base(nameless)


def test_an_adapter_brings_its_own_tokenizer_and_rows(base, tmp_path) -> None:
    add_lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path / "adapter")
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "Fees are due.", "completion": "low"}\n' * 3)
    model = open_source(str(tmp_path / "adapter"), str(base), QUIET, data)
    assert model.tokenizer == tmp_path / "adapter" and len(model.rows) == 3 and model.task is None
    plain = open_source(str(tmp_path / "adapter"), str(base), QUIET)
    assert len(plain.rows) > 20


# What an adapter's configuration may hold, by what is said about it: peft would load something else, or end in an error
# of its own.
ODD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "alpha null": ({"lora_alpha": None}, "`lora_alpha` is None; it must be a number"),
    "alpha text": ({"lora_alpha": "16"}, "`lora_alpha` is '16'"),
    "alpha not finite": ({"lora_alpha": float("nan")}, "`lora_alpha` is nan"),
    "rank of another adapter": ({"r": 8}, r"has rank 4, .*says 8; mend the configuration"),
    "pattern of another rank": ({"rank_pattern": {"v_proj": 2}}, r"v_proj.*has rank 4, .*says 2"),
    "pattern no map": ({"rank_pattern": [1]}, "`rank_pattern` must map"),
    "pattern no expression": ({"alpha_pattern": {"(": 3}}, "no regular expression"),
    "pattern no number": ({"alpha_pattern": {"q_proj": "3"}}, "`alpha_pattern: q_proj` is '3'"),
    "kind in small letters": ({"peft_type": "lora"}, "peft_type is lora"),
    "an option of a newer peft": ({"use_twisted": {"a": 1}}, "`use_twisted` is set, and export does not know"),
    "a kind that pools its inputs": ({"use_qalora": True}, "`use_qalora` is set"),
    "a router of adapters": ({"arrow_config": {"top_k": 2}}, "`arrow_config` is set"),
    "a start that changes the base": ({"init_lora_weights": "lora_ga"}, "lora_ga, which changed the base's weights"),
    "a start that is not known": ({"init_lora_weights": "novel"}, "init_lora_weights is novel"),
    "fewer modules than the file": ({"target_modules": ["q_proj"]}, r"v_proj.*leaves out, so that peft would not load"),
    "other modules": ({"target_modules": ["o_proj"]}, "leaves out, so that peft would not load it"),
    "no such modules": ({"target_modules": ["query"]}, "peft cannot put it on this base"),
    "fewer layers than the file": ({"layers_to_transform": [0]}, r"layers\.1\..*leaves out"),
    "modules left out": ({"exclude_modules": ["v_proj"]}, r"v_proj.*leaves out"),
    "magnitudes not saved": ({"use_dora": True}, "only a part of .*lora_magnitude_vector"),
    "parameters no list": ({"target_parameters": "experts"}, "peft cannot put it on this base"),
}  # fmt: skip


@pytest.fixture(scope="module")
def two_modules(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("odd") / "adapter"
    add_lora(base, folder, target_modules=["q_proj", "v_proj"])
    return folder


@pytest.mark.parametrize("odd", ODD_CONFIGS)
def test_a_configuration_that_is_not_the_files_is_named(base, two_modules, tmp_path, odd) -> None:
    config, words = ODD_CONFIGS[odd]
    folder = restyle(two_modules, tmp_path / "a", lambda k: k, **config)
    with pytest.raises(InputError, match=words):
        open_source(str(folder), str(base), QUIET)


def test_modules_without_a_pair_are_said(base, two_modules, tmp_path) -> None:
    folder = restyle(two_modules, tmp_path / "a", lambda k: k, target_modules=["q_proj", "v_proj", "o_proj"])
    model = open_source(str(folder), str(base), QUIET)
    assert any("2 modules" in note and "o_proj" in note for note in model.notes)


def test_key_endings_are_pefts(base, two_modules, tmp_path) -> None:
    """An adapter's name in the keys, or no `.weight`: peft would load none of these, and say so in a warning."""
    expected = by_peft(base, two_modules)
    named = restyle(two_modules, tmp_path / "named", lambda k: k.replace(".weight", ".mine.weight"))
    bare = restyle(two_modules, tmp_path / "bare", lambda k: k.removesuffix(".weight"))
    for folder in (named, bare):
        found = open_source(str(folder), str(base), QUIET)
        equal(found.merged(), expected)
        assert found.adapter_path
        equal(found.merged(), by_peft(base, found.adapter_path))


def test_two_adapters_in_one_file_are_named(base, two_modules, tmp_path) -> None:
    folder = restyle(two_modules, tmp_path / "two", lambda k: k)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for other in (
        {k.replace(".weight", ".other.weight"): 2 * v for k, v in tensors.items()},
        {k.removeprefix(PREFIX): 2 * v for k, v in tensors.items()},
    ):
        save_file({**tensors, **other}, path)
        with pytest.raises(InputError, match=r"twice.*or more than one adapter"):
            open_source(str(folder), str(base), QUIET)
