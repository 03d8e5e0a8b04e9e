"""`unshot deploy retrain`: which rows it takes, what stays sealed, what it proposes, and that it goes on."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.answers import gather
from deploy.log import Feedback, Request, Writer
from deploy.retrain.collect import Collected, collect, completion, drop_alike
from deploy.retrain.run import KEEP, PROPOSE, weigh
from tests.conftest import ROOT, Run
from tests.logs import request
from unshot.data import Example
from unshot.task import Task

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
        Feedback(id="r1", time=1, correction="high"),
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
            scores(0.1, 0.02, 0.2), None, {"x": {"passed": False, "detail": "d"}}, KEEP, id="failed gate"
        ),
        pytest.param(
            scores(0.1, 0.02, 0.2), None, {"x": {"passed": None, "detail": "d"}}, PROPOSE, id="open gate"
        ),
    ],
)
def test_the_proposal_weighs_the_sealed_test_first(
    sealed: dict[str, Any], fresh: dict[str, Any] | None, gates: dict[str, Any], verdict: str
) -> None:
    assert weigh(sealed, fresh, gates, 0.02)[0] == verdict


def test_schedules_are_quarterly_and_parse(unshot: Run) -> None:
    line = ("deploy", "retrain", "my log", "--data", "d.jsonl", "--target", "0.9")
    texts = {
        kind: json.loads(unshot(*line, "--schedule", kind, "--json").stdout)["text"]
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
    monthly = unshot(*line, "--schedule", "cron", "--every", "monthly")
    assert "0 3 1 * * cd " in monthly.stdout


@pytest.fixture(scope="module")
def champion(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, small_data: Path, unshot: Run
) -> Path:
    """A run of the tiny model; its scores are chance."""
    folder = tmp_path_factory.mktemp("champion") / "run"
    done = unshot(
        "tune",
        small_data,
        "--base",
        tiny_model,
        "--out",
        folder,
        "--epochs",
        "1",
        "--instruction",
        "Classify.",
        "-q",
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def corrected(tmp_path_factory: pytest.TempPathFactory, clauses: list[dict[str, Any]]) -> Path:
    """A log of 40 clauses that the champion did not see, each corrected."""
    folder = tmp_path_factory.mktemp("log")
    writer = Writer(folder)
    for number, row in enumerate(sorted(clauses, key=lambda r: len(r["prompt"]))[60:100]):
        line = request(number, input=row["prompt"], answer="x", label="(invalid)", schema_ok=False)
        writer.write(line)
        true = json.loads(row["completion"])["risk"]
        writer.write(Feedback(id=line.id, time=line.time, correction=true, by="reviewer"))
    return folder


def command(corrected: Path, champion: Path, data: Path, out: Path, *more: str) -> tuple[str | Path, ...]:
    return (
        "deploy", "retrain", corrected, "--champion", champion, "--data", data, "--out", out, "--check-rows", "2",
        "--json", "-q", *more,
    )  # fmt: skip


def test_retraining_ends_with_a_proposal_and_goes_on_from_finished_stages(
    champion: Path, corrected: Path, small_data: Path, unshot: Run, tmp_path: Path
) -> None:
    out = tmp_path / "retrain"
    done = unshot(*command(corrected, champion, small_data, out))
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout.partition('\n{\n  "error"')[0])
    assert report["rows"]["added"] == 32 and report["rows"]["fresh"] == 8
    assert [s["stage"] for s in report["stages"]] == [
        "look",
        "check",
        "run",
        "eval",
        "eval-fresh",
        "artifacts",
    ]
    assert report["verdict"] == PROPOSE if done.returncode == 0 else KEEP
    sealed = {json.loads(x)["messages"][0]["content"] for x in (champion / "splits" / "test.jsonl").open()}
    trained = {
        json.loads(x)["messages"][0]["content"]
        for name in ("train", "validation", "test")
        for x in (out / "run" / "splits" / f"{name}.jsonl").open()
    }
    assert len(sealed) == report["sealed"]["rows"] and not sealed & trained
    assert (out / "proposal.md").read_text().count("added from the log: 32") == 1
    assert "<svg" in (out / "report.html").read_text()
    shutil.rmtree(out / "artifacts")
    again = json.loads(
        unshot(*command(corrected, champion, small_data, out)).stdout.partition('\n{\n  "error"')[0]
    )
    assert [s["stage"] for s in again["stages"] if s["seconds"]] == ["artifacts"]
    assert again["sealed"] == report["sealed"]


def test_nothing_is_done_where_the_target_is_met_or_new_rows_are_few(
    champion: Path, corrected: Path, small_data: Path, unshot: Run, tmp_path: Path
) -> None:
    few = unshot(*command(corrected, champion, small_data, tmp_path / "few", "--min-rows", "100"))
    assert few.returncode == 0, few.stderr
    assert json.loads(few.stdout)["verdict"] == "nothing to do"
    assert not (tmp_path / "few" / "run").exists()


def test_a_met_target_counts_only_where_the_log_does_not_contradict_it(
    champion: Path,
    corrected: Path,
    small_data: Path,
    unshot: Run,
    tmp_path: Path,
    clauses: list[dict[str, Any]],
) -> None:
    """The champion's sealed score meets a target of 0; in the log it was always wrong, which contradicts 0.5."""
    quiet = tmp_path / "quiet"
    Writer(quiet).write(request(1, input="x", answer="x"))
    met = unshot(*command(quiet, champion, small_data, tmp_path / "met", "--target", "0.0"))
    assert "meets the target" in json.loads(met.stdout)["reason"]
    met = unshot(
        *command(corrected, champion, small_data, tmp_path / "a", "--target", "0", "--min-rows", "100")
    )
    assert "meets the target" in json.loads(met.stdout)["reason"]
    assert subprocess.list2cmdline(map(str, [ROOT]))


def test_a_log_without_a_needed_option_is_one_line(unshot: Run, tmp_path: Path) -> None:
    done = unshot("deploy", "retrain", tmp_path)
    assert done.returncode == 2 and "--data is missing" in done.stderr
