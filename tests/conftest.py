"""Fixtures: the real embedded model, and a tiny random-weight one with the same tokenizer for plumbing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"

# Tests run on one machine with others; a hub that is not there must not be waited for.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Meaning is compared where a test asks for it: an embedder that happens to be installed would change every split.
os.environ.setdefault("UNSHOT_EMBEDDER", "off")
# Readings of test rows are recorded for the user's data, not for the tests'.
os.environ.setdefault("UNSHOT_DATA", tempfile.mkdtemp(prefix="unshot-tests-"))
# This checkout is what processes started elsewhere must run, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """Directory of SmolLM2-135M-Instruct."""
    from unshot import embedded

    return embedded.ensure(None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path) -> Path:
    """A random 2-layer Llama with the embedded tokenizer, as a Hugging Face directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    source = json.loads((embedded_model / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=source["vocab_size"],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=source["bos_token_id"],
        eos_token_id=source["eos_token_id"],
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for path in embedded_model.iterdir():
        if path.name.startswith(("tokenizer", "special", "chat_template", "generation")):
            shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture(scope="session")
def clauses() -> list[dict[str, Any]]:
    """The demo's labelled rows."""
    text = (ROOT / "unshot" / "demo" / "data.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory, clauses: list[dict[str, Any]]) -> Path:
    """Sixty short rows."""
    rows = sorted(clauses, key=lambda r: len(r["prompt"]))[:60]
    path = tmp_path_factory.mktemp("data") / "small.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": r["prompt"], "completion": r["completion"]}) + "\n" for r in rows),
        encoding="utf-8",
    )
    return path


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def unshot() -> Run:
    """Run the command line in a process of its own: `unshot("plan", "--rate", "1", cwd=...)`."""

    def run(*args: str | Path, cwd: Path = ROOT, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(args), cwd=cwd, text=True, capture_output=True, check=False, **kwargs)

    return run


def command(args: Sequence[str | Path]) -> list[str]:
    """The process's arguments for an unshot command line."""
    return [sys.executable, "-m", "unshot", *map(str, args)]
