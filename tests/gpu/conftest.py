"""What needs a GPU: `make gpu`, or `python -m pytest tests/gpu`. Elsewhere every test here skips and says why."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def gpu() -> str:
    """The name of the first CUDA device. Of the session: it skips before a module's fixture makes a model."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device, or a PyTorch without CUDA; run `make gpu` on a machine with a GPU")
    return str(torch.cuda.get_device_name(0))


@pytest.fixture(scope="session")
def tables() -> Path:
    """Where tables are written: $OUT, else gpu-tables here."""
    folder = Path(os.environ.get("OUT") or "gpu-tables")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
