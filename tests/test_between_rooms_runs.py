"""One case through tune, eval, export, bench and the gateway, with a tiny model: every room says the same of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run, shared
from tests.test_between_rooms import jsonl, rows, text

pytestmark = pytest.mark.slow

QUICK = ("--requests", "2", "--cache", "on", "--warm-up", "1", "--json")
CSV = "title,body,topic\n" + "".join(f"T{i},{r['prompt']},{r['completion']}\n" for i, r in enumerate(rows()))
CASE = """\
[task]
system = "The long old prompt."
instruction = "Classify the clause."
data = "data.csv"
[rows]
input_column = ["title", "body"]
output_column = "topic"
[candidate]
model = "{model}"
[tune]
epochs = 1
rank = 4
forgetting = false
robustness = false
[export]
to = ["gguf:f16"]
"""


@pytest.fixture(scope="module")
def made(unshot: Run, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a case whose rows have named columns, its run, the exported file and the base's; read it."""

    def make(folder: Path) -> None:
        text(folder / "data.csv", CSV)
        text(folder / "unshot.toml", CASE.format(model=tiny_model))
        for command in (
            ("tune", "--out", "run", "-q"),
            ("export", "run", "--check-rows", "2", "--out", "artifacts", "-q"),
            ("export", tiny_model, "--to", "gguf:f16", "--check-rows", "2", "--out", "base", "-q"),
        ):
            done = unshot(*command, cwd=folder)
            assert done.returncode == 0, done.stderr

    return shared(tmp_path_factory, "between", make)


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(made, tmp_path / "here"))


def bench(unshot: Run, place: Path, *more: str | Path, cwd: Path | None = None) -> Any:
    done = unshot(
        "bench", "--baseline", f"gguf:{place}/base/model-f16.gguf",
        "--candidate", f"gguf:{place}/artifacts/model-f16.gguf", "--out", "report", "--overwrite",
        *QUICK, *more, cwd=cwd or place,
    )  # fmt: skip
    return json.loads(done.stdout), done.stderr


def candidate_tokens(folder: Path) -> list[int]:
    """Prompt tokens of the candidate's requests."""
    lines = (folder / "report" / "records.jsonl").read_text().splitlines()
    return [r["prompt_tokens"] for r in map(json.loads, lines) if r["side"] == "candidate"]


def test_named_columns_of_the_case_do_not_reach_the_run_s_own_rows(place: Path, unshot: Run) -> None:
    report, said = bench(unshot, place)
    assert report.get("quality", {}).get("rows") == 6, report
    assert "named columns" not in said


def test_other_rows_are_asked_as_the_model_was_tuned(place: Path, tmp_path: Path, unshot: Run) -> None:
    own, _ = bench(unshot, place)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    given, _ = bench(unshot, place, "--data", place / "run" / "splits" / "test.jsonl", cwd=elsewhere)
    assert given["task"] == own["task"]
    assert given["conditions"]["max_tokens"] == own["conditions"]["max_tokens"]
    assert set(candidate_tokens(elsewhere)) <= set(range(20, 50))
    shutil.move(place / "run", place / "renamed")
    moved, _ = bench(unshot, place, "--data", place / "renamed" / "splits" / "test.jsonl", cwd=elsewhere)
    assert moved["task"] == own["task"]


def test_the_run_is_found_from_another_directory(place: Path, tmp_path: Path, unshot: Run) -> None:
    """The run was named relative to another directory, and both were moved since."""
    manifest = json.loads((place / "artifacts" / "manifest.json").read_text())
    assert Path(manifest["run"]).is_absolute()
    (tmp_path / "x").mkdir()
    report, _ = bench(unshot, place, cwd=tmp_path / "x")
    assert report["quality"]["rows"] == 6


def test_what_the_case_changes_of_the_task_is_said_and_counts(place: Path, unshot: Run) -> None:
    before, _ = bench(unshot, place)
    tokens = min(candidate_tokens(place))
    edited = (
        (place / "unshot.toml").read_text().replace("Classify the clause.", "Sort it, please, by its risk.")
    )
    text(place / "unshot.toml", edited)
    after, said = bench(unshot, place, "--labels", "low,high,none", "--metric", "accuracy")
    assert min(candidate_tokens(place)) != tokens
    assert after["task"]["instruction"] == "Sort it, please, by its risk."
    assert after["task"]["labels"] == ["low", "high", "none"]
    assert after["quality"]["metric"] == "accuracy"
    for name in ("instruction", "labels", "metric"):
        assert f"warning: {name}: " in said
    assert before["task"]["labels"] == ["high", "low"]


def test_the_gateway_serves_an_exported_file_by_its_own_task(place: Path, tmp_path: Path) -> None:
    from deploy.registry.store import Registry
    from deploy.serve.target import ArmSpec, Resolver
    from unshot.case import Case
    from unshot.contracts.registry import State

    found = ArmSpec(f"gguf:{place}/artifacts/model-f16.gguf", prompt="short")
    resolver = Resolver(Case(), Registry(tmp_path / "none"), None, None)
    target = resolver.resolve("candidate", found, None, State())
    assert target is not None
    assert target.prompt.system == "Classify the clause."
    assert target.checker.check("low") == (True, "low")
    assert target.checker.check("other")[0] is False
    assert target.max_tokens is not None


def test_a_run_that_was_tuned_again_is_not_the_one_behind_the_file(place: Path, unshot: Run) -> None:
    manifest = place / "run" / "manifest.json"
    text(manifest, manifest.read_text() + "\n")
    _, said = bench(unshot, place)
    assert "tuned again" in said
    added = unshot("deploy", "registry", "add", "artifacts", "--json", cwd=place)
    assert json.loads(added.stdout)["scores"]["tune"] is None
    done = unshot("deploy", "registry", "add", "artifacts", "--run", "run", "--store", "other", cwd=place)
    assert done.returncode == 2
    assert "tuned again" in done.stderr


def test_rows_of_one_s_own_are_read_by_the_case_in_eval_and_export(place: Path, unshot: Run) -> None:
    lines = CSV.splitlines(keepends=True)
    text(place / "own-1.csv", "".join(lines[:7]))
    text(place / "own-2.csv", lines[0] + "".join(lines[7:12]))
    scored = unshot("eval", "run", "--data", "own-*.csv", "--out", "scores", "--json", cwd=place)
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["rows"] == 11
    assert "not used" not in scored.stderr
    answers = [json.loads(line) for line in (place / "scores" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 11
    export = ("export", "run", "--data", "own-*.csv", "--check-rows", "2", "--out", "again", "-q", "--json")
    again = unshot(*export, cwd=place)
    assert again.returncode == 0, again.stderr
    assert "not used" not in again.stderr


def test_the_old_prompt_is_counted_with_the_template_that_the_case_gives(
    tiny_model: Path, tmp_path: Path, unshot: Run
) -> None:
    shutil.copytree(tiny_model, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    own = config.pop("chat_template", None)
    own = own or (tmp_path / "base" / "chat_template.jinja").read_text()
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    text(tmp_path / "base" / "tokenizer_config.json", json.dumps(config))
    text(tmp_path / "own.jinja", own)
    old = {"role": "system", "content": "The long old prompt."}
    jsonl(
        tmp_path / "data.jsonl",
        [
            {
                "messages": [
                    old,
                    {"role": "user", "content": r["prompt"]},
                    {"role": "assistant", "content": r["completion"]},
                ]
            }
            for r in rows()
        ],
    )
    text(
        tmp_path / "unshot.toml", '[task]\ninstruction = "Classify."\n[tune]\nchat_template = "./own.jinja"\n'
    )
    done = unshot("tune", "data.jsonl", "--base", "base", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tokens less" in done.stderr


def test_what_chooses_the_best_epoch_is_part_of_what_a_resumed_run_goes_on_from(
    place: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, unshot: Run
) -> None:
    import tune.run

    found: list[str] = []

    def fingerprint(job: Any) -> dict[str, Any]:
        found.append(job.config.fingerprint)
        raise KeyboardInterrupt

    monkeypatch.setattr(tune.run, "forecast", fingerprint)
    jsonl(place / "validation.jsonl", [{"title": "x", "body": f"b {i}", "topic": "low"} for i in range(4)])
    command = ("tune", "--dry-run", "-q", "--validation", "validation.jsonl")
    for more in ((), (), ("--metric", "accuracy")):
        unshot(*command, *more, cwd=place)
    jsonl(place / "validation.jsonl", [{"title": "y", "body": f"b {i}", "topic": "low"} for i in range(4)])
    unshot(*command, cwd=place)
    assert found[0] == found[1]
    assert len(set(found)) == 3
