"""Rollouts of a good version and of two bad ones under live load, by themselves to the end.

    python -m tests.benchmarks.rollout_live [--hold 10s]

A real gateway with two workers, real requests and feedback, `unshot deploy rollout` as a process of its own. Only the
models are scripted: a `llama-server` that stands first on the PATH answers by what the version's model file says.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from deploy.registry.store import Registry
from tests.conftest import ROOT, command
from tests.deploy_cases import make_artifact, make_tuned
from tests.gateways import Running, gateway, scripted

FREE = '[task]\nname = "free"\ninstruction = "Be brief."\n'
VERSIONS = {
    1: {"fails": 0.01, "right": 0.9},
    2: {"fails": 0.01, "right": 0.9},
    3: {"fails": 0.35, "right": 0.9},
    4: {"fails": 0.01, "right": 0.5},
}


class Load:
    """Users who ask, and say whether the answer was right."""

    def __init__(self, running: Running, threads: int = 4) -> None:
        self.running = running
        self.statuses: Counter[int] = Counter()
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(n,), daemon=True) for n in range(threads)]

    def _ask(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.stop.is_set():
            answer = self.running.ask("hi", user=f"user {rng.randrange(20_000)}")
            self.statuses[answer.status] += 1
            if answer.status == 200:
                # The baseline is right as often as a good version.
                good = answer.text == "right" if answer.arm == "candidate" else rng.random() < 0.9
                token = answer.headers["x-unshot-feedback-token"]
                body = {"id": answer.headers["x-request-id"], "correct": good, "token": token}
                self.statuses[self.running.call("/v1/feedback", body).status] += 1
            time.sleep(0.01)

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(30)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hold", default="10s")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, scripted("baseline") as baseline:
        folder = Path(name)
        (folder / "free.toml").write_text(FREE)
        program = folder / "bin" / "llama-server"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.scripted "$@"\n')
        program.chmod(0o755)
        registry = Registry(folder / "store")
        for number, facts in VERSIONS.items():
            run = make_tuned(folder / f"run{number}", quality=True, forgetting=True, review=True)
            registry.add(
                make_artifact(folder / f"art{number}", json.dumps(facts).encode(), run=run), note=str(number)
            )
        registry.move("champion", 1, by="ada")
        registry.set_split(20, by="ada")
        env = {
            **os.environ,
            "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        arms = ["--case", "free.toml", "--baseline", baseline, "--store", "store", "--keep-warm", "2"]
        with (
            gateway(folder, *arms, "--log", "log", "--workers", 2, "--concurrency", 256,
                    wait=300.0, PATH=env["PATH"], PYTHONPATH=str(ROOT)) as running,
            Load(running) as load,
        ):  # fmt: skip
            faults = []
            for number, end in ((2, "done"), (3, "rolled back"), (4, "rolled back")):
                begin, before = time.monotonic(), registry.state()
                done = subprocess.run(
                    command(["deploy", "rollout", f"v{number}", "--store", "store", "--log", "log", "--case",
                             "free.toml", "--steps", "10,50,100", "--hold", given.hold, "--poll", "1", "--margin",
                             "0.05", "--least", "20", "--by", "ada"]),
                    cwd=folder, env=env, text=True, capture_output=True, timeout=400, check=False,
                )  # fmt: skip
                state = registry.state()
                assert state.rollout is not None
                expected = (
                    (100.0, number, 0) if end == "done" else (before.split, before.aliases["champion"], 1)
                )
                if (
                    state.split,
                    state.aliases["champion"],
                    done.returncode,
                ) != expected or state.rollout.state != end:
                    faults.append(
                        f"v{number}: {state.rollout}, exit code {done.returncode}: {done.stderr[-500:]}"
                    )
                print(
                    f"v{number} {VERSIONS[number]}: {state.rollout.state} after {time.monotonic() - begin:.0f} s"
                )
                for event in state.history[len(before.history) :]:
                    print(f"    {event.action} {event.subject}: {event.before} -> {event.after}; {event.why}")
                deadline = time.monotonic() + 10
                share = 1.0 if state.split is None else state.split / 100
                while (
                    abs(running.metric("unshot_candidate_share") - share) > 1e-6
                    and time.monotonic() < deadline
                ):
                    time.sleep(0.1)
        wrong = {status: count for status, count in load.statuses.items() if status != 200}
        print(f"answers and feedback by status: {dict(load.statuses)}; load average {os.getloadavg()}")
        print("\n".join(faults))
        raise SystemExit(bool(faults or wrong))


if __name__ == "__main__":
    main()
