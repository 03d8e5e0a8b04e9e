"""`unshot deploy rollout`: good and bad versions by themselves to the end, restarts, other hands, and kills."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from deploy.registry.store import Registry
from deploy.rollout.run import Bounds, begin, go_on, parse_hold, parse_steps, rollout_run, take_back
from tests.benchmarks.kill_registry import disagreement, kills, prepared
from tests.deploy_cases import make_artifact
from tests.logs import request, run_here
from unshot.console import Output
from unshot.contracts.registry import Rollout, State
from unshot.contracts.request_log import Feedback, Writer
from unshot.errors import InputError

STEPS = [10.0, 50.0, 100.0]


@pytest.fixture()
def registry(tmp_path: Path) -> Registry:
    return prepared(tmp_path)


class World:
    """Time and traffic: each pause brings requests by the share of the moment."""

    def __init__(
        self, registry: Registry, folder: Path, *, fails: float = 0.01, slow: float = 1.0, right: float = 0.9
    ):
        self.registry, self.writer = registry, Writer(folder)
        self.fails, self.slow, self.right = fails, slow, right
        self.now = time.time()
        self.count = 0
        self.generator = np.random.default_rng(8)
        self.stop_after: int | None = None

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        if self.stop_after is not None:
            self.stop_after -= 1
            if self.stop_after < 0:
                raise KeyboardInterrupt
        state = self.registry.state()
        share = (state.split or 0) / 100
        for _ in range(60):
            self.now += seconds / 60
            self.count += 1
            candidate = self.generator.random() < share
            broken = self.generator.random() < (self.fails if candidate else 0.01)
            took = float(self.generator.lognormal(0, 0.2)) * (self.slow if candidate else 1)
            line = request(
                self.count, time=self.now, assigned="candidate" if candidate else "baseline", share=share,
                version=f"v{state.aliases.get('champion')}" if candidate else "old", e2e_s=took,
                error="timeout" if broken else None, label="a",
            )  # fmt: skip
            self.writer.write(line)
            good = self.generator.random() < (self.right if candidate else 0.9)
            self.writer.write(Feedback(id=line.id, time=self.now, correct=bool(good), by="reviewer"))

    def run(self, bounds: Bounds = Bounds(margin=0.05)) -> Rollout:  # noqa: B008 (frozen)
        under_way = begin(self.registry, 2, STEPS, 600.0, by="ada", waivers={}, now=self.now)
        return rollout_run(
            self.registry, under_way, self.writer.folder, bounds, Output(verbosity=-1), task=None, poll=60.0,
            clock=self.clock, sleep=self.sleep,
        )  # fmt: skip


def consistent(state: State) -> None:
    """Alias and history agree."""
    assert disagreement(state) is None


@pytest.mark.slow
def test_a_good_version_reaches_everybody_by_itself(registry: Registry, tmp_path: Path) -> None:
    over = World(registry, tmp_path / "log").run()
    state = registry.state()
    assert (over.state, state.split, state.aliases["champion"]) == ("done", 100.0, 2)
    steps = [(e.before, e.after) for e in state.history if e.action == "rollout"]
    assert steps == [("v1", "10%"), ("10%", "50%"), ("50%", "100%"), ("100%", "done")]
    consistent(state)
    assert registry.rollback(by="ada").after == "v1"


@pytest.mark.parametrize("fault", ["fails", "slow", "wrong"])
def test_a_bad_version_is_taken_back_by_itself(registry: Registry, tmp_path: Path, fault: str) -> None:
    bad = {"fails": {"fails": 0.5}, "slow": {"slow": 3.0}, "wrong": {"right": 0.3}}[fault]
    over = World(registry, tmp_path / "log", **bad).run()
    state = registry.state()
    assert over.state == "rolled back" or (state.rollout is not None and state.rollout.state == "rolled back")
    assert (state.split, state.aliases["champion"]) == (40.0, 1)
    word = {"fails": "fails more often", "slow": "times as long", "wrong": "share right"}[fault]
    assert any(e.action == "rollback" and word in e.why for e in state.history)
    consistent(state)


@pytest.mark.slow
def test_a_rollout_goes_on_where_it_was_ended(registry: Registry, tmp_path: Path) -> None:
    world = World(registry, tmp_path / "log")
    ended = 0
    while True:
        world.stop_after = 4
        try:
            over = world.run()
            break
        except KeyboardInterrupt:
            ended += 1
    assert over.state == "done" and ended > 3
    assert [e.after for e in registry.state().history if e.action == "rollout"] == [
        "10%",
        "50%",
        "100%",
        "done",
    ]


def test_too_little_traffic_holds_the_step(registry: Registry, tmp_path: Path) -> None:
    world = World(registry, tmp_path / "log")
    world.stop_after = 15
    with pytest.raises(KeyboardInterrupt):
        world.run(Bounds(margin=0.05, least=100_000))
    found = registry.state().rollout
    assert found is not None and (found.state, found.step) == ("running", 0)


def test_other_hands_end_a_rollout(registry: Registry) -> None:
    for end in ("split", "rollback", "promote"):
        begin(registry, 2, STEPS, 60.0, by="ada", waivers={}, now=time.time())
        with pytest.raises(InputError, match="under way"):
            begin(registry, 2, [1.0, 100.0], 60.0, by="ada", waivers={}, now=time.time())
        if end == "split":
            registry.set_split(5, by="bob")
        elif end == "rollback":
            assert registry.rollback(by="bob").after == "v1"
        else:
            registry.move("champion", 1, by="bob")
        found = registry.state().rollout
        assert found is not None and found.state == "stopped" and "bob" in found.why
        with pytest.raises(InputError, match="over"):
            go_on(registry, 2, "x", 0.0)
        with pytest.raises(InputError, match="over"):
            take_back(registry, 2, "x")
        if registry.state().aliases["champion"] == 2:
            registry.move("champion", 1, by="ada")


def test_command_line(registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log").mkdir()
    line = ["deploy", "rollout", "v2", "--store", registry.folder, "--log", tmp_path / "log"]
    for more, word in (
        (["--steps", "10,5,100"], "rising percents"), (["--steps", "1,10"], "end with 100"),
        (["--steps", "nan,100"], "rising"),
        (["--hold", "30"], "30m"), (["--hold", "-1m"], "30m"), (["--hold", "nand"], "30m"),
        (["--log", tmp_path / "no"], "no such directory"),
    ):  # fmt: skip
        done = run_here(capsys, *line, *more)
        assert done.code == 2 and word in done.err, done.err
    assert registry.state().rollout is None
    registry.add(make_artifact(tmp_path / "art3", b"3"))
    done = run_here(capsys, "deploy", "rollout", "v3", *line[3:])
    assert done.code == 1 and "cannot become champion" in done.err
    assert parse_steps("1%,10,100") == [1, 10, 100] and parse_hold("90s") == 90 and parse_hold("1.5h") == 5400


@pytest.mark.slow
def test_kills_anywhere_lose_nothing_and_history_and_alias_agree(tmp_path: Path) -> None:
    found = kills(tmp_path, 10)
    assert not found.faults, found.faults
    assert found.history > 15 and found.lines > 20 and len(found.at) > 1
