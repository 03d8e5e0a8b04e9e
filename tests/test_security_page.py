"""docs/security.md names a test for each line; each of them is there."""

from __future__ import annotations

import re

from tests.conftest import ROOT

TESTS = ROOT / "tests"


def test_every_line_of_the_threat_model_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    names = re.findall(r"`(?:(test_\w+\.py))?(?:::(\w+))?`", text)
    found = {
        name: path
        for path in TESTS.glob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    named = [(file, name) for file, name in names if file or name]
    assert len(named) > 40
    for file, name in named:
        assert not file or (TESTS / file).is_file(), file
        assert not name or name in found, name
        assert not (file and name) or found[name].name == file, (file, name)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    for row in rows:
        last = row.rstrip("| ").rpartition("|")[2]
        assert last.strip() in ("test", "the same") or "test_" in last or "not tested" in last, row
