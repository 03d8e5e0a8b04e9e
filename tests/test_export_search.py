"""`unshot export search`, the importance matrix, the device profile and fully tuned runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from export.device import GIB, check_fits, parse_device
from export.loss import paired_loss
from export.race import race, rounds
from unshot.catalog.formats import parse_targets
from unshot.errors import InputError
from unshot.metrics.answers import Answers
from unshot.metrics.intervals import rows_needed
from unshot.report.scatter import Dot, scatter

pytestmark = pytest.mark.slow


def answers(truth: list[str], given: list[str]) -> Answers:
    return Answers(truth, list(given), sorted({*truth, *given}))


def test_equal_answers_on_few_rows_prove_little_and_on_many_enough() -> None:
    few = answers(["a", "b"] * 10, ["a", "b"] * 10)
    found = paired_loss("accuracy", few, few)
    assert found.loss == 0 and found.high > 0.1 and found.rows == 20
    enough = rows_needed(0.02)
    many = answers(["a", "b"] * enough, ["a", "b"] * enough)
    assert paired_loss("accuracy", many, many).high < 0.02


def test_the_interval_holds_the_true_loss() -> None:
    """Rows break with one in ten and mend with one in ten: a loss of 0.06 where 80% were right."""
    generator = np.random.default_rng(5)
    held = 0
    for _ in range(150):
        right = generator.random(120) < 0.8
        breaks, mends = generator.random(120) < 0.1, generator.random(120) < 0.1
        now = np.where(right, ~breaks, mends)
        truth = ["x", "z"] * 60
        say = lambda flags: [t if f else "y" for t, f in zip(truth, flags, strict=True)]  # noqa: B023, E731
        found = paired_loss("accuracy", answers(truth, say(right)), answers(truth, say(now)))
        held += found.low <= 0.8 * 0.1 - 0.2 * 0.1 <= found.high
    assert held / 150 > 0.9


def test_labels_of_a_scatter_do_not_cover_each_other() -> None:
    import re

    dots = [Dot(f"format{i}", 100 + 3 * i, 0.8 + 0.001 * i, 0.75, 0.85, front=i % 2 == 0) for i in range(8)]
    svg = scatter("t", dots, x_label="MB", y_label="score")
    places = re.findall(
        r'<text class="(?:value inside|marklabel)" x="([\d.-]+)" y="([\d.-]+)">(format\d)', svg
    )
    assert len(places) == 8
    boxes = [(float(x), float(y) - 9, float(x) + 6 * len(t), float(y)) for x, y, t in places]
    for n, a in enumerate(boxes):
        for b in boxes[n + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    from tests.export_cases import make_run
    from tests.tiny_models import make

    root = tmp_path_factory.mktemp("search")
    return make_run(make("llama", root / "base"), root / "run")


def unshot(capsys, *args: object) -> tuple[int, str, str]:
    from unshot.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(["export", *map(str, args)])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_search_measures_and_picks_the_smallest(tuned, tmp_path, capsys) -> None:
    pytest.importorskip("llama_cpp")
    out = tmp_path / "found"
    wanted = [x for t in ("gguf:f16", "gguf:q8_0", "gguf:q4_0") for x in ("--to", t)]
    code, text, err = unshot(
        capsys, "search", tuned, *wanted, "--out", out, "--rounds", "1", "--loss", "0.9", "--json", "-q"
    )
    assert code == 0, err
    result = json.loads(text)
    rows = {r["target"]: r for r in result["candidates"]}
    assert rows["gguf:f16"]["bytes"] > rows["gguf:q8_0"]["bytes"] > rows["gguf:q4_0"]["bytes"]
    good = [r for r in rows.values() if r["verdict"] == "holds"]
    assert result["picked"] == min(good, key=lambda r: r["bytes"])["target"] and result["proven"]
    assert all(r["prefill"] > 0 and r["decode"] > 0 and r["memory"] > 0 for r in rows.values())
    assert result["rows"] == 16  # test and validation
    page = (out / "report.html").read_text()
    assert "Size and score" in page and "http" not in page.replace("http-equiv", "")
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "report.html", "search.json"]


def test_search_says_when_rows_are_too_few(tuned, tmp_path, capsys) -> None:
    pytest.importorskip("llama_cpp")
    code, _, err = unshot(
        capsys, "search", tuned, "--to", "gguf:f32", "--out", tmp_path / "x", "--rounds", "1", "-q"
    )
    assert code == 0 and "16 rows cannot prove" in err and str(rows_needed(0.02)) in err
    assert json.loads((tmp_path / "x" / "search.json").read_text())["proven"] is False


def test_imatrix_is_the_mean_square_of_each_matrix_input(tuned, tmp_path, capsys) -> None:
    pytest.importorskip("llama_cpp")
    import gguf
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from export import imatrix
    from export.source import open_source
    from unshot.console import Output

    out = tmp_path / "art"
    arguments = [tuned, "--to", "gguf:q4_0", "--out", out, "--allow-drift", "--json", "-q"]
    code, _, err = unshot(capsys, *arguments, "--imatrix")
    assert code == 0, err
    found = imatrix.read_imatrix(out / imatrix.FILE)
    assert {"blk.0.attn_q.weight", "blk.1.ffn_down.weight", "output.weight"} <= set(found)
    assert gguf.GGUFReader(out / imatrix.FILE).fields["general.type"].contents() == "imatrix"
    # By another way: the hidden state before the head, one row at a time, from transformers itself.
    model = open_source(str(tuned), None, Output(verbosity=-1))
    net = AutoModelForCausalLM.from_pretrained(str(model.base.path), dtype=torch.float32)
    net = PeftModel.from_pretrained(net, str(tuned / "adapter"))
    total, tokens = torch.zeros(64, dtype=torch.float64), 0
    for ids in imatrix.training_ids(model):
        with torch.inference_mode():
            states = net(torch.tensor([ids]), output_hidden_states=True).hidden_states
        total += states[-1][0].double().square().sum(0)
        tokens += len(ids)
    np.testing.assert_allclose(found["output.weight"], (total / tokens).numpy(), rtol=1e-4)
    # The quantiser used it: other bytes, and on the rows it was made for less drift in what it weighs.
    plain = tmp_path / "plain"
    assert unshot(capsys, *arguments[:3], "--out", plain, "--allow-drift", "-q")[0] == 0
    assert (plain / "model-q4_0.gguf").read_bytes() != (out / "model-q4_0.gguf").read_bytes()
    assert weighted_error(tuned, out, found) < weighted_error(tuned, plain, found)


def weighted_error(tuned: Path, folder: Path, importance: dict[str, np.ndarray]) -> float:
    """Squared error of the quantised matrices against the merged ones, columns weighed by their importance."""
    import gguf

    from export.source import open_source
    from unshot.console import Output

    merged = open_source(str(tuned), None, Output(verbosity=-1)).merged()
    tensors = {t.name: t for t in gguf.GGUFReader(folder / "model-q4_0.gguf").tensors}
    total = 0.0
    for name, source in (
        ("ffn_down", "mlp.down_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("attn_v", "self_attn.v_proj"),
    ):
        tensor = tensors[f"blk.0.{name}.weight"]
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        wrong = merged.rows(f"model.layers.0.{source}.weight").numpy() - found
        total += float((wrong**2 * importance[f"blk.0.{name}.weight"]).sum())
    return total


def test_imatrix_is_refused_where_it_makes_no_sense(tuned, tmp_path, capsys) -> None:
    for arguments, words in (
        ([tuned.parent / "base", "--to", "gguf:q4_0", "--imatrix"], "bare base"),
        ([tuned, "--to", "gguf:q8_0", "--imatrix"], "quantiser"),
        ([tuned, "--to", "gguf:iq2_xs"], "--imatrix"),
    ):
        code, _, err = unshot(capsys, *arguments, "--out", tmp_path / "x")
        assert code == 2 and words in err and not (tmp_path / "x").exists()


def test_device_profile_shows_its_arithmetic(tuned, tmp_path, capsys) -> None:
    from export.source import open_source
    from unshot.console import Output

    merged = open_source(str(tuned), None, Output(verbosity=-1)).merged()
    device = parse_device("ram=8GiB")
    (one,) = check_fits(device, parse_targets(["gguf:f16"]), merged, 256)
    # 2 layers x 2 x 2 KV heads x 16 wide, two bytes each, 256 tokens.
    assert one.cache == 2 * 2 * 2 * 16 * 2 * 256
    assert one.total == one.weights + one.cache + one.workspace < device.usable
    assert device.usable == 6 * GIB and parse_device("raspberry-pi-5") == device
    assert parse_device("gpu=rtx-4090").usable == pytest.approx(0.9 * 24 * GIB)
    code, _, err = unshot(
        capsys, tuned, "--to", "gguf:f32", "--device-profile", "ram=2MB", "--out", tmp_path / "x"
    )
    assert code == 2 and "weights" in err and "KV cache" in err and not (tmp_path / "x").exists()
    for bad in ("ram=lots", "gpu=rtx-40", "disk=1GB", "laptop"):
        with pytest.raises(InputError):
            parse_device(bad)


def test_estimated_sizes_are_close_to_the_files(tmp_path) -> None:
    """Shapes of a 7B Llama without its weights; Llama 2 7B in q4_k_m is a file of 4.08 GB."""
    from export.device import need

    class Shapes:
        def __init__(self) -> None:
            self.config = {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "vocab_size": 32000,
                "max_position_embeddings": 4096,
            }

        def names(self):
            for layer in range(32):
                for part in "qkvo":
                    yield f"model.layers.{layer}.self_attn.{part}_proj.weight"
                for part in ("gate", "up", "down"):
                    yield f"model.layers.{layer}.mlp.{part}_proj.weight"
            yield from ("model.embed_tokens.weight", "lm_head.weight")

        def shape(self, name):
            if "embed" in name or "head" in name:
                return (32000, 4096)
            return (4096, 4096) if "attn" in name else (11008, 4096)

    (target,) = parse_targets(["gguf:q4_k_m"])
    one = need(target, Shapes(), 4096)  # type: ignore[arg-type]
    assert one.weights == pytest.approx(4.08e9, rel=0.05)
    assert one.cache == 2 * GIB  # 4,096 tokens x 32 layers x 2 x 4,096 x 2 bytes


def test_a_fully_tuned_run_exports_its_model_directory(tuned, tmp_path, capsys) -> None:
    pytest.importorskip("llama_cpp")
    from tests.tiny_models import make
    from unshot.case import TuneSettings
    from unshot.contracts.manifest import Manifest, read_manifest

    run = tmp_path / "full"
    run.mkdir()
    for name in ("splits", "task.json", "metrics.json"):
        copy = shutil.copytree if (tuned / name).is_dir() else shutil.copyfile
        copy(tuned / name, run / name)
    make("llama", run / "model", seed=3)
    old = read_manifest(tuned)
    Manifest("tune", base=old.base, task=old.task, tune=TuneSettings(method="full")).finish(run)
    out = tmp_path / "art"
    code, text, err = unshot(capsys, run, "--to", "gguf:f32", "--out", out, "--json", "-q")
    assert code == 0, err
    assert json.loads(text)["parity"][0]["figures"]["logits"]["kl"] < 1e-5
    assert read_manifest(out).run == str(run)
    code, _, err = unshot(capsys, run, "--base", tuned.parent / "base", "--out", tmp_path / "x")
    assert code == 2 and "leave --base out" in err
    code, _, err = unshot(capsys, run, "--to", "lora", "--out", tmp_path / "x")
    assert code == 2 and not (tmp_path / "x").exists()


def everything(losses: np.ndarray, limit: float) -> int | None:
    """The smallest format whose loss on all rows is within the limit; formats by size, `(formats, rows)`."""
    good = [n for n, row in enumerate(losses) if row.mean() <= limit]
    return min(good, default=None)


def raced(losses: np.ndarray, limit: float) -> tuple[int | None, int]:
    """What the race picks, and how many rows were answered for it."""
    asked: list[tuple[int, int]] = []

    def measure(one: int, rows: int) -> float:
        asked.append((one, rows))
        return float(losses[one, :rows].mean())

    whole = losses.shape[1]
    race(range(len(losses)), whole, limit, measure, lambda one: losses[one].mean() <= limit)
    good = [one for one, rows in asked if rows == whole and losses[one].mean() <= limit]
    return min(good, default=None), sum(rows for _, rows in asked)


def test_what_was_passed_over_comes_back_where_smaller_ones_lose() -> None:
    losses = np.zeros((8, 96))
    losses[:7, 40:] = 0.2  # all but the largest lose late
    assert raced(losses, 0.02)[0] == 7 == everything(losses, 0.02)
    losses[7] = 1.0
    assert raced(losses, 0.02)[0] is None
    assert rounds(16) == [16] and rounds(96) == [6, 24, 96]
    assert raced(np.zeros((3, 16)), 0.02) == (0, 48)  # few rows: all are asked all
