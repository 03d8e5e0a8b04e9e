"""Long prompt against short on a 7B shape, by every engine that is installed, with what NVML and the report say."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.benchmarks.bench_gpu_shape import compare, make_model, parse, table_row, write_case
from unshot.catalog import gpu as catalog_gpu

SHAPE = "7b"


@pytest.fixture(scope="module")
def case() -> Iterator[Path]:
    """The model with random weights and the rows; removed at the end (14 GB)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", SHAPE)
        write_case(folder, 2000)
        yield folder


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", ["torch", "onnx", "vllm"])
def test_the_ratio_on_a_gpu_and_what_it_ran_on(engine: str, case: Path, tables: Path, gpu: str) -> None:
    if engine == "vllm" and not shutil.which("vllm"):
        pytest.skip("vllm is not on the PATH")
    if engine == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("this ONNX Runtime has no CUDA provider")
    report = compare(engine, case, parse(["--shape", SHAPE, "--requests", "20", "--cold-requests", "6"]))
    with (tables / f"bench-{SHAPE}.md").open("a") as handle:
        handle.write(table_row(report))
    assert report.modes["cache off"].claim.speed.value > 1.5
    found = report.resources.gpus
    assert found and found[0].name and found[0].memory_bytes > 1 << 30, report.resources.not_readable
    assert (found[0].power_mean_w or 0) > 0 and (found[0].clock_mhz or 0) > 0
    if found[0].catalog is not None and engine != "vllm":
        assert report.gpu == found[0].catalog and catalog_gpu(report.gpu).name
    assert json.loads((case / f"report-{engine}" / "report.json").read_text())["gpu"] == report.gpu
