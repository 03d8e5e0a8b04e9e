"""`torchrun -m tune ...` and `accelerate launch -m tune ...`: `unshot tune` in several processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from unshot.__main__ import main

if __name__ == "__main__":
    if os.environ.get("RANK", "0") != "0":  # the first process alone prints the result
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)
    main(["tune", *sys.argv[1:]])
