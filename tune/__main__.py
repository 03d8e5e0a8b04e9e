"""`torchrun -m tune ...`: as `torchrun -m unshot tune ...`, which also works beside a `tune.py` of the user's."""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "tune")
    runpy.run_module("unshot", run_name="__main__", alter_sys=True)
