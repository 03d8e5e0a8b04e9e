"""Tuning on a tiny random model: packing, masking, splits, resume, the run directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, Run, command, wait_for
from tune.batches import fill, pack
from tune.loss import pack_loss
from tune.split import normalised, split
from unshot.contracts.manifest import read_manifest
from unshot.data.rows import Example, read_examples
from unshot.text.chat import Chat, Encoded, load_tokenizer

pytestmark = pytest.mark.slow

QUICK = ("--epochs", "2", "--instruction", "Classify the clause.", "--rank", "4", "--no-gates")


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> Chat:
    return Chat(load_tokenizer(tiny_model))


@pytest.fixture(scope="module")
def rows(chat: Chat, small_data: Path) -> list[Encoded]:
    return [chat.encode(e.messages, e.answer or "") for e in read_examples(small_data)[:12]]


@pytest.fixture(scope="module")
def net(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(tiny_model), dtype=torch.float32)


def test_the_loss_covers_the_answer_and_nothing_else(
    chat: Chat, rows: list[Encoded], small_data: Path
) -> None:
    for example, row in zip(read_examples(small_data)[:12], rows, strict=True):
        packed = pack([row])
        assert chat.tokenizer.decode(packed.targets.tolist(), special=True) == f"{example.answer}<|im_end|>"
        assert np.array_equal(packed.ids[packed.predict + 1], packed.targets)
        assert chat.decode(row.ids[: row.prompt_length]).rstrip().endswith("assistant")


def test_packed_loss_and_gradients_equal_unpacked(net: Any, rows: list[Encoded]) -> None:
    def gradients(groups: list[list[Encoded]]) -> tuple[float, torch.Tensor]:
        net.zero_grad()
        total = 0.0
        for group in groups:
            loss = pack_loss(net, pack(group), "cpu")
            loss.backward()
            total += float(loss.detach())
        return total, torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    alone, alone_gradient = gradients([[row] for row in rows])
    groups = fill(rows, 300)
    assert len(groups) < len(rows) / 2
    packed, packed_gradient = gradients(groups)
    assert packed == pytest.approx(alone, rel=1e-4)
    assert float((packed_gradient - alone_gradient).norm() / alone_gradient.norm()) < 1e-4


def test_a_row_is_blind_to_its_neighbours_in_the_pack(net: Any, rows: list[Encoded]) -> None:
    """Changing the first row must not move the second row's logits."""

    def second(first: Encoded) -> torch.Tensor:
        packed = pack([first, rows[1]])
        with torch.inference_mode():
            out = net(
                input_ids=torch.from_numpy(packed.ids)[None],
                position_ids=torch.from_numpy(packed.positions)[None],
                use_cache=False,
            )
        return out.logits[0, -len(rows[1].ids) :]

    changed = Encoded([*rows[0].ids[:-2], 5, 6], rows[0].prompt_length)
    assert torch.allclose(second(rows[0]), second(changed), atol=1e-5)


def test_splits_are_disjoint_stratified_and_independent_of_file_order() -> None:
    examples = [
        Example(({"role": "user", "content": f"text {i}"},), "ab"[i % 5 == 0], i + 1) for i in range(200)
    ]
    examples += [Example(({"role": "user", "content": "TEXT  7"},), "a", 201)]
    parts = split(examples, stratum=lambda e: e.answer)
    sets = [{normalised(e) for e in part} for part in (parts.train, parts.validation, parts.test)]
    assert [len(s) for s in sets] == [160, 20, 20]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    assert sum(e.answer == "b" for e in parts.test) == 4
    again = split(examples[::-1], stratum=lambda e: e.answer)
    assert {normalised(e) for e in again.test} == sets[2]


def test_a_run_directory_holds_what_the_next_stages_need(
    unshot: Run, tiny_model: Path, small_data: Path, tmp_path: Path
) -> None:
    done = unshot("tune", small_data, "--base", tiny_model, "--out", tmp_path / "run", *QUICK, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["test"]["rows"] == 6
    manifest = read_manifest(tmp_path / "run", stage="tune")
    assert manifest.base.sha256.keys() >= {"model.safetensors", "tokenizer.json"}
    names = {
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "task.json", "metrics.json",
        "splits/train.jsonl", "splits/validation.jsonl", "splits/test.jsonl", "README.md",
    }  # fmt: skip
    assert set(manifest.outputs) == names
    assert str(tmp_path) not in (tmp_path / "run" / "adapter" / "adapter_config.json").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_training_lowers_the_loss(unshot: Run, tiny_model: Path, small_data: Path, tmp_path: Path) -> None:
    done = unshot(
        "tune",
        small_data,
        "--base",
        tiny_model,
        "--out",
        tmp_path / "run",
        "--epochs",
        "8",
        "--patience",
        "8",
        "--learning-rate",
        "0.02",
        "--no-gates",
        "--json",
        "-q",
    )
    assert done.returncode == 0, done.stderr
    history = json.loads(done.stdout)["history"]
    assert history[-1]["train_loss"] < 0.98 * history[0]["train_loss"]


def test_layers_keeps_the_adapter_to_the_top(
    unshot: Run, tiny_model: Path, small_data: Path, tmp_path: Path
) -> None:
    from safetensors import safe_open

    arguments = ("tune", small_data, "--base", tiny_model, "--rank", "4", "--epochs", "1", "--no-gates", "-q")
    done = unshot(*arguments, "--layers", "1", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    with safe_open(tmp_path / "run" / "adapter" / "adapter_model.safetensors", "np") as tensors:
        names = list(tensors.keys())
    assert len(names) == 2 * 7 and all(".layers.1." in name for name in names)
    refused = unshot(*arguments, "--layers", "3", "--out", tmp_path / "other")
    assert refused.returncode == 2 and "the model has 2 layers" in refused.stderr


def test_killed_in_mid_epoch_the_same_command_ends_with_the_same_adapter(
    unshot: Run, tiny_model: Path, small_data: Path, tmp_path: Path
) -> None:
    arguments = ("tune", small_data, "--base", tiny_model, *QUICK, "-q")
    undisturbed = unshot(*arguments, "--out", tmp_path / "whole")
    assert undisturbed.returncode == 0, undisturbed.stderr
    killed = [*arguments, "--out", tmp_path / "killed"]
    kill_in_mid_epoch(killed, tmp_path)
    again = unshot(*killed[:-1], tmp_path / "killed")
    assert again.returncode == 0, again.stderr
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    losses = [
        json.loads((tmp_path / run / "metrics.json").read_text())["losses"] for run in ("whole", "killed")
    ]
    assert losses[0] == losses[1]


def kill_in_mid_epoch(arguments: Sequence[str | Path], folder: Path) -> None:
    """Start the run `folder/killed` and kill it after its second step; nothing must be under the final name."""
    process = subprocess.Popen(
        command(arguments),
        cwd=ROOT,
        env={**os.environ, "UNSHOT_SAVE_SECONDS": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    state = folder / ".killed.partial" / "checkpoint" / "state.json"
    wait_for(lambda: state.exists() and json.loads(state.read_text())["state"]["step"] >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "killed").exists()
