"""Kills (-9) at any moment of add, promote, rollback, rollout and log writes: nothing is lost, history and alias agree.

python -m tests.benchmarks.kill_registry [--kills 200]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from deploy.registry.store import Registry
from deploy.rollout.run import begin, go_on, take_back
from tests.deploy_cases import make_artifact, make_tuned
from unshot.contracts.registry import State
from unshot.contracts.request_log import Request, Writer


def work(registry: Registry, log: Path, spare: Path) -> None:
    """Change the registry and write log lines without end, saying what is begun and done."""
    writer = Writer(log)
    say("go")
    for n in itertools.count():
        state = registry.state()
        if n % 3 == 0:
            made = make_artifact(spare / f"{os.getpid()}-{n}", os.urandom(200_000))
            say("adding")
            version, _ = registry.add(made)
            say(f"added {version.number}")
        running = state.rollout is not None and state.rollout.state == "running"
        say("changing")
        if running and n % 4:
            what = "step"
            go_on(registry, 2, "x", 0.0)
        elif running:
            what = "back"
            take_back(registry, 2, "x")
        elif state.aliases.get("champion") == 2:
            what = "rollback"
            registry.rollback(by="x")
        elif n % 2:
            what = "rollout"
            begin(registry, 2, [10.0, 50.0, 100.0], 1.0, by="x", waivers={}, now=time.time())
        else:
            what = "promote"
            registry.move("champion", 2 if state.aliases.get("champion") != 2 else 1, by="x")
        say(f"{what} {len(registry.state().history)}")
        for m in range(20):
            name = f"{os.getpid()}-{n}-{m}"
            writer.write(Request(name, time.time(), "baseline", "v1", "u", "baseline"))
            say(f"wrote {name}")


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


@dataclass
class Killed:
    """What the kills came upon, and what was wrong after them."""

    at: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    history: int = 0
    versions: int = 0
    lines: int = 0
    torn: int = 0


def prepared(folder: Path) -> Registry:
    """v1 is the champion at 40%, v2 is ready."""
    found = Registry(folder / "store")
    for n in (1, 2):
        run = make_tuned(folder / f"run{n}", quality=True, forgetting=True, review=True)
        found.add(make_artifact(folder / f"art{n}", b"%d" % n, run=run))
    found.move("champion", 1, by="ada")
    found.set_split(40, by="ada")
    return found


def disagreement(state: State) -> str | None:
    """How alias and history disagree: the champion must be what the last change of it says."""
    champion: int | None = None
    for event in state.history:
        if event.subject == "champion":
            champion = int(event.after[1:]) if event.after is not None else None
        elif event.action == "rollout" and (
            event.before in (None, "none") or str(event.before).startswith("v")
        ):
            champion = int(event.subject[1:])
    if state.aliases.get("champion") != champion:
        return f"the champion is {state.aliases.get('champion')}, by the history v{champion}"
    if set(state.versions) != {int(e.subject[1:]) for e in state.history if e.action == "add"}:
        return "versions and their additions differ"
    return None


def kills(folder: Path, count: int, seed: int = 9) -> Killed:
    """Kill a process at work `count` times, and look after each."""
    rng, found = random.Random(seed), Killed()
    registry, log = prepared(folder), folder / "log"
    written: set[str] = set()
    for number in range(count):
        said = folder / "said.txt"
        said.write_bytes(b"")
        child = os.fork()  # as a process of its own, without its imports
        if not child:
            os.dup2(os.open(said, os.O_WRONLY), 1)
            try:
                work(registry, log, folder / "spare")
            except BaseException as error:
                say(f"{type(error).__name__}: {error}")
            os._exit(1)
        # By what it has done and not by the clock, so that a busy machine kills at the same places.
        # Every other kill meets an addition: they are few among log lines, and last for longest.
        mark, enough = (b"adding\n", rng.randrange(1, 3)) if number % 2 else (b"\n", rng.randrange(1, 120))
        while said.read_bytes().count(mark) < enough:
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.01))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        lines = said.read_text().splitlines()
        if not os.WIFSIGNALED(status):
            found.faults.append(f"kill {number}: the process had ended by itself: {lines[-3:]}")
            continue
        found.at[lines[-1].split()[0]] += 1
        written |= {line.split()[1] for line in lines if line.startswith("wrote ")}
        found.faults += [f"kill {number}: {fault}" for fault in after(registry, log, lines, written, found)]
    found.history, found.versions = len(registry.state().history), len(registry.state().versions)
    for version in registry.state().versions:
        registry.verified(version)  # raises where a file is not what was added
    return found


def after(registry: Registry, log: Path, lines: list[str], written: set[str], found: Killed) -> list[str]:
    """What is wrong after a kill, given what the process had said it had done."""
    faults = []
    state = registry.state()
    if (wrong := disagreement(state)) is not None:
        faults.append(wrong)
    done = [line.split() for line in lines]
    known = [
        int(words[1]) for words in done if words[0] in ("step", "back", "rollback", "rollout", "promote")
    ]
    if known and len(state.history) < max(known):
        faults.append(f"the history has {len(state.history)} lines, it had {max(known)}")
    faults += [
        f"{words} is lost" for words in done if words[0] == "added" and int(words[1]) not in state.versions
    ]
    if log.is_dir():
        found.torn += Writer(log).cut  # as the next gateway does
        entries = []
        for path in log.glob("requests-*.jsonl"):
            entries += [json.loads(line)["id"] for line in path.read_bytes().splitlines()]
        found.lines = len(entries)
        if written - set(entries):
            faults.append(f"{len(written - set(entries))} log lines are lost")
        if len(entries) != len(set(entries)):
            faults.append("a log line is there twice")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = kills(Path(name), given.kills)
    print(f"{given.kills} kills, the last thing said before: {dict(found.at)}")
    print(
        f"{found.versions} versions, {found.history} lines of history, {found.lines} log lines, {found.torn} torn "
        f"lines cut, {len(found.faults)} faults"
    )
    print("\n".join(found.faults))
    raise SystemExit(bool(found.faults))


if __name__ == "__main__":
    main()
