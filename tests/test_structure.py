"""The rule of the rooms: stages import `unshot` and never each other, nothing imports in circles, the face is light."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

ROOMS = ("planner", "tune", "export", "bench", "deploy")
FILES = sorted(path for room in (*ROOMS, "unshot") for path in (ROOT / room).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """Our modules that a file imports, also within functions; what only a type checker reads is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for part in node.body
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            known = name if name in MODULES else name.rpartition(".")[0]
            if known in MODULES:
                yield known


GRAPH = {name: set(imports(path)) - {name} for name, path in MODULES.items()}


def test_no_room_imports_another() -> None:
    crossing = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if other.split(".")[0] not in ("unshot", name.split(".")[0])
    ]
    assert crossing == []


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(part) > 1:
                found.append(sorted(part))

    for node in graph:
        if node not in index:
            visit(node)
    return found


# Circles that are left, by one of their modules; the list only gets shorter.
LEFT = {"unshot.contracts.document", "export.sentencepiece", "planner.fit"}


def test_nothing_imports_in_circles() -> None:
    assert {part[0] for part in cycles(GRAPH)} <= LEFT


def test_a_circle_would_be_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]
