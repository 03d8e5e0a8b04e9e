"""What is accepted does something: every value of every enumerated key, and the file of `unshot init`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest

from planner.oneoff import example_cost
from planner.verdict import judge_case
from tests.conftest import ROOT, run_unshot
from tests.planner_files import few_shot, inputs, model_folder
from tune.model import default_alpha, rate_factor, uses_bf16
from unshot import catalog, models
from unshot.case import PlanSettings, TaskSettings, TuneSettings
from unshot.case_file import keys, load_case
from unshot.catalog.formats import FORMATS, known, parse_targets
from unshot.console import Output
from unshot.engines.registry import ENGINES
from unshot.errors import InputError, OutsideError
from unshot.init import template
from unshot.methods import METHODS
from unshot.metrics.answers import Answers
from unshot.metrics.registry import METRICS
from unshot.metrics.scores import value_of
from unshot.reference import reference
from unshot.text.chat import Chat, load_tokenizer

DEMO = ROOT / "unshot" / "demo"
REFERENCES = [
    '{"a": "US", "b": "red car"}',
    '{"a": "UK", "b": "blue car"}',
    '{"a": "US", "b": "old blue van"}',
]
GIVEN = ['{"a": "US", "b": "red car"}', '{"a": "US", "b": "blue car"}', '{"a": "US", "b":  "old blue van"}']


def metric(name: str) -> object:
    """A score that no other metric gives, or the refusal of one that needs what is not here."""
    answers = Answers(REFERENCES, GIVEN, answer_field="a")
    missing = METRICS[name].problem(answers)
    if missing:
        assert set(METRICS[name].needs) & {"embedder", "judge"}, f"{name}: {missing}"
        return missing
    return round(value_of(name, answers), 6)


def method(name: str) -> object:
    entry = METHODS[name]
    return (entry.trains, entry.implementation, entry.four_bit, entry.whole)


def precision(name: str) -> object:
    """On which devices products are in bf16, where the CPU has none in hardware."""
    settings = TuneSettings(dtype=name)  # type: ignore[arg-type]
    with mock.patch("tune.model.cpu_has_bf16", return_value=False):
        return [uses_bf16(settings, device) for device in ("cpu", "cuda")]


def beginning(name: str) -> object:
    """How an adapter of this beginning scales its change."""
    settings = TuneSettings(init=name, rank=64)  # type: ignore[arg-type]
    return name == "rslora", default_alpha(settings)


def loss_tokens(value: str) -> object:
    """How many tokens of a conversation carry loss."""
    with TemporaryDirectory() as folder:
        chat = Chat(load_tokenizer(model_folder(Path(folder) / "base")))
    talk = [{"role": r, "content": "late fee"} for r in ("user", "assistant", "user")]
    return sum(stop - start for start, stop in chat.encode(talk, "payment", every=value == "all").spans)


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Any]:
    """A small plan's options, by flags."""
    prompt, rows = few_shot(tmp_path / "shots.jsonl", 12), inputs(tmp_path / "inputs.jsonl")

    def run(*flags: str) -> Any:
        done = run_unshot(
            "plan", "--prompt", prompt, "--inputs", rows, "--baseline", "gpt-4o", "--approximate", "--rate", "5",
            "--model", "llama-3.1-8b", "--gpu", "l4", *flags, "--json", "-q", cwd=tmp_path,
        )  # fmt: skip
        if done.returncode == 2:
            return done.stderr
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["options"]

    return run


EFFECTS: dict[str, Callable[[str], object]] = {
    "task.metric": metric,
    "task.fails": lambda v: repr(judge_case(TaskSettings(fails=[v]), shots=20, economics=None)),
    "plan.labels_by": lambda v: example_cost(PlanSettings(labels_by=v)),  # type: ignore[arg-type]
    "tune.method": method,
    "tune.init": beginning,
    "tune.loss_on": loss_tokens,
    "tune.dtype": precision,
    "tune.schedule": lambda v: [rate_factor(step, 100, v) for step in (0, 6, 30, 99)],
}
PLANNED = {"candidate.engine": "--engine", "candidate.kv_cache": "--kv-cache"}


def test_no_enumerated_key_is_left_out() -> None:
    enumerated = {name for name, key in keys().items() if key.accepted()}
    assert enumerated == {*EFFECTS, *PLANNED}


@pytest.mark.parametrize("name", sorted(EFFECTS))
def test_every_accepted_value_changes_something(name: str) -> None:
    found = {value: EFFECTS[name](value) for value in keys()[name].accepted()}
    same = [(a, b) for a in found for b in found if a < b and found[a] == found[b]]
    # What the verdict says first is one of several grounds: two of them may lead to the same answer.
    if name == "task.fails":
        assert all(
            result != repr(judge_case(TaskSettings(), shots=20, economics=None)) for result in found.values()
        )
        return
    assert not same, found


@pytest.mark.parametrize("name", sorted(PLANNED))
@pytest.mark.slow
def test_every_accepted_value_changes_the_forecast_or_is_refused(name: str, plan: Callable[..., Any]) -> None:
    found = {value: plan(PLANNED[name], value) for value in keys()[name].accepted()}
    forecasts = [json.dumps(v) for v in found.values() if not isinstance(v, str)]
    assert len(set(forecasts)) == len(forecasts) > 0


@pytest.mark.parametrize("text", known())
def test_every_export_format_is_a_target_with_an_engine(text: str) -> None:
    (target,) = parse_targets([text])
    assert str(target) == text and target.engine in ENGINES


def test_what_is_accepted_is_what_is_documented() -> None:
    pages = [template(), reference()]
    for key in keys().values():
        for value in key.accepted():
            assert all(value in page for page in pages), (key.name, value)
    for kind in FORMATS:
        assert all(f"{kind}:" in page for page in pages), kind


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that `unshot init` writes, with the data that it names beside it."""
    monkeypatch.chdir(tmp_path)
    assert run_unshot("init", cwd=tmp_path).returncode == 0
    for name in ("few_shot.jsonl", "data.jsonl"):
        shutil.copy(DEMO / name, tmp_path / name)
    return tmp_path / "unshot.toml"


def hub(asked: list[str], folder: Path | None) -> Callable[..., str]:
    """A model hub that has one model under every name, or is not there."""

    def download(name: str, **_: object) -> str:
        asked.append(name)
        if folder is None:
            raise ConnectionError("no route to host")
        return str(folder)

    return download


def test_the_file_of_init_is_accepted_by_every_stage(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub(asked, None))
    stages = {
        ("plan", "--approximate"): 0,
        ("data", "check", "data.jsonl"): 0,
        # Accepted: it is the hub that is not there.
        ("tune", "--dry-run"): 3,
        ("export", "meta-llama/Llama-3.1-8B-Instruct", "--out", "x"): 3,
        ("bench", "--baseline", "gguf:a", "--candidate", "gguf:b", "--out", "x"): 2,
    }
    for words, code in stages.items():
        done = run_unshot(*words, cwd=case.parent)
        assert done.returncode == code, f"{words}: {done.stderr}"
        assert "unshot.toml:" not in done.stderr, done.stderr
    assert set(asked) == {"meta-llama/Llama-3.1-8B-Instruct"}
    assert load_case(case).tune == TuneSettings()


@pytest.mark.parametrize("name", ["llama-3.1-8b", "meta-llama/Llama-3.1-8B", "qwen2.5-7b"])
def test_a_name_of_the_catalog_is_its_repository(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / file).write_text("{}")
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub(asked, tmp_path))
    found = models.resolve(name, Output())
    repository = catalog.model(name).repo
    assert asked == [repository] and found.path == tmp_path
    assert name == repository or f"{name}: {repository} on the model hub" in capsys.readouterr().err


def test_an_unknown_name_names_the_nearest_and_no_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub([], None))
    with pytest.raises(InputError, match=r"did you mean llama-3\.1-8b"):
        models.resolve("llama-3.1-9b")
    with pytest.raises(OutsideError, match="could not be had from the model hub"):
        models.resolve("llama-3.1-8b")
