"""K-quants and other llama.cpp types: its own quantiser, in a process of its own.

The input is a GGUF file that was streamed here; a C++ exception in the quantiser ends only the child.
Run as `python -m export.kquants SOURCE TARGET TYPE THREADS [IMATRIX]` by `quantise`.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

from export.engines import cores
from unshot import child
from unshot.errors import GateError, OutsideError

# `--to gguf:NAME` -> name of llama_cpp's constant
TYPES = {
    "f16": "LLAMA_FTYPE_MOSTLY_F16",
    "bf16": "LLAMA_FTYPE_MOSTLY_BF16",
    "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
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
    "iq3_xxs": "LLAMA_FTYPE_MOSTLY_IQ3_XXS",
    "iq2_xs": "LLAMA_FTYPE_MOSTLY_IQ2_XS",
}


def quantise(source: Path, target: Path, kind: str, imatrix: Path | None = None) -> None:
    """Quantise a GGUF file; `GateError` with the quantiser's last words where it fails."""
    command = child.command(
        "export.kquants",
        str(source),
        str(target),
        TYPES[kind],
        str(cores()),
        *([str(imatrix)] if imatrix else []),
    )
    done = subprocess.run(command, env=child.environment(), capture_output=True)
    if done.returncode or not target.is_file():
        words = done.stderr.decode(errors="replace").strip().splitlines()[-3:]
        target.unlink(missing_ok=True)
        raise GateError(
            f"llama.cpp could not quantise to {kind} (exit {done.returncode}): {' | '.join(words) or 'it said nothing'}"
        )


def takes_imatrix() -> None:
    """`OutsideError` where the installed llama.cpp takes the matrix only as a C++ map."""
    import llama_cpp

    if not hasattr(llama_cpp, "llama_model_imatrix_data"):
        raise OutsideError(
            f"--imatrix needs a newer llama-cpp-python than {llama_cpp.__version__}; pip install -U llama-cpp-python"
        )


def importance(path: Path) -> Any:
    """The matrix as the array `llama_model_quantize` reads: one entry a tensor, ended by one without a name."""
    import llama_cpp
    import numpy as np

    from export.imatrix import read_imatrix

    values = {k: np.ascontiguousarray(v) for k, v in read_imatrix(path).items()}
    array = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()
    for entry, (name, data) in zip(array, values.items(), strict=False):
        entry.name, entry.size = name.encode(), data.size
        entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    array.values = values  # the array points into them
    return array


def main() -> None:
    """The child: one call of llama.cpp's quantiser."""
    import llama_cpp

    source, target, kind, threads, *imatrix = sys.argv[1:]
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, kind)
    settings.nthread = int(threads)
    keep = importance(Path(imatrix[0])) if imatrix else None
    if keep is not None:
        settings.imatrix = keep
    sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings))


if __name__ == "__main__":
    main()
