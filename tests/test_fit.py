"""The fit of what an engine adds, on rows that the model itself made."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from planner.latency.fit import Fit, _fit_engine
from planner.latency.measured import predict, read_measured
from planner.latency.step import Overhead, family_efficiency

TABLE = """model,gpu,precision,engine,prompts,concurrency,input_tokens,output_tokens,output_tokens_per_s,ttft_ms
llama-3.1-8b,h100-sxm,fp16,vllm,200,,128,4,1,
llama-3.1-8b,h100-sxm,fp16,vllm,60,,2000,100,1,
llama-3.1-8b,a100-sxm-80,fp16,vllm,60,,500,200,1,
"""


def test_a_host_time_that_bounds_one_row_is_found(tmp_path: Path) -> None:
    """20 ms per request: below the GPU's own time but for the first row, no slope leads there from 4 ms."""
    path = tmp_path / "rows.csv"
    path.write_text(TABLE)
    true = Overhead(compute=0.8, bandwidth=1.0, step=1.0, sequence=2e-5, request=0.02, accept=0.01)
    rows = []
    for row in read_measured(path):
        eff = family_efficiency(row.gpu, "batched")
        rows.append(replace(row, measured=predict(row, replace(eff, compute=eff.compute * 0.8), true)))
    # 200 requests of 4 tokens, one after the other at 20 ms: at most 200 tokens/s.
    assert rows[0].measured == pytest.approx(200.0, rel=0.02)
    found = _fit_engine(rows, Fit({}, {}, {}, Overhead()), "")
    assert found.request == pytest.approx(0.02, rel=0.1)


def test_clients_with_shared_conversations_do_not_fall_into_step(tmp_path: Path) -> None:
    """ShareGPT's lengths differ, at a concurrency too: one of four clients waits for less than four prompts."""
    path = tmp_path / "rows.csv"
    path.write_text(
        "model,gpu,precision,engine,concurrency,input_tokens,output_tokens,ttft_ms\n"
        "qwen3-8b,h100-sxm,fp16,sglang,4,233,221,30\nqwen3-8b,h100-sxm,fp16,sglang,4,256,256,30\n"
    )
    shared, random = read_measured(path)
    assert (shared.length_cv, random.length_cv) == (1.0, 0.0)
    host = Overhead(request=0.008)
    assert predict(shared, None, host) < 0.8 * predict(replace(shared, length_cv=0.0), None, host)
