"""Our prefill and decode times against llama.cpp's own timers, in the same process on the same file.

Run: python -m tests.benchmarks.bench_llama_timings [FILE.gguf] [THREADS]
llama.cpp's `llama_perf_context` (what llama-bench and llama-cli print) sums its own time over prompt and decode
steps; ours are the TTFT and the sum of the gaps that `unshot bench` reports.
"""

from __future__ import annotations

import sys

import llama_cpp as lib
import numpy as np

from unshot import embedded
from unshot.engines.llama_cpp import GgufEngine


def main() -> None:
    """Print tokens a second of both for a 512-token prompt and 64 answers, the median of five runs."""
    path = sys.argv[1] if len(sys.argv) > 1 else str(embedded.gguf_path())
    engine = GgufEngine(path, threads=int(sys.argv[2]) if len(sys.argv) > 2 else None)
    generator = np.random.default_rng(0)
    ids = generator.integers(100, engine.vocabulary - 100, size=512).tolist()
    engine.generate(ids, max_tokens=64, stop_ids=(), prefix_cache=False)
    rows = []
    for _ in range(5):
        lib.llama_perf_context_reset(engine._context)
        answer = engine.generate(ids, max_tokens=64, stop_ids=(), prefix_cache=False)
        perf = lib.llama_perf_context(engine._context)
        rows.append(
            (
                len(ids) / answer.ttft,
                perf.n_p_eval / perf.t_p_eval_ms * 1000,
                (len(answer.ids) - 1) / (answer.token_times[-1] - answer.token_times[0]),
                perf.n_eval / perf.t_eval_ms * 1000,
            )
        )
    ours_p, theirs_p, ours_d, theirs_d = np.median(np.array(rows), axis=0)
    print(f"prefill: ours {ours_p:.1f} tok/s, llama.cpp {theirs_p:.1f} ({ours_p / theirs_p - 1:+.2%})")
    print(f"decode:  ours {ours_d:.1f} tok/s, llama.cpp {theirs_d:.1f} ({ours_d / theirs_d - 1:+.2%})")
    engine.close()


if __name__ == "__main__":
    main()
