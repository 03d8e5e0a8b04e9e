"""The catalog: shapes against published counts, names as people and CSV files write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unshot import catalog
from unshot.catalog.architecture import architecture_from_config
from unshot.errors import InputError


def test_parameter_counts_match_the_publishers() -> None:
    known = [a for a in catalog.models().values() if a.published_params]
    assert len(known) > 35
    for arch in known:
        assert arch.params == pytest.approx(arch.published_params, rel=2e-3), arch.name


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("H100-SXM-80GB", "h100-sxm"), ("A100-SXM-80GB", "a100-sxm-80"), ("RTX 3090 24GB", "rtx-3090"),
        ("RTX 3080 10GB", "rtx-3080"), ("A40 48GB", "a40"), ("A100 PCIe 80GB", "a100-pcie-80"),
        ("H100 PCIe 80GB", "h100-pcie"), ("M1 Max 32-core 64GB", "m1-max"), ("M2 Ultra 76-core 192GB", "m2-ultra"),
        ("H200 141GB HBM3", "h200"), ("a100-40gb", "a100-pcie-40"), ("RTX 3080Ti 12GB", "rtx-3080-ti"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("Tesla T4", "t4"), ("GH200 96GB", "gh200-96"), ("MI300X", "mi300x"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"), ("NVIDIA A100-SXM4-80GB", "a100-sxm-80"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"), ("NVIDIA B300 SXM6 AC", "b300"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"), ("AMD Instinct MI300X OAM", "mi300x"), ("NVIDIA GB10", "dgx-spark"),
    ],
)  # fmt: skip
def test_gpu_names(name: str, key: str) -> None:
    assert catalog.gpu(name).name == key


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"), ("Meta-Llama-3-8B", "llama-3-8b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"), ("LLaMA v3.1 8B", "llama-3.1-8b"),
        ("google/gemma-3-12b-it", "gemma-3-12b"), ("mixtral 8x7b", "mixtral-8x7b"),
    ],
)  # fmt: skip
def test_model_names(name: str, key: str) -> None:
    assert catalog.model(name).name == key


def test_cloud_instances_are_their_devices_at_their_price() -> None:
    eighth = catalog.gpu("p5.48xlarge")
    assert eighth.name == "h100-sxm" and eighth.price == pytest.approx(55.04 / 8)
    assert "p5.48xlarge" in eighth.price_source and eighth.price_date == "2026-11-09"
    assert catalog.gpu("g6.xlarge").name == "l4" and catalog.gpu("a3-highgpu-8g").name == "h100-sxm"


LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "intermediate_size": 14336,
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model_type": "jamba", "mamba_d_state": 16, "attn_layer_period": 8}, "mamba_d_state"),
        ({"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"] * 16}, "mamba"),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 16}, "conv"),
        (
            {"model_type": "recurrent_gemma", "block_types": ["recurrent", "recurrent", "attention"]},
            "recurrent",
        ),
        ({"model_type": "xlm-roberta"}, "encoder"),
    ],
)
def test_layers_that_are_not_forecast_are_refused(more: dict[str, object], said: str) -> None:
    """They were counted as attention: Jamba had 92 billion weights instead of 52, and 8 times its cache."""
    with pytest.raises(InputError, match=said):
        architecture_from_config({**LLAMA, **more})


def test_linear_attention_is_read_from_its_interval() -> None:
    """Qwen3-Next's file gives an interval: 12 of 48 layers keep keys and values, 2 heads of 256 each."""
    linear = {
        "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
    }  # fmt: skip
    own = {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "num_hidden_layers": 48}
    arch = architecture_from_config(
        {**LLAMA, "model_type": "qwen3_next", "full_attention_interval": 4, **own, **linear}
    )
    assert arch.kv_elements * arch.cached_tokens(10_000) == pytest.approx(
        12 * 2 * 2 * 256 * 10_000, rel=0.001
    )


def test_the_format_of_stored_weights_is_read() -> None:
    assert architecture_from_config({**LLAMA, "quantization_config": {"quant_method": "awq"}}).stored == "awq"


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gpt-oss-20b", 20.9), ("gpt-oss-120b", 116.8), ("qwen3-235b-a22b", 235.1), ("ministral-3-3b", 3.4),
        ("ministral-3-8b", 8.5), ("ministral-3-14b", 13.5), ("granite-3.3-8b", 8.17), ("olmo-2-13b", 13.7),
        ("llama-4-scout", 107.8),
    ],
)  # fmt: skip
def test_the_newer_models_have_their_size(name: str, billions: float) -> None:
    assert catalog.model(name).params / 1e9 == pytest.approx(billions, rel=0.01)


def test_own_models_and_devices_go_before_the_catalogs(tmp_path: Path) -> None:
    from unshot.case import OwnGpu
    from unshot.catalog.gpu import own_gpu

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(BASE))
    mine = own_gpu("card", OwnGpu(memory_gib=48, bandwidth_gbs=864, fp16=181, price=0.9))
    catalog.use_own({"card": mine}, {"mine": catalog.read_architecture(tmp_path / "mine")})
    try:
        assert catalog.gpu("card").memory == 48 * 2**30 and catalog.gpu("card").price == 0.9
        assert catalog.model("mine").layers == BASE["num_hidden_layers"]
        assert catalog.model(str(tmp_path / "mine")).name == "mine"
    finally:
        catalog.use_own({}, {})
    with pytest.raises(InputError):
        catalog.gpu("card")


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"llama-3\.1-8b"):
        catalog.model("llama-3.1-9b")
    with pytest.raises(InputError, match="h100"):
        catalog.gpu("H101 SXM")
    with pytest.raises(InputError, match="fp8"):
        catalog.precision("fp9")


def test_every_price_has_source_and_date() -> None:
    for gpu in catalog.gpus().values():
        assert gpu.source, gpu.name
        if gpu.price is not None:
            assert gpu.price > 0 and gpu.price_source and gpu.price_date, gpu.name


BASE = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip


def test_config_of_llama_equals_the_catalog() -> None:
    arch = catalog.architecture_from_config(BASE)
    known = catalog.model("llama-3.1-8b")
    assert arch.params == known.params == 8030261248
    assert arch.kv_elements == 2 * 32 * 8 * 128


def test_config_attention_kinds() -> None:
    mha = {k: v for k, v in BASE.items() if k != "num_key_value_heads"}
    assert catalog.architecture_from_config(mha).kv_heads == 32
    assert catalog.architecture_from_config({**BASE, "multi_query": True}).kv_heads == 1
    assert catalog.architecture_from_config({**BASE, "head_dim": 256}).head_dim == 256


def test_config_of_experts() -> None:
    mixtral = {
        **BASE,
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
    }
    arch = catalog.architecture_from_config(mixtral)
    assert arch.params == pytest.approx(46702792704, rel=1e-3)
    assert 12e9 < arch.active_params + 2 * arch.head_params < 13.2e9


@pytest.mark.parametrize(
    ("extra", "window", "windowed"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, 4096, 32),
        ({"model_type": "mistral", "sliding_window": None}, 0, 0),
        ({"model_type": "gemma2", "sliding_window": 4096}, 4096, 16),
        ({"model_type": "gemma3_text", "sliding_window": 1024}, 1024, 27),
        ({"model_type": "gemma3_text", "sliding_window": 1024, "sliding_window_pattern": 4}, 1024, 24),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, 0, 0),
        (
            {"sliding_window": 512, "layer_types": ["sliding_attention"] * 20 + ["full_attention"] * 12},
            512,
            20,
        ),
    ],
)
def test_config_windows(extra: dict, window: int, windowed: int) -> None:
    arch = catalog.architecture_from_config({**BASE, **extra})
    assert (arch.window, arch.windowed) == (window, windowed)


def test_windowed_layers_keep_only_their_window() -> None:
    arch = catalog.model("gemma-3-12b")
    assert arch.cached_tokens(512) == 512
    assert arch.cached_tokens(10_000) == pytest.approx((8 * 10_000 + 40 * 1024) / 48)


def test_text_config_and_ties() -> None:
    nested = {"model_type": "gemma3", "text_config": {**BASE, "model_type": "gemma3_text"}}
    nested["text_config"].pop("tie_word_embeddings")
    assert catalog.architecture_from_config(nested).tied
    assert not catalog.architecture_from_config(BASE).tied


@pytest.mark.parametrize("change", [{"num_hidden_layers": None}, {"hidden_size": "4096"}, {"vocab_size": -1}])
def test_bad_configs_are_refused(change: dict) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        catalog.architecture_from_config({**BASE, **change})


def test_experts_without_their_number_per_token_are_refused() -> None:
    # Taken as 2 before, in silence: OLMoE routes to 8, gpt-oss to 4, Llama 4 to 1.
    with pytest.raises(InputError, match="no `num_experts_per_tok`"):
        catalog.architecture_from_config({**BASE, "model_type": "olmoe", "num_experts": 64})


def test_an_mlp_without_a_width_is_refused_but_where_transformers_derives_it() -> None:
    plain = {k: v for k, v in BASE.items() if k != "intermediate_size"}
    with pytest.raises(InputError, match="no `intermediate_size`"):
        catalog.architecture_from_config(plain)
    gpt2 = {**plain, "model_type": "gpt2", "n_inner": None}
    assert catalog.architecture_from_config(gpt2).intermediate == 4 * 4096


def test_latent_attention_keeps_one_vector_for_all_heads() -> None:
    deepseek = {
        "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128,
        "num_key_value_heads": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048, "vocab_size": 129280,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 3,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "max_position_embeddings": 163840,
    }  # fmt: skip
    arch = catalog.architecture_from_config(deepseek)
    # Of one layer: queries 1,536 x (7,168 + 128 x 192), keys and values 7,168 x 576 + 512 x 128 x 256, then the
    # output, 128 x 128 x 7,168.
    assert arch.attention_params == 61 * (48_758_784 + 4_128_768 + 16_777_216 + 117_440_512)
    assert arch.kv_elements == 61 * (512 + 64)  # 2 x 61 x 128 x 56 = 874,496 before: 25 times too much
    assert arch.head_dim == (128 + 64 + 128) // 2
    assert "first_k_dense_replace 3" in arch.unconfirmed
