"""The methods beside LoRA, memory before a run, the learning curve, reporting; on the tiny random model."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, Run
from tune.base import Shape, inspect_base
from tune.batches import pack
from tune.curve import Point, fit, learning_curve, rows_for, sentence
from tune.defaults import choose_defaults, learning_rate
from tune.loss import pack_loss, soft_prompt, with_virtual
from tune.memory import Load, estimate
from tune.model import load_base, load_tuned, prepare_model, uses_bf16
from tune.train import Trainer
from unshot.case import TuneSettings
from unshot.contracts.manifest import read_manifest
from unshot.contracts.task import Task
from unshot.data.rows import read_examples
from unshot.engines.server import free_port
from unshot.models import resolve
from unshot.text.chat import Chat, Encoded, load_tokenizer

pytestmark = pytest.mark.slow

QUICK = (
    *("--epochs", "2", "--instruction", "Classify the clause.", "--rank", "4"),
    *("--no-gates", "-q", "--json"),
    *("--dtype", "fp32"),  # what one machine's bf16 rounds is no reason to differ
)


@pytest.fixture(scope="module")
def runs(unshot: Run, tiny_model: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`runs(name, *flags)`: a finished run and its result, made once for each name."""
    folder = tmp_path_factory.mktemp("runs")
    made: dict[str, dict[str, Any]] = {}

    def run(name: str, *flags: str) -> tuple[Path, dict[str, Any]]:
        if name not in made:
            done = unshot("tune", small_data, "--base", tiny_model, "--out", folder / name, *QUICK, *flags)
            assert done.returncode == 0, done.stderr
            made[name] = json.loads(done.stdout)
        return folder / name, made[name]

    return run


@pytest.fixture(scope="module")
def rows(tiny_model: Path, small_data: Path) -> list[Encoded]:
    chat = Chat(load_tokenizer(tiny_model))
    return [chat.encode(e.messages, e.answer or "") for e in read_examples(small_data)[:6]]


@pytest.mark.parametrize(
    ("method", "kept"), [("full", "model/model.safetensors"), ("prompt", "adapter/adapter_model.safetensors")]
)
def test_a_run_of_another_method_is_loaded_and_scored_by_eval(
    runs: Any, unshot: Run, method: str, kept: str
) -> None:
    folder, result = runs(method, "--method", method)
    assert (folder / kept).is_file()
    done = unshot("eval", folder, "--json")
    assert done.returncode == 0, done.stderr
    assert "answers on cpu in fp32" in done.stderr
    assert json.loads(done.stdout)["accuracy"]["value"] == pytest.approx(result["test"]["accuracy"])
    assert result["history"][-1]["train_loss"] < result["history"][0]["train_loss"]


def test_full_tuning_moves_every_weight_and_export_writes_what_was_scored(
    runs: Any, unshot: Run, tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    pytest.importorskip("llama_cpp")
    folder, _ = runs("full", "--method", "full")
    before, after = (
        load_file(tiny_model / "model.safetensors"),
        load_file(folder / "model" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype and not torch.equal(value, after[name]), name
    assert (folder / "model" / "config.json").read_bytes() == (tiny_model / "config.json").read_bytes()
    done = unshot("export", folder, "--to", "gguf:f32", "--out", tmp_path / "art", "--json", "-q")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parity"][0]["passed"]
    refused = unshot("export", folder, "--to", "lora:f16", "--out", tmp_path / "no")
    assert refused.returncode == 2 and "fully tuned model has none" in refused.stderr


def test_export_refuses_a_soft_prompt(runs: Any, unshot: Run, tmp_path: Path) -> None:
    folder, _ = runs("prompt", "--method", "prompt")
    done = unshot("export", folder, "--to", "gguf:q8_0", "--out", tmp_path / "art")
    assert done.returncode == 2 and "tuned by prompt tuning" in done.stderr
    assert not (tmp_path / "art").exists()


def test_packed_soft_prompts_give_the_loss_of_peft_itself(tiny_model: Path, rows: list[Encoded]) -> None:
    settings = TuneSettings(method="prompt", virtual_tokens=5)
    net = prepare_model(load_base(resolve(tiny_model), "cpu", bf16=False), settings)
    assert [n for n, p in net.named_parameters() if p.requires_grad] == [
        "prompt_encoder.default.embedding.weight"
    ]
    packed = float(pack_loss(net, pack(with_virtual(rows, 5)), "cpu").detach())
    alone = 0.0
    for row in rows:
        labels = torch.tensor([[-100] * row.prompt_length + row.ids[row.prompt_length :]])
        out = net(input_ids=torch.tensor([row.ids]), labels=labels)
        alone += float(out.loss.detach()) * row.answer_length
    assert packed == pytest.approx(alone, rel=1e-4)


def test_answers_after_a_soft_prompt_do_not_depend_on_the_batch(runs: Any, tiny_model: Path) -> None:
    from tune.generate import answers

    folder, _ = runs("prompt", "--method", "prompt")
    net = load_tuned(folder, resolve(tiny_model), "cpu", bf16=False)
    assert soft_prompt(net) is not None
    chat = Chat(load_tokenizer(tiny_model))
    prompts = [[{"role": "user", "content": "word " * n}] for n in (1, 9, 30)]
    together = answers(net, chat, prompts, max_tokens=8)
    assert together == [answers(net, chat, [p], max_tokens=8)[0] for p in prompts]


def based(folder: Path) -> tuple[Any, Shape]:
    """A base model's directory, with its shape."""
    source = resolve(folder)
    return source, inspect_base(source, "lora")


def test_gradient_checkpointing_changes_memory_and_nothing_else(runs: Any, tiny_model: Path) -> None:
    plain, checked = runs("lora"), runs("checked", "--gradient-checkpointing")
    assert plain[1]["losses"] == pytest.approx(checked[1]["losses"], rel=1e-6)
    load = Load(tokens=384, targets=40, packs=2, prompt=100, batch=6)
    usual, less = (
        estimate(*based(tiny_model), TuneSettings(rank=4, dtype="fp32"), load, "cpu", checkpointing=flag)
        for flag in (False, True)
    )
    assert less.activations < usual.activations
    assert (less.weights, less.adam) == (usual.weights, usual.adam)


def test_the_precision_is_said_and_recorded_and_changes_the_losses(
    unshot: Run, tiny_model: Path, small_data: Path, tmp_path: Path
) -> None:
    """A CPU with bf16 products takes them by itself; the same case trained in fp32 elsewhere, without a word."""
    losses = {}
    for dtype in ("bf16", "fp32"):
        final = tmp_path / dtype
        flags = ("--no-gates", "--epochs", "1", "--rank", "4", "--dtype", dtype, "--json")
        done = unshot("tune", small_data, "--base", tiny_model, "--out", final, *flags)
        assert done.returncode == 0, done.stderr
        assert f"on cpu in {dtype}" in done.stderr
        assert read_manifest(final).config["dtype"] == dtype
        losses[dtype] = json.loads(done.stdout)["losses"]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert not uses_bf16(TuneSettings(dtype="fp32"), "cuda") and uses_bf16(TuneSettings(), "cuda")


def test_the_estimate_counts_parameters_as_the_method_trains_them(tiny_model: Path) -> None:
    load = Load(tokens=64, targets=8, packs=1, prompt=64, batch=4)
    base = load_base(resolve(tiny_model), "cpu", bf16=False)
    count = sum(p.numel() for p in base.parameters())
    full = estimate(*based(tiny_model), TuneSettings(method="full"), load, "cpu", checkpointing=False)
    assert (full.weights, full.trained, full.gradients, full.adam) == (4 * count, 0, 4 * count, 8 * count)
    net = prepare_model(base, TuneSettings(rank=4, dtype="fp32"))
    moving = sum(p.numel() for p in net.parameters() if p.requires_grad)
    lora = estimate(*based(tiny_model), TuneSettings(rank=4, dtype="fp32"), load, "cpu", checkpointing=False)
    assert (lora.weights, lora.trained, lora.adam) == (4 * count, 4 * moving, 8 * moving)
    assert lora.activations > 0 and lora.answering > lora.weights


def test_a_dry_run_shows_reasons_and_memory_and_writes_nothing(
    unshot: Run, tiny_model: Path, small_data: Path, tmp_path: Path
) -> None:
    done = unshot(
        "tune", small_data.resolve(), "--base", tiny_model, "--dry-run", "--json", "-q", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["memory"]["peak"] > result["memory"]["weights"] > 0
    assert "Thinking Machines" in result["reasons"]["learning_rate"]
    assert list(tmp_path.iterdir()) == []


def test_defaults_follow_method_and_width() -> None:
    assert learning_rate("full", 2000)[0] == pytest.approx(5e-5)
    assert learning_rate("lora", 2000)[0] == pytest.approx(5e-4)
    assert learning_rate("lora", 4096)[0] < learning_rate("lora", 576)[0]
    # Tinker's recommendation for Qwen3-8B and Llama-3.1-8B, both 4,096 wide.
    assert learning_rate("lora", 4096, "qwen3")[0] == pytest.approx(4.7e-4)
    assert learning_rate("lora", 4096, "llama")[0] == pytest.approx(2.9e-4)
    rate, reason = learning_rate("lora", 4096, "gemma2")
    assert rate == pytest.approx(2.9e-4) and "fitted to Llama models; none is known for gemma2" in reason
    config = Shape("llama", 576, 30, 49152, 1536, 2048, 0)
    chosen = choose_defaults(TuneSettings(method="prompt"), config, 300)
    assert chosen.learning_rate == 3e-2 and "cannot be merged" in chosen.reasons["trained"]


def test_qlora_without_a_gpu_is_refused_before_any_work(unshot: Run, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = unshot("tune", tmp_path / "no-such-file.jsonl", "--out", tmp_path / "run", "--method", "qlora")
    assert done.returncode == 3 and "qlora needs an NVIDIA GPU" in done.stderr


@pytest.mark.parametrize("method", ["full", "prompt"])
def test_interrupted_and_run_again_the_other_methods_end_the_same_too(
    runs: Any, unshot: Run, tiny_model: Path, small_data: Path, tmp_path: Path, monkeypatch: Any, method: str
) -> None:
    """After the second checkpoint within an epoch; `tests/test_tune.py` kills a process there."""
    whole, result = runs(method, "--method", method)
    arguments = (
        "tune",
        small_data,
        "--base",
        tiny_model,
        *QUICK,
        "--method",
        method,
        "--out",
        tmp_path / "run",
    )
    saved, save = [], Trainer.save

    def interrupted(trainer: Trainer) -> None:
        save(trainer)
        saved.append(trainer.state.step)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tune.run.SAVE_SECONDS", 0.0)
        patch.setattr(Trainer, "save", interrupted)
        assert unshot(*arguments).returncode == 130
    assert saved == [1, 2] and not (tmp_path / "run").exists()
    again = unshot(*arguments)
    assert again.returncode == 0, again.stderr
    name = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()
    assert json.loads(again.stdout)["losses"] == result["losses"]


def test_two_processes_train_what_one_trains(
    runs: Any, tiny_model: Path, small_data: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    one, alone = runs("lora")
    for name, flags in (("ddp", []), ("fsdp", ["--fsdp"])):
        launch = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-port", str(free_port())),
        ]
        command = [
            *launch,
            "-m",
            "tune",
            small_data,
            "--base",
            tiny_model,
            "--out",
            tmp_path / name,
            *QUICK,
            *flags,
        ]
        done = subprocess.run(
            [str(c) for c in command],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads(done.stdout)  # one process alone talks
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert result["test"]["loss"] == pytest.approx(alone["test"]["loss"], rel=1e-4)
        mine, theirs = (
            load_file(p / "adapter" / "adapter_model.safetensors") for p in (one, tmp_path / name)
        )
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.allclose(value, theirs[key], atol=1e-4), key
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest["config"]["processes"] == {"count": 2, "fsdp": name == "fsdp"}


def test_the_learning_curve_finds_a_planted_power_law() -> None:
    rows = np.array([50.0, 100.0, 200.0, 400.0])
    a, b = fit(rows, 3.0 * rows**-0.5, 10**6)
    assert (a, b) == pytest.approx((3.0, 0.5), rel=1e-6)
    assert rows_for(3.0, 0.5, 0.1) == pytest.approx(900)
    assert rows_for(3.0, -0.1, 0.1) == float("inf") and rows_for(3.0, 0.5, -0.01) == float("inf")


def test_the_learning_curve_says_how_sure_it_is() -> None:
    task = Task(labels=["a", "b"], metric="accuracy")
    random = np.random.default_rng(0)
    truth = [str(x) for x in random.choice(["a", "b"], 400)]

    def guesses(error: float) -> list[str]:
        wrong = random.random(400) < error
        return [("b" if t == "a" else "a") if w else t for t, w in zip(truth, wrong, strict=True)]

    falling = learning_curve(task, truth, [Point(n, guesses(2 * n**-0.5)) for n in (50, 100, 200, 400)])
    # 0.1 at 400 rows; 0.09 needs (2 / 0.09)^2 = 494.
    assert falling["low"] <= 94 <= (falling["high"] or 10**9)
    assert "would likely cost" in sentence(falling, 2.0) and "$" in sentence(falling, 2.0)
    flat = learning_curve(task, truth, [Point(n, guesses(0.3)) for n in (50, 100, 200, 400)])
    assert flat["b_low"] < 0.1 and flat["high"] is None
    perfect = learning_curve(task, truth, [Point(n, truth) for n in (50, 100, 200, 400)])
    assert "within a point of perfect" in sentence(perfect)


def test_a_learning_curve_leaves_the_run_as_it_was_and_events_can_be_read(runs: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    plain, _ = runs("lora")
    folder, result = runs(
        "curve", "--learning-curve", "--report-to", "tensorboard", "--log-dir", str(tmp_path / "logs")
    )
    assert [p["rows"] for p in result["learning_curve"]["points"]] == [24, 48]
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (plain / name).read_bytes()
    scalars = read_events(tmp_path / "logs")
    losses = [v for _, v in sorted(scalars["train/loss"])]
    assert losses == pytest.approx(result["losses"], rel=1e-5)
    assert len(scalars["eval/loss"]) == len(result["history"])


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars of a TensorBoard event file: tag to `(step, value)`; records are length, CRC, bytes, CRC."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for path in folder.rglob("events.*"):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
            data = data[16 + length :]
    return found


def test_a_missing_reporting_library_or_a_wrong_name_is_one_line(unshot: Run, tmp_path: Path) -> None:
    from importlib.util import find_spec

    done = unshot("tune", "x.jsonl", "--out", tmp_path / "run", "--report-to", "tensorbored")
    assert done.returncode == 2 and "did you mean tensorboard" in done.stderr
    if find_spec("wandb") is None:
        done = unshot("tune", "x.jsonl", "--out", tmp_path / "run", "--report-to", "wandb")
        assert done.returncode == 3 and "pip install wandb" in done.stderr
