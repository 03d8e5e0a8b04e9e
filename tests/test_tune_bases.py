"""Bases of many families through the command: a dry run checks what the load would, a run falls back and says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_unshot
from tests.model_families import config_of, model_of
from tests.planner_files import model_folder

pytest.importorskip("torch")

DRY = (
    "gpt2",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "lfm2",
    "qwen3_next",
    "falcon_h1",
    "gemma2",
    "mamba2",
    "opt",
)


def base_of(folder: Path, family: str) -> Path:
    """A model directory of a family with a tokenizer and ChatML."""
    from transformers import AutoModelForCausalLM

    from unshot.text.chat import load_tokenizer

    model_folder(folder)
    config = config_of(family)
    size = load_tokenizer(folder).backend.get_vocab_size()
    config.vocab_size = size
    for key in ("max_position_embeddings", "n_positions"):
        if hasattr(config, key):
            setattr(config, key, 512)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short rows of two classes."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["late fee", "end with notice", "party pays interest", "the supplier may end this"]
    lines = [
        {
            "prompt": f"{words[n % 4]} {words[(n // 4) % 4]} clause {n}",
            "completion": "payment" if n % 2 else "termination",
        }
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def dry(base: Path, rows: Path, *more: str) -> Any:
    """A dry run's exit code, result and messages."""
    return run_unshot(
        "tune", rows, "--base", base, "--dry-run", "--json", "--instruction", "Classify it.", *more
    )


@pytest.mark.parametrize("family", DRY)
def test_a_dry_run_of_every_family_is_an_answer(tmp_path: Path, rows: Path, family: str) -> None:
    if config_of(family) is None:
        pytest.skip(f"the installed transformers has no {family}")
    done = dry(base_of(tmp_path / family, family), rows)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert family in result["reasons"]["base"] and result["memory"]["peak"] > 0
    if family == "gpt_oss":
        assert any("experts" in note and "stay as they are" in note for note in result["notes"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "unquantised"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"model_type": "gemma3", "vision_config": {"hidden_size": 8}}, "multimodal"),
        ({"model_type": "nobody_knows"}, "nobody_knows"),
    ],
)
def test_a_dry_run_refuses_what_the_load_would(
    tmp_path: Path, rows: Path, change: dict[str, Any], words: str
) -> None:
    base = base_of(tmp_path / "base", "llama")
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    for more in ((), ("--method", "full")):
        done = dry(base, rows, *more)
        assert done.returncode == 2 and words in done.stderr and "internal error" not in done.stderr


def test_a_missing_shard_and_a_long_row_are_refused_by_the_dry_run(tmp_path: Path, rows: Path) -> None:
    base = base_of(tmp_path / "base", "llama")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (base / "model.safetensors").rename(base / names["a"])
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}), encoding="utf-8")
    done = dry(base, rows)
    assert done.returncode == 2 and "00002.safetensors is missing" in done.stderr
    base = base_of(tmp_path / "short", "llama")
    path = base / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"max_position_embeddings": 40}
    path.write_text(json.dumps(config), encoding="utf-8")
    done = dry(base, rows)
    assert done.returncode == 2 and "longer than the model's context of 40" in done.stderr


def test_a_file_of_the_base_that_is_none_is_one_line_and_never_taken_as_empty(
    tmp_path: Path, rows: Path
) -> None:
    base = base_of(tmp_path / "base", "llama")
    read = {
        "config.json": ("hidden_act", "rope_theta", "num_key_value_heads"),
        "tokenizer_config.json": ("chat_template",),
        "special_tokens_map.json": (),
        "generation_config.json": (),
        "model.safetensors.index.json": ("weight_map",),
    }
    for name, keys in read.items():
        path = base / name
        was = path.read_bytes() if path.exists() else None
        odd = [b"[]", b"null", b'"x"', b"", b"\xff\xfe\x00", b"[" * 100_000]
        for key in keys:
            found = json.loads(was or b"{}")
            odd += [json.dumps(found | {key: value}).encode() for value in ([1], {"a": 3}, [["x"]])]
        for content in odd:
            path.write_bytes(content)
            done = dry(base, rows)
            assert done.returncode == 2 and name in done.stderr, (name, content[:40], done.stderr)
        path.unlink()
        path.symlink_to("nothing.json")
        assert dry(base, rows).returncode == 2, name
        path.unlink()
        if was is not None:
            path.write_bytes(was)
    assert dry(base, rows).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["lfm2", "gpt_oss", "gpt2"])
def test_a_run_packs_where_it_may_and_says_where_not(
    tmp_path: Path, rows: Path, family: str, dtype: str
) -> None:
    if config_of(family) is None:
        pytest.skip(f"the installed transformers has no {family}")
    base = base_of(tmp_path / family, family)
    done = run_unshot(
        "tune", rows, "--base", base, "--out", tmp_path / "run", "--epochs", "1", "--no-gates", "--rank", "2",
        "--instruction", "Classify it.", "--json", "--dtype", dtype,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert ("one by one" in done.stderr) == (family != "gpt2")
    assert ("one by one" in manifest["config"]["packing"]) == (family != "gpt2")


@pytest.mark.slow
@pytest.mark.parametrize("init", ["rslora", "pissa"])
def test_other_beginnings_change_the_adapter_and_load_on_the_untouched_base(
    tmp_path: Path, rows: Path, init: str
) -> None:
    import torch

    from tune.model import load_base, load_tuned
    from unshot.models import resolve

    base = base_of(tmp_path / "base", "llama")
    run = tmp_path / "run"
    done = run_unshot(
        "tune", rows, "--base", base, "--out", run, "--epochs", "1", "--no-gates", "--rank", "4", "--init", init,
        "--instruction", "Classify it.", "--json", "--learning-rate", "1e-3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["use_rslora"] == (init == "rslora") and config["r"] == (8 if init == "pissa" else 4)
    source, ids = resolve(base), torch.arange(3, 40)[None]
    plain = load_base(source, "cpu", bf16=False).eval()
    tuned = load_tuned(run, source, "cpu", bf16=False).eval()
    with torch.no_grad(), tuned.disable_adapter():
        torch.testing.assert_close(tuned(ids).logits, plain(ids).logits)
    with torch.no_grad():
        assert not torch.allclose(tuned(ids).logits, plain(ids).logits)


def test_beginnings_go_with_low_rank_methods_only(tmp_path: Path, rows: Path) -> None:
    base = base_of(tmp_path / "base", "llama")
    assert "goes with lora" in dry(base, rows, "--init", "pissa", "--method", "dora").stderr
    assert "not with full" in dry(base, rows, "--init", "rslora", "--method", "full").stderr


def test_a_model_that_begins_with_pissa_says_what_its_base_says(tmp_path: Path) -> None:
    import torch

    from tune.model import prepare_model
    from unshot.case import TuneSettings

    net, ids = model_of("llama"), torch.arange(3, 30)[None]
    with torch.no_grad():
        before = net(ids).logits
        after = prepare_model(net, TuneSettings(init="pissa", rank=4)).eval()(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
