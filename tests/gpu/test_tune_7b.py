"""What only a GPU shows, on a 7B shape: `make gpu` there; elsewhere every test is skipped with its reason.

Peak memory against `--dry-run`'s estimate and MFU for LoRA and QLoRA, loss against peft and TRL, and the faster
kernels' logits against torch's. The figures are printed (`-s` is in the make target).
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.model_families import model_of

torch = pytest.importorskip("torch", reason="torch is not installed")

from tune.kernels import ATTENTIONS, LIGER, adopt, installed  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
# bf16 weights of 7B, activations and the allocator's slack.
NEEDED = 40e9


def benchmark(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "benchmarks" / name), *arguments],
        cwd=ROOT, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return done.stdout


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_peak_memory_is_what_the_dry_run_says_and_the_gpu_is_used(method: str) -> None:
    if method == "qlora" and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed; pip install 'unshot[qlora]'")
    if torch.cuda.get_device_properties(0).total_memory < NEEDED:
        pytest.skip("the 7B shape needs 40 GB of GPU memory")
    out = benchmark(
        "bench_tune_memory.py", "--shape", "7b", "--method", method, "--batch", "32", "--steps", "12"
    )
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert 0.9 <= found["estimated / measured"] <= 1.25, found
    assert found["mfu"] > (0.3 if method == "lora" else 0.15), found


def test_loss_and_speed_against_peft_and_trl() -> None:
    if find_spec("trl") is None:
        pytest.skip("trl is not installed; pip install 'unshot[prefer]'")
    out = benchmark("bench_trl.py", "--trl-python", sys.executable, "--rounds", "2")
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    mean = {
        name: sum(f["tokens_per_second"] for f in lines if f["system"] == name)
        for name in ("ours", "trl-unpadded")
    }
    losses = [f["held_out_loss"] for f in lines if f["system"] in ("ours", "trl-unpadded")]
    assert max(losses) - min(losses) < 0.02, losses
    assert mean["ours"] >= mean["trl-unpadded"], mean


def test_the_faster_kernels_say_what_torch_says(tmp_path: Path) -> None:
    names = installed("cuda")
    if not names:
        packages = ", ".join([*(package for _, package, _ in ATTENTIONS), LIGER])
        pytest.skip(f"none of {packages} is installed")
    net = model_of("llama").to("cuda", torch.bfloat16)
    taken, wrong = adopt(net, names, "cuda", bf16=True)
    print("kernels taken:", taken)
    assert wrong is None and taken
