"""JSON Schemas of the files that cross rooms: `python -m unshot.contracts.schemas docs/schemas`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from unshot.contracts.document import DOCUMENTS, Document


def document(name: str) -> type[Document]:
    """The class that `module:class` names."""
    module, _, attribute = name.partition(":")
    found: type[Document] = getattr(importlib.import_module(module), attribute)
    return found


def schemas() -> dict[str, dict[str, Any]]:
    """File name of each schema, `plan.schema.json` for `plan.json`, and its content."""
    return {
        f"{kind.FILE.partition('.')[0]}.schema.json": msgspec.json.schema(kind, schema_hook=_path)
        for kind in map(document, DOCUMENTS)
    }


def write(folder: Path) -> None:
    """Write every schema into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, schema in schemas().items():
        text = json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def _path(kind: type) -> dict[str, Any]:
    if kind is Path:
        return {"type": "string"}
    raise NotImplementedError


if __name__ == "__main__":
    write(Path(sys.argv[1]))
