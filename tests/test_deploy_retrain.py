"""`unshot deploy retrain`: which rows it takes, what stays sealed, what it proposes, and that it goes on."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.answers import gather
from deploy.retrain.champion import find_champion
from deploy.retrain.collect import Collected, collect, completion, drop_alike
from deploy.retrain.command import completed
from deploy.retrain.run import KEEP, PROPOSE, blocks, weigh
from tests.logs import request, run_here
from unshot.case import BenchSettings, Case, TaskSettings, TuneSettings
from unshot.contracts.gates import Gate, add_gate
from unshot.contracts.manifest import BaseModel, Manifest, Score
from unshot.contracts.request_log import Feedback, Request, Writer
from unshot.contracts.task import Task
from unshot.data.rows import Example, write_jsonl

TASK = Task(labels=["high", "low"], answer_field="risk")


def example(text: str, answer: str, line: int = 1) -> Example:
    return Example(({"role": "user", "content": text},), json.dumps({"risk": answer}), line)


def logged(number: int, text: str, answer: str, **fields: Any) -> Request:
    return request(number, input=text, answer=json.dumps({"risk": answer}), label=answer, **fields)


def merged(lines: list[Request], said: list[Feedback]) -> Collected:
    original = [example("the first clause", "low", 1), example("the second clause", "low", 2)]
    sealed = [example("the sealed clause", "high", 3)]
    return collect([*original, *sealed], sealed, gather(lines), {f.id: f for f in said}, TASK)


def test_corrections_override_the_original_are_added_once_and_never_touch_the_sealed_test() -> None:
    lines = [
        logged(1, "The FIRST clause", "low"),
        logged(2, "a new clause", "low"),
        logged(3, "a new  clause", "low"),
        logged(4, "the sealed clause", "high"),
        logged(5, "wrong, nobody said what is right", "low"),
        logged(6, "broken", "low", schema_ok=False),
        logged(7, "fine", "low"),
    ]
    said = [
        Feedback(id="r1", time=1, correction="high", by="reviewer"),
        Feedback(id="r2", time=1, correction="low"),
        Feedback(id="r3", time=2, correction='{"risk": "high", "reason": "because"}'),
        Feedback(id="r4", time=1, correction="low"),
        Feedback(id="r5", time=1, correct=False),
        Feedback(id="r7", time=1, correct=True),
    ]
    found = merged(lines, said)
    answers = {row["messages"][0]["content"]: row["messages"][-1]["content"] for row in found.train}
    assert answers == {
        "the first clause": '{"risk": "high"}',
        "the second clause": '{"risk": "low"}',
        "a new  clause": '{"risk": "high", "reason": "because"}',
    }
    assert [(r["line"], json.loads(r["was"])["risk"]) for r in found.replaced] == [(1, "low")]
    assert [r["request"] for r in found.added] == ["r3"]
    assert [(d["input"], d["correction"]) for d in found.disputed] == [
        ("the sealed clause", '{"risk": "low"}')
    ]
    assert [row["request"] for row in found.to_label] == ["r5", "r6"]


def test_every_original_row_stays_and_a_conversation_is_not_its_last_message() -> None:
    def about(document: str, answer: str, line: int) -> Example:
        row = example("Is it fine?", answer, line)
        before = ({"role": "user", "content": document}, {"role": "assistant", "content": "Read."})
        return Example((*before, *row.messages), row.answer, line)

    documents = [about(f"Document {n}", "low", n) for n in range(6)]
    twice = [example("asked twice", "low", 7), example("asked twice", "low", 8)]
    lines = [logged(1, "is it fine?", "low"), logged(2, "asked twice", "low")]
    said = {f"r{n}": Feedback(id=f"r{n}", time=1, correction="high", by="reviewer") for n in (1, 2)}
    found = collect([*documents, *twice], documents[:1], gather(lines), said, TASK)
    answers = [json.loads(row["messages"][-1]["content"])["risk"] for row in found.train]  # type: ignore[index]
    # The sealed document's question keeps the correction out, and no other document.
    assert answers == ["low"] * 5 + ["high"] * 2
    assert [row["line"] for row in found.replaced] == [7, 8]


def test_users_do_not_undo_what_experts_wrote_or_said() -> None:
    lines = [logged(n, "the first clause", "low", unit=f"u{n}") for n in range(15)]
    found = merged(lines, [Feedback(id=f"r{n}", time=n, correction="high") for n in range(15)])
    assert not found.replaced and len(found.contested) == 1
    assert {json.loads(r["messages"][-1]["content"])["risk"] for r in found.train} == {"low"}
    said = [Feedback(id="r0", time=1, correction="low", by="reviewer"),
            Feedback(id="r1", time=9, correction="high")]  # fmt: skip
    both = [logged(0, "a new clause", "high", unit="a"), logged(1, "a new clause", "high", unit="b")]
    assert [r["by"] for r in merged(both, said).added] == ["reviewer"]


def test_one_user_changes_a_few_inputs_only() -> None:
    lines = [logged(n, f"a new clause {n}", "low", unit="the same") for n in range(12)]
    said = {f"r{n}": Feedback(id=f"r{n}", time=n, correction="high") for n in range(12)}
    found = collect([], [], gather(lines), said, TASK, per_user=5)
    assert len(found.added) == 5 and len(found.unusable) == 7
    expert = {k: f.changed(by="reviewer") for k, f in said.items()}
    assert len(collect([], [], gather(lines), expert, TASK, per_user=5).added) == 12


def test_a_text_that_the_log_has_cut_is_not_trained_on() -> None:
    found = merged(
        [logged(1, "the beginning", "low", cut=True)], [Feedback(id="r1", time=1, correction="high")]
    )
    assert not found.added and "beginning" in str(found.unusable[0]["why"])


def test_a_correction_that_is_no_label_is_reported_and_not_trained_on() -> None:
    found = merged([logged(1, "a clause", "low")], [Feedback(id="r1", time=1, correction="medium")])
    assert [u["why"] for u in found.unusable] == ["not one of the labels: medium"]
    assert not found.added
    assert completion("HIGH", TASK) == '{"risk": "high"}'


def test_a_fifth_of_many_corrections_is_kept_out_of_training() -> None:
    lines = [logged(n, f"clause number {n} of its own kind", "low") for n in range(50)]
    found = merged(lines, [Feedback(id=f"r{n}", time=1, correction="high") for n in range(50)])
    assert len(found.fresh) == 10
    kept = {row["request"] for row in found.fresh}
    assert not kept & {row.get("request") for row in found.train}
    assert found.new == 50


def test_rows_that_are_nearly_test_rows_leave_training(tmp_path: Path) -> None:
    found = merged([logged(1, "the sealed clauses", "low")], [Feedback(id="r1", time=1, correction="high")])
    path = tmp_path / "duplicates.jsonl"
    # One file of sealed (line 1), fresh (none), and training rows (lines 2 to 4): the last is like the sealed one.
    path.write_text('{"line": 4, "like_line": 1}\n{"line": 3, "like_line": 2}\n')
    drop_alike(found, path)
    assert [row["request"] for row in found.held_back] == ["r1"]
    assert len(found.train) == 2 and not found.added


def scores(value: float, low: float, high: float, rows: int = 100) -> dict[str, Any]:
    return {"metric": "accuracy", "rows": rows, "difference": {"value": value, "low": low, "high": high}}


def gate(passed: bool | None) -> dict[str, Any]:
    return {"x": {"passed": passed, "detail": "d", "blocks": True}}


@pytest.mark.parametrize(
    ("sealed", "fresh", "gates", "verdict"),
    [
        pytest.param(scores(0.1, 0.02, 0.2), None, {}, PROPOSE, id="better"),
        pytest.param(scores(0.0, -0.01, 0.02), None, {}, PROPOSE, id="not worse"),
        pytest.param(scores(-0.1, -0.2, -0.03), scores(0.5, 0.3, 0.7), {}, KEEP, id="worse"),
        pytest.param(scores(0.0, -0.1, 0.1), None, {}, KEEP, id="cannot tell"),
        pytest.param(scores(0.0, -0.1, 0.1), scores(0.5, 0.3, 0.7), {}, PROPOSE, id="mended"),
        pytest.param(scores(-0.05, -0.1, 0.1), scores(0.5, 0.3, 0.7), {}, KEEP, id="mended but lower"),
        pytest.param(
            scores(0.1, 0.02, 0.2),
            None,
            gate(False),
            KEEP,
            id="failed gate",
        ),
        pytest.param(
            scores(0.1, 0.02, 0.2),
            None,
            gate(None),
            PROPOSE,
            id="open gate",
        ),
    ],
)
def test_the_proposal_weighs_the_sealed_test_first(
    sealed: dict[str, Any], fresh: dict[str, Any] | None, gates: dict[str, Any], verdict: str
) -> None:
    assert weigh(sealed, fresh, gates, 0.02)[0] == verdict


def test_schedules_are_quarterly_and_parse(capsys: pytest.CaptureFixture[str]) -> None:
    line = ("deploy", "retrain", "my log", "--data", "d.jsonl", "--target", "0.9")
    texts = {
        kind: json.loads(run_here(capsys, *line, "--schedule", kind, "--json").out)["text"]
        for kind in ("cron", "github", "airflow")
    }
    cron = texts["cron"].splitlines()[-1]
    assert cron.startswith("0 3 1 1,4,7,10 * cd ") and "'my log'" in cron
    assert not re.search(r"(?<!\\)%", cron), "an unescaped % ends a crontab's command"
    workflow = yaml.safe_load(texts["github"])
    assert workflow[True]["schedule"] == [{"cron": "0 3 1 1,4,7,10 *"}]
    assert "--target 0.9 --out retrain-$(date" in workflow["jobs"]["retrain"]["steps"][0]["run"]
    calls = [n for n in ast.walk(ast.parse(texts["airflow"])) if isinstance(n, ast.Call)]
    words = {k.arg: k.value.value for c in calls for k in c.keywords if isinstance(k.value, ast.Constant)}
    assert (
        words["schedule"] == "0 3 1 1,4,7,10 *" and "unshot deploy retrain 'my log'" in words["bash_command"]
    )
    more = "--margin 0.1 --target 0.9 --min-rows 3 --by judge --by reviewer --force --requests 9"
    every = run_here(capsys, *line, *more.split(), "--schedule", "cron").out
    assert more in every, "what was asked for is scheduled"
    monthly = run_here(capsys, *line, "--schedule", "cron", "--every", "monthly")
    assert "0 3 1 * * cd " in monthly.out


def test_a_case_says_what_no_flag_does() -> None:
    none = {"target": None, "margin": None, "requests": None, "least": 4}
    assert completed(none, None) == {
        "target": None,
        "margin": 0.02,
        "requests": BenchSettings().requests,
        "least": 4,
    }
    case = Case(task=TaskSettings(target=0.7), bench=BenchSettings(margin=0.05, requests=50))
    assert completed(none, case) == {"target": 0.7, "margin": 0.05, "requests": 50, "least": 4}
    assert completed({**none, "margin": 0.0}, case)["margin"] == 0.0


@pytest.fixture
def champion(tmp_path: Path) -> Path:
    """A run directory as `unshot tune` leaves it, as far as it is read before anything is tuned."""
    folder = tmp_path / "champion"
    write_jsonl(
        folder / "splits" / "test.jsonl", [example(f"sealed clause {n}", "high").row() for n in range(5)]
    )
    (folder / "task.json").write_text(TASK.to_json())
    score = Score("macro_f1", 0.8, 0.7, 0.9, 5)
    Manifest("tune", base=BaseModel("some-base"), tune=TuneSettings(rank=4, seed=3), score=score).finish(
        folder
    )
    return folder


def judged_log(folder: Path, right: int, wrong: int) -> Path:
    writer = Writer(folder)
    for number in range(right + wrong):
        line = logged(number, f"clause number {number}", "low")
        writer.write(line)
        writer.write(Feedback(id=line.id, time=line.time, correction="low" if number < right else "high"))
    return folder


def retrain(capsys: pytest.CaptureFixture[str], log: Path, champion: Path, *more: str) -> dict[str, Any]:
    """Runs that end before anything is tuned."""
    data = champion.parent / "data.jsonl"
    write_jsonl(data, [example(f"known clause {n}", "low").row() for n in range(20)])
    out = champion.parent / "out"
    done = run_here(
        capsys,
        "deploy",
        "retrain",
        log,
        "--champion",
        champion,
        "--data",
        data,
        "--out",
        out,
        "--json",
        "-q",
        *more,
    )
    assert done.code == 0, done.err
    assert not out.exists()
    report: dict[str, Any] = json.loads(done.out)
    assert report["verdict"] == "nothing to do"
    return report


def test_nothing_is_done_where_new_rows_are_few(
    capsys: pytest.CaptureFixture[str], champion: Path, tmp_path: Path
) -> None:
    report = retrain(capsys, judged_log(tmp_path / "log", 2, 3), champion)
    assert report["reason"] == "5 new rows in the log, fewer than --min-rows 10"
    assert report["live"]["judged"] == 5


def test_a_met_target_ends_it_unless_the_log_contradicts_it(
    capsys: pytest.CaptureFixture[str], champion: Path, tmp_path: Path
) -> None:
    good = retrain(capsys, judged_log(tmp_path / "good", 38, 2), champion, "--target", "0.75")
    assert "meets the target 0.75 already: macro_f1 0.800" in good["reason"]
    high = retrain(capsys, judged_log(tmp_path / "high", 5, 0), champion, "--target", "0.9")
    assert "new rows" in high["reason"], "a sealed score of 0.8 does not meet 0.9"
    bad = retrain(
        capsys, judged_log(tmp_path / "bad", 10, 40), champion, "--target", "0.75", "--min-rows", "99"
    )
    assert "50 new rows" in bad["reason"], "four of five judged answers were wrong"


def test_a_gate_that_the_champion_failed_as_well_keeps_nobody(champion: Path) -> None:
    add_gate(champion, Gate(name="robustness", passed=True, detail="d"))
    add_gate(champion, Gate(name="forgetting", passed=False, detail="d"))
    found = find_champion(str(champion), champion, None)
    stages = [("run", "robustness"), ("run", "forgetting"), ("artifacts", "parity"), ("bench", "claim")]
    assert [blocks(stage, gate, found) for stage, gate in stages] == [True, False, True, False]
    failed = {"run: forgetting": {"passed": False, "detail": "d", "blocks": False}}
    assert weigh(scores(0.1, 0.02, 0.2), None, failed, 0.02)[0] == PROPOSE


def test_the_next_run_is_tuned_as_the_champion_was(champion: Path) -> None:
    text = find_champion(str(champion), champion, None).case_text(0.9)
    case = Case.of(tomllib.loads(text))
    assert (case.tune.rank, case.tune.seed, case.candidate.model) == (4, 3, "some-base")
    assert (case.task.labels, case.task.answer_field, case.task.target) == (["high", "low"], "risk", 0.9)


def test_the_next_run_is_held_to_the_schema_and_its_rows_lose_the_old_prompt(champion: Path) -> None:
    from deploy.retrain.run import _original
    from unshot.console import Output

    found = find_champion(str(champion), champion, None)
    held = replace(found, task=found.task.changed(answer_schema={"type": "object"}, instruction="Classify."))
    assert Case.of(tomllib.loads(held.case_text(None))).task.answer_schema == Path("answer.schema.json")
    row = example("a clause", "low")
    old = {"messages": [{"role": "system", "content": "The old prompt."}, *row.row()["messages"]]}
    write_jsonl(champion.parent / "logged.jsonl", [old, {**old, "messages": [*old["messages"]]}])
    rows = _original(champion.parent / "logged.jsonl", held, None, Output(verbosity=-1))
    assert [r.messages for r in rows] == [row.messages] * 2


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = run_here(capsys, "deploy", "retrain", tmp_path)
    assert done.code == 2 and "--data is missing" in done.err
    done = run_here(
        capsys, "deploy", "retrain", tmp_path, "--data", "d", "--out", "o", "--store", tmp_path / "none"
    )
    assert done.code == 2 and "no registry there" in done.err
