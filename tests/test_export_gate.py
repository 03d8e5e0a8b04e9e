"""The parity gate catches planted faults: each is a real file with one thing wrong, run in its own engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("llama_cpp")

from export import adapter, gguf_file, parity, reference, vocab
from export.merge import Merged
from export.run import check
from export.source import open_source
from tests.export_cases import make_run
from tests.export_faults import FAULTS
from tests.tiny_models import make
from unshot.catalog.formats import Target
from unshot.console import Output
from unshot.errors import InputError

pytestmark = pytest.mark.slow

QUIET = Output(verbosity=-1)


class Case:
    """A tuned tiny model and what the evaluated model says about its test rows."""

    def __init__(
        self,
        family: str,
        root: Path,
        config: dict[str, Any] | None = None,
        adapter: dict[str, Any] | None = None,
    ) -> None:
        self.base = make(family, root / family, **(config or {}))
        self.run = make_run(self.base, root / f"{family}-run", **(adapter or {}))
        self.model = open_source(str(self.run), None, QUIET)
        net = reference.evaluated(self.base, self.model.adapter_path)
        folder = root / f"{family}-expected"
        folder.mkdir()
        self.expected = parity.expect(self.model, net, 4, folder)

    def write(
        self, path: Path, precision: str = "f32", merged: Merged | None = None, **facts: object
    ) -> Path:
        said = {
            "template": self.model.chat.tokenizer.template.source,
            "end_of_turn": self.model.chat.end,
            **facts,
        }
        gguf_file.write_gguf(
            path,
            merged or self.model.merged(),
            self.base,
            precision,
            gguf_file.Facts(name="tiny", base="tiny", license=None, **said),  # type: ignore[arg-type]
        )
        return path

    def failures(self, path: Path, precision: str = "f32") -> str:
        return "; ".join(check(self.model, Target("gguf", precision), path, self.expected, None).failures)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Case:
    return Case("llama", tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory) -> Case:
    return Case("qwen2", tmp_path_factory.mktemp("gate2"))


@pytest.mark.parametrize("precision", ["f32", "f16", "bf16", "q8_0"])
def test_a_right_file_passes(llama, tmp_path, precision) -> None:
    assert llama.failures(llama.write(tmp_path / "m.gguf", precision), precision) == ""


def test_a_right_file_with_biases_and_tied_head_passes(qwen2, tmp_path) -> None:
    assert qwen2.failures(qwen2.write(tmp_path / "m.gguf")) == ""


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    """One case a kind of model, made when it is first asked for."""
    return {}


# Those that no prompt shows, or only by little; the rest and the other precisions: bench_export_faults.py.
SUBTLE = (
    "epsilon ten times as large", "an ordinary token ends an answer", "another start-of-text token",
    "two rare rows of the embedding swapped", "two rare tokens swapped", "two late merges swapped",
    "context length doubled", "YaRN's original length doubled", "bias of k dropped", "final soft cap of 50 for 30",
    "window one wider", "change dropped in one module",
)  # fmt: skip


@pytest.mark.parametrize("name", SUBTLE)
def test_a_subtle_fault_is_seen(cases, tmp_path, tmp_path_factory, monkeypatch, name) -> None:
    fault = FAULTS[name]
    kind = f"{fault.model} {fault.config} {fault.adapter}"
    if kind not in cases:
        cases[kind] = Case(fault.model, tmp_path_factory.mktemp("fault"), fault.config, fault.adapter)
        assert cases[kind].failures(cases[kind].write(tmp_path / "right.gguf")) == ""
    fault.plant(monkeypatch)
    assert cases[kind].failures(cases[kind].write(tmp_path / "m.gguf"))


def test_wrong_eos(llama, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "base"
    shutil.copytree(llama.base, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "eos_token": "<|im_start|>"}))
    monkeypatch.setattr(llama, "base", folder)
    assert "eos token" in llama.failures(llama.write(tmp_path / "m.gguf"))


def test_wrong_chat_template(llama, tmp_path) -> None:
    template = llama.model.chat.tokenizer.template.source.replace("assistant\n", "assistant")
    assert "chat template" in llama.failures(llama.write(tmp_path / "m.gguf", template=template))


def test_tokens_off_by_one(llama, tmp_path, monkeypatch) -> None:
    real = vocab.base_tokens

    def rotated(*args: object) -> tuple[list[str], list[int]]:
        tokens, types = real(*args)  # type: ignore[arg-type]
        return [*tokens[:4], tokens[-2], *tokens[4:-2], tokens[-1]], types

    monkeypatch.setattr(vocab, "base_tokens", rotated)
    assert "token ids differ" in llama.failures(llama.write(tmp_path / "m.gguf"))


def test_special_tokens_as_text(llama, tmp_path, monkeypatch) -> None:
    real = vocab.base_tokens
    monkeypatch.setattr(vocab, "base_tokens", lambda *a: (real(*a)[0], [1] * len(real(*a)[1])))
    assert "special tokens" in llama.failures(llama.write(tmp_path / "m.gguf"))


def test_unscaled_lora(llama, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(adapter, "scaling", lambda config, module: 1.0)
    merged = Merged(
        llama.model.base.weight_files(),
        llama.model.base.config(),
        adapter.load_adapter(llama.run / "adapter"),
    )
    assert "KL divergence" in llama.failures(llama.write(tmp_path / "m.gguf", merged=merged))


def test_forgotten_adapter(llama, tmp_path) -> None:
    merged = Merged(llama.model.base.weight_files(), llama.model.base.config())
    assert "KL divergence" in llama.failures(llama.write(tmp_path / "m.gguf", "q8_0", merged=merged), "q8_0")


def test_adapter_of_another_base(llama, tmp_path) -> None:
    other = make("llama", tmp_path / "other", seed=9)
    with pytest.raises(InputError, match="only its own base"):
        open_source(str(llama.run), str(other), QUIET)
    # Were the hashes not compared, the tensors would tell.
    merged = Merged(sorted(other.glob("*.safetensors")), llama.model.base.config(), llama.model.adapter)
    assert "not the model's" in llama.failures(llama.write(tmp_path / "m.gguf", merged=merged))


def test_truncated_file(llama, tmp_path) -> None:
    path = llama.write(tmp_path / "m.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 4096])
    found = llama.failures(path)
    assert "engine" in found and "m.gguf" in found


def test_damaged_bytes(llama, tmp_path) -> None:
    path = llama.write(tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    data[-60000:-40000] = bytes(20000)
    path.write_bytes(bytes(data))
    assert "KL divergence" in llama.failures(path)


def test_fp16_overflow(llama, tmp_path, monkeypatch) -> None:
    merged = llama.model.merged()
    rows = merged.rows

    def huge(name: str, *args: int) -> object:
        values = rows(name, *args).clone()
        if name == "model.layers.0.mlp.up_proj.weight":
            values[0, 0] = 1e5
        return values

    merged.rows = huge  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"ffn_up.*65504"):
        llama.write(tmp_path / "m.gguf", "f16", merged=merged)
    # Written all the same, as a converter without the check would, it is caught by its numbers.
    import torch

    monkeypatch.setattr(gguf_file, "encode", lambda v, kind, name="": (
        v.to(torch.float16).view(torch.uint8).numpy() if kind == "f16" else v.contiguous().numpy().view("uint8")
    ))  # fmt: skip
    found = llama.failures(llama.write(tmp_path / "o.gguf", "f16", merged=merged), "f16")
    assert "NaN or infinity" in found or "KL divergence" in found


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_a_layer_at_a_time_gives_the_same_logits(family, tmp_path) -> None:
    import numpy as np

    base = make(family, tmp_path / "base")
    for kind in ({}, {"use_dora": True}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}):
        adapter_path = tmp_path / f"adapter{len(kind)}{'use_dora' in kind}"
        make_run(base, adapter_path, **kind)
        ids = [[5, 9, 33, 70, 12, 8], [40, 41, 42, 43]]
        whole = reference.evaluated(base, adapter_path / "adapter").logits(ids, [0, 1])
        files = sorted(base.glob("*.safetensors"))
        net = reference.evaluated(base, adapter_path / "adapter", files=files, streams=True)
        for _ in range(2):  # what was dropped can be read again
            for expected, found in zip(whole, net.logits(ids, [0, 1]), strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_low_memory_reports_the_same_figures(llama, tmp_path) -> None:
    from export.run import Settings, export_run

    figures = []
    for low in (False, True):
        result = export_run(
            str(llama.run),
            [Target("gguf", "f32"), Target("gguf", "q8_0")],
            tmp_path / str(low),
            QUIET,
            Settings(low_memory=low),
        )
        figures.append([r.figures for r in result.parity])
    for whole, low_one in zip(*figures, strict=True):
        assert low_one.logits.kl == pytest.approx(whole.logits.kl, abs=1e-5)
        assert low_one.greedy == whole.greedy
