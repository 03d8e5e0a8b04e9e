"""K-quants and other llama.cpp types: its own quantiser, in a process of its own.

The input is a GGUF file that was streamed here; a C++ exception in the quantiser ends only the child.
Run as `python -m export.kquants SOURCE TARGET TYPE THREADS` by `quantise`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from export.engines import child_environment, cores
from unshot.errors import GateError

# `--to gguf:NAME` -> name of llama_cpp's constant
TYPES = {
    "q2_k": "LLAMA_FTYPE_MOSTLY_Q2_K",
    "q3_k_m": "LLAMA_FTYPE_MOSTLY_Q3_K_M",
    "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0",
    "q4_k_s": "LLAMA_FTYPE_MOSTLY_Q4_K_S",
    "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M",
    "q5_0": "LLAMA_FTYPE_MOSTLY_Q5_0",
    "q5_k_m": "LLAMA_FTYPE_MOSTLY_Q5_K_M",
    "q6_k": "LLAMA_FTYPE_MOSTLY_Q6_K",
    "iq4_nl": "LLAMA_FTYPE_MOSTLY_IQ4_NL",
    "iq4_xs": "LLAMA_FTYPE_MOSTLY_IQ4_XS",
}


def quantise(source: Path, target: Path, kind: str) -> None:
    """Quantise a GGUF file; `GateError` with the quantiser's last words where it fails."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "export.kquants",
        str(source),
        str(target),
        TYPES[kind],
        str(cores()),
    ]
    done = subprocess.run(command, env=child_environment(), capture_output=True)
    if done.returncode or not target.is_file():
        words = done.stderr.decode(errors="replace").strip().splitlines()[-3:]
        target.unlink(missing_ok=True)
        raise GateError(
            f"llama.cpp could not quantise to {kind} (exit {done.returncode}): {' | '.join(words) or 'it said nothing'}"
        )


def main() -> None:
    """The child: one call of llama.cpp's quantiser."""
    import llama_cpp

    source, target, kind, threads = sys.argv[1:5]
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, kind)
    settings.nthread = int(threads)
    sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings))


if __name__ == "__main__":
    main()
