"""How much of the machine's memory can be had."""

from __future__ import annotations

from pathlib import Path


def free_memory() -> int:
    """Bytes of memory that can be had without swapping; a large number where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 1 << 62
