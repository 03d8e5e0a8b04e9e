"""One of several gateway processes: `python -m deploy.serve.worker SOCKET INDEX`; its order comes on stdin."""

from __future__ import annotations

import sys

from deploy.serve.run import work
from deploy.serve.workers import Order
from unshot.console import Output
from unshot.errors import UnshotError


def main(descriptor: int, index: int) -> None:
    """Serve to the end."""
    out = Output()
    try:
        work(Order.from_json(sys.stdin.buffer.read()), descriptor, index, out)
    except UnshotError as error:
        out.warn(f"worker {index}: {error}")
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
