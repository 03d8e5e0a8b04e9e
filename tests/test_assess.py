"""What a run must show beside its score: forgetting, robustness, mixed-in rows, gates and the model card."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export.shipping import gate_lines, gates_of
from tests.conftest import Run
from tune.assess.forgetting import Measured, accepted, forgetting, is_right
from tune.assess.robustness import robustness
from tune.evaluate.review import read_sheet
from tune.mix import draw, known, read_general
from tune.wrapping import AUGMENT, REFORMAT, augment, reformat
from unshot.contracts.gates import Gate, add_gate, read_gates
from unshot.contracts.manifest import Manifest, read_manifest
from unshot.contracts.parity import FileReport
from unshot.contracts.task import Task
from unshot.data.rows import Example
from unshot.errors import InputError

LABELS = ["billing", "delivery"]


def example(text: str, answer: str = "billing", line: int = 1) -> Example:
    return Example(({"role": "user", "content": text},), answer, line)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def test_other_forms_keep_every_word_in_its_place() -> None:
    texts = [
        f"My parcel number {i} has not come, and nobody answers the telephone at your shop."
        for i in range(300)
    ]
    rows = [example(t, line=i) for i, t in enumerate(texts)]
    changed, used = augment(rows, seed=3)
    assert augment(rows, seed=3)[0] == changed and augment(rows, seed=4)[0] != changed
    # The order of the file does not matter.
    assert sorted(r.text for r in augment(rows[::-1], seed=3)[0]) == sorted(r.text for r in changed)
    different = sum(a.text != b.text for a, b in zip(rows, changed, strict=True))
    assert 110 < different < 190 and sum(used.values()) == different and all(used.values())
    for before, after in zip(rows, changed, strict=True):
        assert " ".join(words(before.text)) in " ".join(words(after.text))
        assert after.answer == before.answer and after.line == before.line
    system = {"role": "system", "content": "Answer billing or delivery."}
    moved = 0
    for text in texts:
        request = reformat([system, {"role": "user", "content": text}], 3, LABELS)
        whole = " ".join(m["content"] for m in request)
        assert " ".join(words(text)) in " ".join(words(whole)) and "Answer BILLING or DELIVERY." in whole
        assert text != request[-1]["content"]
        moved += len(request) == 1
    assert 60 < moved < 140


def test_lists_and_code_keep_their_lines() -> None:
    text = "Fix this:\n  if x:\n    y = {1: 2}"
    for forms in (AUGMENT, REFORMAT):
        assert forms["lines"](text, random.Random(0)) == text


def test_general_rows_make_up_the_share_and_none_is_like_the_held_out_ones(tmp_path: Path) -> None:
    path = tmp_path / "general.jsonl"
    held_out = ["What is the capital of France?"]
    rows = [{"prompt": f"Name a town number {i} in region {i * 7}.", "completion": "x"} for i in range(40)]
    rows += [{"prompt": "what is the capital  of France", "completion": "Paris"}, rows[0]]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    mix = draw(path, 0.2, 80, 1, held_out=held_out)
    assert len(mix.rows) == 20 and mix.record["share"] == 0.2 and mix.record["left_out"] == 1
    assert "capital" not in " ".join(r.text for r in mix.rows)
    assert [r.line for r in draw(path, 0.2, 80, 1, held_out=held_out).rows] == [r.line for r in mix.rows]
    with pytest.raises(InputError, match="between 0 and 1"):
        draw(path, 1.0, 80, 1)
    alone = tmp_path / "same.jsonl"
    alone.write_text(json.dumps(rows[40]) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="forgetting is measured on"):
        draw(alone, 0.1, 80, 1, held_out=held_out)


def test_the_shipped_set_is_sound() -> None:
    rows = read_general(None)
    assert 300 <= len(rows) <= 400 and {r.extra["kind"] for r in rows} == {
        "knowledge", "arithmetic", "language", "instruction",
    }  # fmt: skip
    for row in rows:
        assert is_right(row, row.answer or ""), row.text
        # What is asked for does not already stand in the question, but where it must be picked out or repeated.
        if row.extra["kind"] in ("knowledge",):
            assert not is_right(row, row.text), row.text
    assert len({r.text for r in rows}) == len(rows)
    assert known([r.text for r in rows[:1]], [r.text for r in rows[1:]]) == set()
    sums = 0
    for row in rows:
        if found := re.match(r"Calculate: (\d+) ([-+*/]) (\d+) =", row.text) or re.match(
            r"What is (\d+) (plus|minus|times|divided by) (\d+)\?", row.text
        ):
            one, what, other = int(found[1]), found[2], int(found[3])
            signs = {"plus": "+", "minus": "-", "times": "*", "divided by": "/"}
            right = {"+": one + other, "-": one - other, "*": one * other, "/": one / other}[
                signs.get(what, what)
            ]
            assert float(accepted(row)[0]) == right
            sums += 1
    assert sums >= 13


def test_an_answer_counts_as_whole_words() -> None:
    row = Example(({"role": "user", "content": "Is it flat?"},), "No.", 1, {"answers": ["no"]})
    assert (
        is_right(row, "No, it is round.") and not is_right(row, "It is not.") and not is_right(row, "I know")
    )
    shout = Example(({"role": "user", "content": "In capitals"},), "RIVER", 1, {"answers": ["RIVER"]})
    assert is_right(shout, "RIVER") and not is_right(shout, "river")


def test_the_forgetting_gate_fails_on_a_fall_and_on_perplexity() -> None:
    rows = read_general(None)
    size = len(rows)

    def measured(right: int, perplexity: float) -> Measured:
        return Measured(perplexity, [i < right for i in range(size)])

    known = size * 6 // 10
    assert forgetting(rows, measured(known, 10), measured(known - size // 20, 11), 0.1).passed is True
    # A twelfth fewer may be over a tenth less: not shown either way.
    unclear = forgetting(rows, measured(known, 10), measured(known - size // 12, 11), 0.1)
    assert unclear.passed is None and "too few questions" in unclear.detail
    fell = forgetting(rows, measured(known, 10), measured(known - size // 4, 10), 0.1)
    assert fell.passed is False and fell.figures["change"]["high"] < 0
    assert forgetting(rows, measured(known, 10), measured(known - size // 4, 10), 0.5).passed is True
    assert forgetting(rows, measured(known, 10), measured(known, 16), 0.1).passed is False
    # A base that knows nothing of the set cannot be seen to forget it: nobody can tell.
    assert forgetting(rows, measured(size // 16, 10), measured(0, 10), 0.01).passed is None


def test_a_usual_change_of_answers_is_enough_for_a_verdict() -> None:
    """A tuned 135M answered a quarter of the questions otherwise, 0.024 worse on balance: 82 could not tell."""
    rows = read_general(None)
    size = len(rows)
    before = [i % 5 < 2 for i in range(size)]
    lost, won = size * 135 // 1000, size * 111 // 1000
    knew = [i for i, right in enumerate(before) if right][:lost]
    did_not = [i for i, right in enumerate(before) if not right][:won]
    after = [right != (i in knew or i in did_not) for i, right in enumerate(before)]
    gate = forgetting(rows, Measured(10, before), Measured(11, after), 0.1)
    assert gate.passed is True, gate.detail
    few = slice(0, 82)
    assert forgetting(rows[few], Measured(10, before[few]), Measured(11, after[few]), 0.1).passed is not True


def test_the_robustness_gate_needs_a_gap_that_is_no_chance() -> None:
    task = Task(labels=LABELS, metric="accuracy")
    truth = ["billing", "delivery"] * 40
    wrong = {"billing": "delivery", "delivery": "billing"}
    half = [t if i % 4 else wrong[t] for i, t in enumerate(truth)]
    rows = [example(f"q {i}", t, i) for i, t in enumerate(truth)]
    gate = robustness(task, rows, truth, half, 0.05)
    assert gate.passed is False and "format overfitting" in gate.detail
    assert gate.figures["difference"]["value"] == pytest.approx(-0.25)
    assert robustness(task, rows, truth, truth, 0.05).passed is True
    assert robustness(task, rows[:8], truth[:8], half[:7] + truth[7:8], 0.05).passed in (None, False)
    few = robustness(task, rows[:10], truth[:10], [*truth[:9], wrong[truth[9]]], 0.05)
    assert few.passed is None and "too few rows" in few.detail
    nothing = robustness(task, rows, ["?"] * 80, ["?"] * 80, 0.05)
    assert nothing.passed is None


@pytest.fixture(scope="module")
def run(
    unshot: Run, tiny_model: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A run of the tiny model with everything on, and its general rows."""
    folder = tmp_path_factory.mktemp("assess")
    general = folder / "mix.jsonl"
    rows = [
        {"prompt": f"Add {a} and {b}.", "completion": str(a + b)} for a in range(31, 37) for b in (61, 74)
    ]
    general.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    done = unshot(
        "tune", small_data, "--base", tiny_model, "--out", folder / "run", "--epochs", "1", "--rank", "2", "-q",
        "--instruction", "Classify the clause.", "--mix", general, "--mix-share", "0.15", "--augment-format",
        "--target", "0.99", "--strict",
    )  # fmt: skip
    assert done.returncode == 1 and "target 0.99 not met" in done.stderr, done.stderr
    return folder / "run", general


def test_the_run_records_its_gates_its_rows_and_a_card(run: tuple[Path, Path]) -> None:
    path, general = run
    manifest = read_manifest(path, stage="tune")
    gates = read_gates(path)
    assert set(gates) == {"quality", "forgetting", "robustness"} and gates["quality"].passed is False
    assert gates["forgetting"].figures["rows"] == len(read_general(None))
    rows: dict[str, Any] = manifest.config["rows"]
    assert rows["mix"]["rows"] == 9 and rows["mix"]["file"]["path"] == str(general)
    assert sum(rows["augment_format"].values()) > 10
    # The split on disk holds the task's rows as they came.
    assert (
        len((path / "splits" / "train.jsonl").read_text().splitlines())
        == manifest.result["rows"]["train"]
        == 48
    )
    card = (path / "README.md").read_text(encoding="utf-8")
    assert "README.md" in manifest.outputs and "No human has reviewed" in card
    yaml = card.split("---\n")[1]
    assert 'base_model: "tiny"' in yaml and "library_name: peft" in yaml and "- f1" in yaml
    for name in ("quality", "forgetting", "robustness", "review"):
        assert f"| {name} |" in card
    assert "9 general rows (15.8% of the training rows)" in card


def test_a_review_is_drawn_blind_and_comes_back_as_a_gate(
    unshot: Run, run: tuple[Path, Path], tmp_path: Path
) -> None:
    path, _ = run
    sheet = tmp_path / "sheet.csv"
    done = unshot("eval", path, "--review", sheet, "--review-rows", "6", "-q")
    assert done.returncode == 0, done.stderr
    odd = unshot("eval", path, "--review", tmp_path / "sheet.pdf", "-q")
    assert odd.returncode == 2 and "a .csv or an .html" in odd.stderr
    refused = unshot("eval", path, "--review", sheet, "-q")
    assert refused.returncode == 2 and "already there" in refused.stderr
    text = sheet.read_text(encoding="utf-8-sig")
    assert text.startswith("id,request,answer_1,answer_2,ok_1,ok_2,better,comment")
    key = json.loads(next((path / "reviews").glob("*.json")).read_text())
    assert len(key["rows"]) == 6 and read_manifest(path, stage="tune")
    empty = unshot("eval", path, "--from-review", sheet)
    assert empty.returncode == 2 and "nothing is filled in" in empty.stderr
    # The tiny model's answers are noise: reviewers take the reference and refuse the model.
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    facts = {r["id"]: r for r in key["rows"]}
    for row in rows:
        ours = facts[row["id"]]["ours"]
        row[f"ok_{ours}"], row[f"ok_{3 - ours}"], row["better"] = "no", "yes", str(3 - ours)
    with sheet.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert len(read_sheet(sheet)) == 6
    done = unshot("eval", path, "--from-review", sheet, "--json")
    assert done.returncode == 1 and "the gate `review` failed" in done.stderr
    result = json.loads(done.stdout)
    assert result["accepted"]["value"] == 0 and result["other_accepted"]["value"] == 1
    assert result["preference"] == {**result["preference"], "run": 0, "other": 6, "ties": 0}
    assert result["metric_human"]["agreement"]["value"] == 1
    gate = read_gates(path)["review"]
    assert gate.passed is False and gate.figures["rows"] == 6
    read_manifest(path, stage="tune")  # the hashes still hold
    sheet.write_text(sheet.read_text().replace(key["review"], "r00000000"))
    foreign = unshot("eval", path, "--from-review", sheet)
    assert foreign.returncode == 2 and "not drawn from" in foreign.stderr


def test_an_export_carries_the_gates_and_says_where_nobody_looked(tmp_path: Path) -> None:
    made = Gate(name="quality", passed=True, detail="0.9 of 0.8 | fine")
    Manifest("tune", gates=[made]).finish(tmp_path)
    model: Any = SimpleNamespace(run=tmp_path)
    reports = [FileReport("gguf:f16", True), FileReport("onnx:fp32", False, failures=["KL 0.2"])]
    gates = {g.name: g for g in gates_of(model, reports)}
    assert set(gates) == {"quality", "parity", "review"} and gates["review"].passed is None
    assert gates["parity"].passed is False and "KL 0.2" in gates["parity"].detail
    text = "\n".join(gate_lines(list(gates.values())))
    assert "No human has reviewed" in text and "0.9 of 0.8 / fine" in text
    add_gate(tmp_path, Gate(name="review", passed=True, detail="50 rows", figures={"rows": 50}))
    text = "\n".join(gate_lines(gates_of(model, reports)))
    assert "No human has reviewed" not in text and "| review | passed | 50 rows |" in text
    # A bare base model has no gates but parity, and its card no such section.
    bare = gates_of(SimpleNamespace(run=None), reports[:1])  # type: ignore[arg-type]
    assert [g.name for g in bare] == ["parity"] and gate_lines(bare) == []
