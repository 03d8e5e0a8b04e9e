"""Preference tuning: rows with a rejected answer, through TRL where it is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.planner_files import model_folder
from tune.preference import check_rows, make_pairs, rejected_of
from unshot.data.files import Place
from unshot.data.formats import read_row
from unshot.data.rows import Columns, Example
from unshot.errors import InputError, OutsideError
from unshot.methods import METHODS
from unshot.text.chat import Chat, load_tokenizer

USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("no", "no"),
        ([{"role": "assistant", "content": "no"}], "no"),
        ({"from": "gpt", "value": "no"}, "no"),
        ("", None),
        (None, None),
    ],
)
def test_a_rejected_answer_in_any_of_its_forms(value: Any, found: str | None) -> None:
    row = {"prompt": "q", "chosen": "yes", "rejected": value}
    example = read_row(Place(Path("d"), 1), row, Columns(output="chosen")).example
    assert (example.answer, rejected_of(example)) == ("yes", found)


def test_pairs_are_the_ids_that_the_run_trains_on(tmp_path: Path) -> None:
    chat = Chat(load_tokenizer(model_folder(tmp_path / "m")))
    rows = [Example((USER,), "yes", 1, {"rejected": r}) for r in ("no", "yes", None)]
    encoded = [chat.encode(row.messages, row.answer or "") for row in rows]
    (pair,) = make_pairs(rows, encoded, chat)
    assert [*pair.prompt, *pair.chosen] == encoded[0].ids
    assert pair.rejected == [*chat.tokenizer.ids("no"), chat.end]
    with pytest.raises(InputError, match="a column `rejected`"):
        check_rows(rows[2:], "dpo")


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_without_trl_it_is_refused_before_any_work(name: str) -> None:
    if find_spec("trl") is not None:
        pytest.skip("trl is installed")
    with pytest.raises(OutsideError, match=r"needs trl; run `pip install 'unshot\[prefer\]'`"):
        METHODS[name].check("cpu")


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_right_answers_become_likelier_than_rejected_ones(
    unshot: Run, tiny_model: Path, small_data: Path, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("trl", reason="trl is not installed; pip install 'unshot[prefer]'")
    rows = [json.loads(line) for line in small_data.read_text(encoding="utf-8").splitlines()]
    labels = sorted({r["completion"] for r in rows})
    for i, row in enumerate(rows[::2]):
        row["rejected"] = next(x for x in labels[i % 2 :] + labels if x != row["completion"])
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    done = unshot(
        "tune", data, "--base", tiny_model, "--out", tmp_path / "run", "--epochs", "1", "--rank", "4", "-q",
        "--method", name, "--no-gates", "--instruction", "Classify the clause.", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["preference"]
    assert found["method"] == name and 15 <= found["pairs"] <= 30
    assert found["preferred_after"] >= found["preferred_before"]
    assert "rejected" not in done.stderr
    # The adapter is one, not TRL's reference beside it.
    assert [p.name for p in (tmp_path / "run" / "adapter").iterdir() if p.is_dir()] == []
    scored = unshot("eval", tmp_path / "run", "--json", "-q")
    assert scored.returncode == 0, scored.stderr
