"""`deploy ab` while the share is raised, units are lost, lines are torn, and requests fail for their own sake."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from deploy.ab.sequential import compare, compare_within, design, follow, looks
from deploy.ab.strata import sample_ratio, stratify
from deploy.answers import gather
from tests.logs import START, request, run_here
from unshot.contracts.request_log import Feedback, Request, Writer

Capture = pytest.CaptureFixture[str]


def ramp(
    generator: np.random.Generator, n: int, *, gap: float = 0.0, heavy: bool = False
) -> tuple[np.ndarray, ...]:
    """Traffic that becomes harder while the share goes 10 -> 50 -> 90%: value, unit, candidate, stratum."""
    stratum = np.repeat(np.arange(3), -(-n // 3))[:n]
    users = max(2, n // (20 if heavy else 2))
    weight = generator.pareto(1.5, users) + 1 if heavy else np.ones(users)
    unit = generator.choice(users, size=n, p=weight / weight.sum())
    position = generator.random(users)[unit]
    candidate = position < np.array([0.1, 0.5, 0.9])[stratum]
    skill = generator.normal(0, 0.15 if heavy else 0.0, users)[unit]
    season = 0.08 * np.sin(np.arange(n) / n * 25)
    chance = np.clip(np.array([0.9, 0.75, 0.55])[stratum] + skill + season + gap * candidate, 0.02, 0.98)
    return (generator.random(n) < chance).astype(float), unit, candidate, stratum


def called(value: Any, unit: Any, candidate: Any, stratum: Any, *, within: bool) -> int:
    """-1 baseline better, 1 candidate better, 0 neither, at any look."""
    if within:
        path = compare_within(value, unit, candidate, stratum, scale=0.5)
    else:
        path = compare(value, unit, candidate, scale=0.5)
    bounds = follow(path, mixing=design(0.05).mixing, alpha=0.05)
    return int(bounds.low[-1] > 0) - int(bounds.high[-1] < 0)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.slow
def test_a_ramp_under_harder_traffic_keeps_the_error_rate_which_pooling_does_not(heavy: bool) -> None:
    generator = np.random.default_rng(3)
    # Of few heavy users it takes more answers until a look counts.
    number, length = (40, 3000) if heavy else (80, 900)
    runs = [ramp(generator, length, heavy=heavy) for _ in range(number)]
    wrong = sum(called(*run, within=True) != 0 for run in runs)
    assert stats.binomtest(wrong, number, 0.05, alternative="greater").pvalue > 0.001, f"{wrong} of {number}"
    pooled = sum(called(*run, within=False) == -1 for run in runs[:20])
    assert pooled > 5, "pooled, the ramp alone makes the candidate look worse"


@pytest.mark.slow
def test_a_small_arm_that_is_right_by_luck_is_not_called_better() -> None:
    # 5% candidates, both arms right in 90%: by their own spread alone 19 of 300 were "candidate better", none worse.
    generator = np.random.default_rng(8)
    mixing = design(0.1).mixing
    better = 0
    for _ in range(300):
        candidate = generator.random(1500) < 0.05
        value = (generator.random(1500) < 0.9).astype(float)
        path = compare(value, np.arange(1500), candidate, scale=0.5)
        better += bool(follow(path, mixing=mixing, alpha=0.05).low[-1] > 0)
    assert stats.binomtest(better, 300, 0.025, alternative="greater").pvalue > 0.001, f"{better} of 300"


def test_a_small_arm_without_a_fault_borrows_the_spread_of_the_other_in_every_stratum() -> None:
    # Of 270 baselines 27 are wrong, of 30 candidates none; then the same again at another share.
    value = np.tile(np.concatenate([np.zeros(27), np.ones(273)]), 2)
    candidate = np.tile(np.arange(300) >= 270, 2)
    both = 27 * 0.9 / 298 * (1 / 270 + 1 / 30)
    once = compare(value[:300], np.arange(300), candidate[:300], scale=0.5)
    assert once.variance[-1] == pytest.approx(both)
    twice = compare_within(value, np.arange(600), candidate, np.repeat([0, 1], 300), scale=0.5)
    assert twice.difference[-1] == pytest.approx(0.1) and twice.variance[-1] == pytest.approx(both / 2)


def test_a_unit_with_most_of_the_answers_counts_as_few() -> None:
    # In each arm one user asks 200 times and 49 others once: no 50 voices, neither by one share nor by two.
    unit = np.concatenate([np.zeros(200, int), np.arange(1, 50), np.full(200, 50), np.arange(51, 100)])
    candidate, value = unit >= 50, np.random.default_rng(1).integers(2, size=498).astype(float)
    few = 249**2 / (200**2 + 49)
    once = compare(value, unit, candidate, scale=0.5)
    assert once.equal[-1] == pytest.approx(few)
    assert not np.isfinite(follow(once, mixing=0.01, alpha=0.05).low).any()
    twice = compare_within(
        np.tile(value, 40),
        np.tile(unit, 40),
        np.tile(candidate, 40),
        np.repeat(np.arange(40), 498),
        scale=0.5,
    )
    assert twice.equal[-1] == pytest.approx(few), "the same users in 40 parts are no more users"


@pytest.mark.slow
def test_a_real_difference_is_found_within_a_ramp() -> None:
    generator = np.random.default_rng(4)
    found = [called(*ramp(generator, 3000, gap=-0.15), within=True) for _ in range(10)]
    assert found.count(-1) >= 7 and 1 not in found


def test_within_one_stratum_both_ways_give_the_same_figures() -> None:
    generator = np.random.default_rng(5)
    unit = generator.integers(60, size=400)
    arm = generator.random(60)[unit] < 0.5
    value = (generator.random(400) < 0.8).astype(float)
    one = compare(value, unit, arm, scale=0.5)
    # A second stratum of one arm alone has no weight.
    more = np.concatenate([np.zeros(400, int), np.ones(20, int)])
    many = compare_within(
        np.append(value, np.ones(20)), np.append(unit, np.arange(100, 120)),
        np.append(arm, np.ones(20, bool)), more, scale=0.5,
    )  # fmt: skip
    assert many.difference[-1] == pytest.approx(one.difference[-1])
    assert many.variance[-1] == pytest.approx(one.variance[-1], rel=0.02)


def test_looks_of_a_longer_log_are_those_of_a_shorter_one() -> None:
    assert set(looks(700).tolist()[:-1]) <= set(looks(5000).tolist())
    assert looks(5)[-1] == 5 and looks(60_001)[-1] == 60_001 and len(looks(0)) == 0


def log_of(folder: Path, rows: list[Request]) -> Path:
    writer = Writer(folder)
    for row in rows:
        writer.write(row)
        if row.error is None:
            writer.write(Feedback(id=row.id, time=row.time + 1, correct=row.label == "a", by="reviewer"))
    return folder


def ramped(number: int, *, share: float | None = None, seed: int = 7) -> list[Request]:
    """Both arms equally right; harder traffic while the share goes from 10 to 90%."""
    generator = np.random.default_rng(seed)
    rows = []
    for n in range(number):
        late = n >= number // 2
        position = int(hashlib.sha256(f"{seed} {n}".encode()).hexdigest()[:8], 16) / 2**32
        candidate = position < (0.9 if late else 0.1)
        good = generator.random() < (0.55 if late else 0.95)
        known = (0.9 if late else 0.1) if share is None else None
        rows.append(request(n, assigned="candidate" if candidate else "baseline", share=known,
                            label="a" if good else "b", e2e_s=0.2, schema_ok=True))  # fmt: skip
    return rows


@pytest.mark.parametrize("old", [False, True])
def test_the_command_stratifies_and_says_by_what(tmp_path: Path, capsys: Capture, old: bool) -> None:
    folder = log_of(tmp_path / "log", ramped(1500, share=0.0 if old else None))
    done = run_here(capsys, "deploy", "ab", folder, "--json")
    report = json.loads(done.out)
    assert report["verdict"] == "keep going" and abs(report["metrics"]["quality"]["estimate"]) < 0.1
    assert ("by time" if old else "10%, 90%") in report["stratified"]
    shown = run_here(capsys, "deploy", "ab", folder)
    assert "compared within" in " ".join(shown.out.split())
    assert ("cannot be told" in " ".join(report["warnings"])) is old


def split_rows(baseline: int, candidate: int) -> list[Request]:
    rows = [request(n, share=0.5, label="a") for n in range(baseline)]
    return rows + [
        request(baseline + n, assigned="candidate", share=0.5, label="a") for n in range(candidate)
    ]


def test_a_sample_ratio_mismatch_withholds_the_verdict(tmp_path: Path, capsys: Capture) -> None:
    mismatch = sample_ratio(gather(split_rows(1500, 1290)))
    assert mismatch is not None and mismatch.found and mismatch.p == pytest.approx(7e-5, rel=0.2)
    fine = sample_ratio(gather(split_rows(1500, 1440)))
    assert fine is not None and not fine.found
    done = run_here(capsys, "deploy", "ab", log_of(tmp_path / "log", split_rows(1500, 1290)), "--json")
    report = json.loads(done.out)
    assert done.code == 1 and report["verdict"] == "no verdict: sample ratio mismatch"
    assert any("1,500 baseline and 1,290 candidate" in w for w in report["warnings"])


def test_strata_of_an_old_log_do_not_move_when_it_grows() -> None:
    rows = [request(n) for n in range(900)]
    short, long = stratify(gather(rows[:600])), stratify(gather(rows))
    assert long.codes[:600] == short.codes


def test_torn_and_foreign_lines_are_skipped_counted_and_reported(tmp_path: Path, capsys: Capture) -> None:
    folder = log_of(tmp_path / "log", split_rows(200, 200))
    path = next(folder.glob("requests-*.jsonl"))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    bad = [b"\xff\xfe\n", b"{}\n", b"[" * 5000 + b"\n", b'{"id": 3}\n', b"\n", b"null\n"]
    path.write_bytes(b"".join([*bad, *lines, b'{"id": "x", "ti']))
    done = run_here(capsys, "deploy", "ab", folder, "--json")
    report = json.loads(done.out)
    assert report["arms"]["baseline"]["requests"] == 200
    assert any("7 lines of the log cannot be read" in w for w in report["warnings"])
    assert "7 lines of the log" in done.err
    assert Writer(folder).cut == 1
    assert path.read_bytes() == b"".join([*bad, *lines])


def test_a_line_that_does_not_fit_on_the_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    writer = Writer(tmp_path / "log")
    writer.write(request(1))
    before = next((tmp_path / "log").glob("requests-*")).read_bytes()
    real = os.write
    calls: list[int] = []

    def full(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) == 1:
            return real(descriptor, data[:10])  # as a disk does that has ten bytes left
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unshot.data.files.os.write", full)
    with pytest.raises(OSError, match="No space"):
        writer.write(request(2))
    monkeypatch.undo()
    assert next((tmp_path / "log").glob("requests-*")).read_bytes() == before
    writer.write(request(3))
    assert Writer(tmp_path / "log").cut == 0


def test_requests_that_failed_for_their_own_sake_count_in_no_arm(tmp_path: Path, capsys: Capture) -> None:
    rows = split_rows(150, 150)
    for n in range(40):
        rows.append(
            request(1000 + n, assigned="candidate", share=0.5, time=START + 1, error="http 400",
                    request_fault=True)
        )  # fmt: skip
    report = json.loads(run_here(capsys, "deploy", "ab", log_of(tmp_path / "log", rows), "--json").out)
    assert report["metrics"]["failures"]["candidate"]["mean"] == 0
    assert any("40 requests failed for their own sake" in w for w in report["warnings"])
