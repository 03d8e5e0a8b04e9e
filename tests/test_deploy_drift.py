"""`unshot deploy drift`: planted shifts are found and named, nothing is found where nothing changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from deploy.drift import features
from deploy.drift.looks import Schedule, ends
from deploy.drift.sample import from_texts
from deploy.drift.slices import find, verdicts
from tests.logs import START, request, run_here, split_log
from unshot.contracts.request_log import Feedback, Request, Writer
from unshot.data.rows import write_jsonl
from unshot.engines.embedder import Embedder, Hashed
from unshot.metrics.intervals import holm

Capture = pytest.CaptureFixture[str]
BANK = (
    "how do I {} my card",
    "why was my {} declined today",
    "I want to {} money to another account",
    "where is the {} that I ordered last week",
    "can I {} in a foreign currency",
)
VERBS = (
    "activate",
    "top up",
    "transfer",
    "withdraw",
    "freeze",
    "cancel",
    "refund",
    "exchange",
    "verify",
    "change",
)


def bank_questions(count: int) -> list[str]:
    return [f"{BANK[i % 5].format(VERBS[i // 5 % 10])} {'please ' * (i % 3)}{i}" for i in range(count)]


@pytest.fixture(scope="module")
def texts(clauses: list[dict[str, Any]]) -> list[str]:
    """The demo's clauses in a random order."""
    order = np.random.default_rng(3).permutation(len(clauses))
    return [clauses[i]["prompt"] for i in order]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("reference") / "train.jsonl"
    write_jsonl(path, [{"prompt": t, "completion": "x"} for t in texts[:160]])
    return path


def write_log(folder: Path, inputs: Sequence[str], *, start: int = 0, **fields: Any) -> Path:
    writer = Writer(folder)
    for number, text in enumerate(inputs, start):
        line = request(number, assigned="candidate", input=text, input_words=len(text.split()), **fields)
        writer.write(line)
    return folder


OPTIONS = ("--window", "60", "--every", "20", "--looks", "20", "--json", "-q")


def drift(capsys: Capture, *arguments: str | Path) -> tuple[int, dict[str, Any]]:
    done = run_here(capsys, "deploy", "drift", *arguments, *OPTIONS)
    return done.code, json.loads(done.out)


@pytest.mark.slow
def test_a_planted_shift_is_found_soon_and_no_earlier(
    capsys: Capture, texts: list[str], reference: Path, tmp_path: Path
) -> None:
    log = write_log(tmp_path / "log", [*texts[160:300], *bank_questions(60)])
    code, report = drift(capsys, log, "--reference", reference, "--out", tmp_path / "report")
    assert code == 1 and report["verdict"] == "drift"
    assert 140 < report["found"]["requests"] <= 180
    last = report["looks"][-1]["shifts"]
    assert {"length", "vocabulary", "embedding"} <= {s["feature"] for s in last if s["drift"]}
    details = {s["feature"]: s["detail"] for s in last}
    assert "AUC 1.00" in details["embedding"] and "money" in details["embedding"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<svg" in page and "Drift was found" in page


@pytest.mark.slow
def test_looks_are_taken_once_and_a_call_more_often_spends_nothing(
    capsys: Capture, texts: list[str], reference: Path, tmp_path: Path
) -> None:
    log = write_log(tmp_path / "log", texts[160:240])
    code, first = drift(capsys, log, "--reference", reference)
    assert code == 0 and [x["end"] for x in first["looks"]] == [60, 80]
    _, again = drift(capsys, log, "--reference", reference)
    assert again["new_looks"] == 0 and again["looks"] == first["looks"]
    write_log(log, texts[240:285], start=80)
    _, more = drift(capsys, log, "--reference", reference)
    assert more["new_looks"] == 2 and more["looks"][:2] == first["looks"]
    done = run_here(capsys, "deploy", "drift", log, "--reference", reference, *OPTIONS, "--alpha", "0.2")
    assert done.code == 2 and "another alpha" in done.err
    code, new = drift(capsys, log, "--reference", reference, "--alpha", "0.2", "--restart")
    assert new["new_looks"] == 4


@pytest.mark.slow
def test_without_a_reference_the_first_requests_are_it(
    capsys: Capture, texts: list[str], tmp_path: Path
) -> None:
    log = write_log(tmp_path / "log", [*texts[:240], *bank_questions(60)])
    code, report = drift(capsys, log, "--settle", "100")
    assert code == 1 and 240 < report["found"]["requests"] <= 280
    assert report["looks"][0]["end"] == 160


def test_a_log_without_texts_still_tells_length_answers_and_failures(capsys: Capture, tmp_path: Path) -> None:
    writer, generator = Writer(tmp_path / "log"), np.random.default_rng(1)
    for number in range(300):
        late = number >= 220
        line = request(
            number, input_words=int(generator.poisson(20)), label="b" if late and number % 2 else "a"
        )
        line.schema_ok = not (late and number % 3 == 0)
        line.logprob = -float(generator.gamma(1, 0.6 if late else 0.2))
        writer.write(line)
    code, report = drift(capsys, tmp_path / "log", "--settle", "100")
    assert code == 1
    found = {s["feature"] for look in report["looks"] for s in look["shifts"] if s["drift"]}
    assert found == {"labels", "failures", "uncertainty"}
    assert {s["feature"] for s in report["looks"][-1]["shifts"]} == {"length", *found}


def test_a_report_that_cannot_be_written_costs_no_look(capsys: Capture, tmp_path: Path) -> None:
    log = split_log(tmp_path / "log", 400, right=(0.9, 0.9))
    line = ("deploy", "drift", log, "--window", "40", "--settle", "40", "--state", tmp_path / "state.json")
    (tmp_path / "file").write_text("a thesis")
    assert run_here(capsys, *line, "--out", tmp_path / "file").code == 2
    assert not (tmp_path / "state.json").exists()
    assert run_here(capsys, *line, "--out", tmp_path / "out").code in (0, 1)
    assert (tmp_path / "out" / "drift.json").exists()


def test_too_few_requests_is_an_answer_too(capsys: Capture, texts: list[str], tmp_path: Path) -> None:
    code, report = drift(capsys, write_log(tmp_path / "log", texts[:30]))
    assert code == 0 and report["verdict"] == "too early"
    done = run_here(capsys, "deploy", "drift", tmp_path / "log", "--reference", tmp_path / "none.jsonl")
    assert done.code == 2 and "none.jsonl" in done.err
    done = run_here(capsys, "deploy", "drift", tmp_path / "log", "--arm", "baseline")
    assert done.code == 2 and "no requests of the arm `baseline`" in done.err


@pytest.mark.slow
def test_tests_cry_out_no_more_often_than_they_say_where_nothing_changed() -> None:
    """p-values below 0.05 on exchangeable texts and answers, at most some 5% of the time, every feature apart."""
    generator, embed = np.random.default_rng(5), Hashed()
    weights = 1 / np.arange(1, 401)
    vocabulary = [f"w{i}" for i in range(400)]
    pool = [
        " ".join(generator.choice(vocabulary, size=generator.integers(5, 20), p=weights / weights.sum()))
        for _ in range(800)
    ]
    inputs = from_texts(pool, embed)
    lines = [
        request(
            n, label="abcde"[int(generator.choice(5, p=[0.5, 0.3, 0.1, 0.07, 0.03]))],
            schema_ok=bool(generator.random() > 0.05), logprob=-float(generator.gamma(1, 0.3)),
        )
        for n in range(800)
    ]  # fmt: skip
    low: dict[str, int] = {}
    rounds = 100
    for number in range(rounds):
        rows = generator.permutation(800)
        found = features.input_shifts(inputs.take(rows[:200]), inputs.take(rows[200:280]), embed, seed=number)
        found += features.output_shifts([lines[i] for i in rows[:200]], [lines[i] for i in rows[200:280]])
        assert len(found) == 6
        for shift in found:
            low[shift.feature] = low.get(shift.feature, 0) + (shift.p <= 0.05)
    for name, count in low.items():
        assert stats.binomtest(count, rounds, 0.05, alternative="greater").pvalue > 0.001, f"{name}: {count}"


def test_looks_fall_on_fixed_counts_and_share_the_error_rate() -> None:
    schedule = Schedule(window=100, every=25, settle=200, alpha=0.01, looks=100)
    assert ends(180, schedule, 0, own_reference=False) == [100, 125, 150, 175]
    assert ends(180, schedule, 130, own_reference=False) == [150, 175]
    assert ends(330, schedule, 0, own_reference=True) == [300, 325]
    assert schedule.spent == pytest.approx(1e-4)
    shifts = [features.Shift(n, p, "") for n, p in (("a", 0.01), ("b", 0.04), ("c", 0.03))]
    assert holm([s.p for s in shifts]) == pytest.approx([0.03, 0.06, 0.06])


def judged(number: int, good: bool, **fields: Any) -> tuple[Request, Feedback]:
    line = request(number, label="a", **fields)
    return line, Feedback(id=line.id, time=START, correct=good)


@pytest.mark.slow
def test_slices_in_which_the_model_is_worse_are_named_and_others_are_not(texts: list[str]) -> None:
    generator = np.random.default_rng(2)
    inputs = [*texts[:150], *bank_questions(60)]
    rows = []
    for number, text in enumerate(inputs):
        bad = generator.random() < (0.6 if number >= 150 else 0.1)
        tag = "mobile" if number >= 150 else "web" if number % 2 else "app"
        rows.append(judged(number, not bad, input=text, slice=tag))
    lines, said = [r[0] for r in rows], {f.id: f for _, f in rows}
    what, bad_rows = verdicts(lines, said, None)
    assert what == "wrong"
    found = find(lines, from_texts(inputs, Hashed()), bad_rows, None)
    named = [s.name for s in found if s.worse]
    assert "slice mobile" in named
    assert any(n == "inputs about declined, today, please" for n in named)
    assert not {"slice web", "slice app"} & set(named)


def test_without_feedback_slices_are_judged_by_failures() -> None:
    lines = [request(n, schema_ok=n % 4 != 0, slice="x" if n % 4 == 0 else "y") for n in range(80)]
    what, bad = verdicts(lines, {}, None)
    assert what == "failed" and bad.sum() == 20
    inputs = from_texts(["a b"] * 80, Hashed())
    assert [s.name for s in find(lines, inputs, bad, None) if s.worse] == ["slice x"]


def test_sentence_embeddings_of_a_local_model_can_stand_in(tiny_model: Path, texts: list[str]) -> None:
    embed = Embedder(tiny_model)
    rows = embed([*texts[:40], *texts[:1]])
    assert rows.shape == (41, 64)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)
    assert np.allclose(rows[0], rows[40], atol=0.02), "padding changes nothing"


def days(folder: Path, number: int, *, shift: int | None = None) -> Path:
    """A log of some days: long questions by day, short ones by night, other labels; `shift`: a day without night."""
    generator = np.random.default_rng(6)
    writer = Writer(folder)
    for n in range(number * 240):
        hour = n % 240 / 10
        day = 8 <= hour < 20 or (shift is not None and n >= shift * 240)
        words = int(generator.integers(25, 40) if day else generator.integers(3, 8))
        label = "a" if generator.random() < (0.8 if day else 0.2) else "b"
        text = " ".join(generator.choice(VERBS, size=words))
        writer.write(
            request(
                n, input=text, label=label, schema_ok=True, time=1_789_948_800 + 360.0 * n, arm="candidate"
            )
        )
    return folder


@pytest.mark.slow
def test_day_and_night_are_no_drift_where_like_hours_are_compared(capsys: Capture, tmp_path: Path) -> None:
    folder = days(tmp_path / "log", 4)
    plain = run_here(capsys, "deploy", "drift", folder, "--window", "60", "--json", "--state", tmp_path / "a")
    assert plain.code == 1, "without a season every night is drift"
    line = ["deploy", "drift", folder, "--window", "60", "--season", "day", "--json"]
    done = run_here(capsys, *line, "--state", tmp_path / "b")
    report = json.loads(done.out)
    assert done.code == 0 and report["verdict"] == "no drift" and len(report["looks"]) > 20
    assert "day" in report["reference"] and all(look["shifts"] for look in report["looks"])
    other = days(tmp_path / "other", 4, shift=3)
    done = run_here(capsys, "deploy", "drift", other, "--window", "60", "--season", "day", "--json")
    assert done.code == 1 and json.loads(done.out)["found"]["requests"] > 3 * 240


def test_a_season_needs_its_own_reference_and_a_whole_one(capsys: Capture, tmp_path: Path) -> None:
    folder = days(tmp_path / "log", 1)
    done = run_here(capsys, "deploy", "drift", folder, "--season", "day", "--json")
    assert done.code == 0 and json.loads(done.out)["verdict"] == "too early"
    done = run_here(capsys, "deploy", "drift", folder, "--season", "day", "--reference", tmp_path / "x")
    assert done.code == 2 and "--reference" in done.err
