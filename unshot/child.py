"""Our own modules first, in this process and in the processes that it starts.

The rooms are top-level packages (`planner`, `tune`, `export`, `bench`, `deploy`), and any folder in which people work
may hold a `planner.py` or a `tune/` of its own. So `unshot` imports nothing from the current directory and takes its
rooms from beside itself, whatever stands on the path before them. `python -P -m unshot.child MODULE ARGUMENTS` runs a
module in that way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

ROOMS = frozenset({"unshot", "planner", "tune", "export", "bench", "deploy"})
ROOT = str(Path(__file__).resolve().parent.parent)


class Rooms:
    """Finds the rooms beside this package, before anything on the path is asked."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [ROOT], target) if path is None and name in ROOMS else None


def protect() -> None:
    """Take the rooms from beside `unshot`. For processes that are ours: a program that imports `unshot` is not."""
    if Rooms not in sys.meta_path:
        sys.meta_path.insert(0, Rooms)


def command(module: str, *arguments: str) -> list[str]:
    """The command line of a child process that runs a module of ours, or of a library, by its name."""
    return [sys.executable, "-P", "-m", "unshot.child", module, *arguments]


def environment(**more: str) -> dict[str, str]:
    """The environment of such a child: it finds this package, and its own children skip the current directory too."""
    import site
    import sysconfig

    given = os.environ.get("PYTHONPATH")
    # A directory of packages must not come before the standard library, as PYTHONPATH does; it is found anyway.
    installed = {sysconfig.get_path("purelib"), site.getusersitepackages(), *site.getsitepackages()}
    path = [*([] if ROOT in installed else [ROOT]), *filter(None, [given])]
    return {
        **os.environ,
        **({"PYTHONPATH": os.pathsep.join(path)} if path else {}),
        "PYTHONSAFEPATH": "1",
        **more,
    }


if __name__ == "__main__":
    import runpy

    protect()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
