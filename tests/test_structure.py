"""The rule of the rooms: stages import `unshot` and never each other, nothing imports in circles, the face is light."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def test_nothing_imports_in_circles() -> None:
    assert cycles(GRAPH) == []


def test_a_circle_would_be_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]


def table() -> Iterator[tuple[str, str, str]]:
    """The rows of "Where to add X": what, registry, further files."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = text.split("## Where to add X")[1].split("\n## ")[0].splitlines()
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if len(cells) == 3 and "`" in cells[1]:
            yield cells[0], cells[1], cells[2]


@pytest.mark.parametrize(("what", "registry", "more"), table(), ids=lambda cell: cell[:30])
def test_where_to_add_x_names_what_is_there(what: str, registry: str, more: str) -> None:
    words = re.findall(r"`([^`]+)`", f"{registry} {more}")
    files = [word for word in words if "/" in word]
    assert files, what
    for file in files:
        assert (ROOT / file).exists(), f"{what}: {file}"
    for name in set(words) - set(files):
        text = (ROOT / files[0]).read_text(encoding="utf-8")
        found = rf"^(def )?{re.escape(name)}\b|^\[provider\.\w+\]"
        assert re.search(found, text, re.MULTILINE), f"{what}: {name} is not in {files[0]}"


def strings(path: Path) -> set[str]:
    return {
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("rouge_l", {"unshot.metrics.registry"}),
        ("json_f1", {"unshot.metrics.registry", "unshot.contracts.task"}),
        ("dora", {"unshot.methods", "tune.model", "export.foreign"}),
        ("genai-cuda", {"unshot.catalog.formats", "export.genai", "export.device"}),
    ],
)
def test_a_key_of_a_registry_is_written_once(name: str, home: set[str]) -> None:
    """A list of names that stands a second time is one that somebody forgets: the metric, method or format is added to
    its registry alone (its own module may name it)."""
    assert {module for module, path in MODULES.items() if name in strings(path)} <= home


def test_no_assertion_looks_at_the_clock() -> None:
    """`assert` on what a clock says fails on a busy machine; deadlines that only end a wait are no assertions."""
    clocks = {"perf_counter", "monotonic", "process_time"}
    for path in sorted((ROOT / "tests").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                called = {n.attr for n in ast.walk(node.test) if isinstance(n, ast.Attribute)}
                assert not called & clocks, f"{path.name}:{node.lineno}"
