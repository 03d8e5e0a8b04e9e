"""Promotions and rollbacks under steady load: what fails, what a mixed version answers, and how long each takes.

    python -m tests.benchmarks.bench_switch BASE.gguf V1.gguf V2.gguf [--switches 20] [--clients 2] [--keep-warm 0]

Each client asks without a pause over one kept connection. An answer is right where its text is what the version in its
`x-unshot-version` header answers to that prompt when it is asked alone, without the gateway; the versions differ in
weights and in their short prompt.
"""

from __future__ import annotations

import argparse
import functools
import http.client
import json
import statistics
import subprocess
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.registry import Registry
from tests.conftest import command
from tests.deploy_cases import make_artifact
from tests.gateways import Running, gateway, until
from unshot.contracts.registry import Waiver
from unshot.engines.server import LocalServer, free_port, server_command

JSON = {"Content-Type": "application/json"}
PROMPTS = ["Fees are due in 30 days.", "No cap applies.", "Either party may end it.", "Data may be sold."]
WAIVED = {g: Waiver(gate=g, reason="a load test", by="bench") for g in ("quality", "forgetting", "review")}


@dataclass
class Load:
    """What the clients saw."""

    answers: list[tuple[float, str, str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def client(self, port: int, offset: int, max_tokens: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        number = offset
        while not self.stop.is_set():
            prompt = PROMPTS[number % len(PROMPTS)]
            number += 1
            body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens}
            try:
                connection.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
                response = connection.getresponse()
                raw = response.read()
                if response.status != 200:
                    self.failures.append(f"{response.status} {raw[:200]!r}")
                    continue
                text = json.loads(raw)["choices"][0]["message"]["content"]
                version = response.headers["x-unshot-version"]
                self.answers.append((time.time(), version, prompt, text))
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.failures.append(repr(error))
                connection.close()


@functools.cache
def alone(model: Path, instruction: str, max_tokens: int, context: int) -> dict[str, str]:
    """What a model answers to each prompt when it is asked alone, on a server of its own without any gateway."""
    port = free_port()
    server = LocalServer.start(model.name, server_command(model, port, 1, 1, context=context), port)
    try:
        server.wait()
        return {prompt: ask(port, instruction, prompt, max_tokens) for prompt in PROMPTS}
    finally:
        server.end()


def ask(port: int, instruction: str, prompt: str, max_tokens: int) -> str:
    """One greedy answer of a server."""
    messages = [{"role": "system", "content": instruction}, {"role": "user", "content": prompt}]
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "repeat_penalty": 1.0}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return str(json.loads(connection.getresponse().read())["choices"][0]["message"]["content"])


def serving(running: Running) -> str:
    arm = running.health()["arms"].get("candidate")
    return arm["version"] if arm else "none"


def run(
    folder: Path,
    base: Path,
    models: tuple[Path, Path],
    *,
    switches: int,
    clients: int,
    keep_warm: float,
    max_tokens: int = 12,
    context: int = 256,
) -> dict[str, Any]:
    """Switch so many times under load; returns what was seen."""
    instructions = ("Short one.", "Another short prompt.")
    registry = Registry(folder / "store")
    expected = {}
    for number, (model, instruction) in enumerate(zip(models, instructions, strict=True), start=1):
        artifact = make_artifact(folder / f"art{number}", model, task={"instruction": instruction})
        registry.add(artifact)
        expected[f"v{number}"] = alone(model, instruction, max_tokens, context)
        registry.move("champion", number, by="bench", waivers=WAIVED)
    expected[base.name] = alone(base, "The base's own prompt.", max_tokens, context)
    case = folder / "case.toml"
    case.write_text('[task]\nname = "load"\nsystem = "The base\'s own prompt."\n')
    arguments = ["--case", case, "--store", folder / "store", "--baseline", f"gguf:{base}", "--threads", "1"]
    load = Load()
    commands, until_served = [], []
    with gateway(folder, *arguments, "--context", context, "--keep-warm", keep_warm) as running:
        threads = [
            threading.Thread(target=load.client, args=(running.port, n, max_tokens)) for n in range(clients)
        ]
        for thread in threads:
            thread.start()
        # v2 -> v1 -> none (the baseline answers) -> v1 -> v2 -> ...
        steps = [["rollback"], ["rollback"], ["promote", "v1"], ["promote", "v2"]]
        champion = "v2"
        for number in range(switches):
            step = steps[number % len(steps)]
            if (
                step[0] == "rollback"
            ):  # which one is taken back: without it a second rollback in 5 s is refused
                step = [*step, "--from", champion]
            begin = time.perf_counter()
            line = ["deploy", *step, "--store", folder / "store", "--by", "bench", "--json"]
            done = subprocess.run(command(line), capture_output=True, text=True, check=True)
            took = time.perf_counter() - begin
            champion = wanted = json.loads(done.stdout)["after"] or "none"
            at = time.perf_counter()
            assert until(lambda w=wanted: serving(running) == w, 90), running.output.read_text()
            (commands if step[0] == "rollback" else []).append(took)
            until_served.append((step[0], time.perf_counter() - at))
            seen = len(load.answers)
            until(lambda s=seen: len(load.answers) >= s + 2 * clients, 60)
        load.stop.set()
        for thread in threads:
            thread.join()
        fallbacks = running.metric("unshot_fallbacks_total")
        code = running.stop()
    mixed = [a for a in load.answers if expected[a[1]][a[2]] != a[3]]
    texts = {(v, p): t for v, by in expected.items() for p, t in by.items()}
    return {
        "switches": switches,
        "answers": len(load.answers),
        "by_version": dict(Counter(a[1] for a in load.answers)),
        "failed": len(load.failures),
        "failures": load.failures[:3],
        "mixed": len(mixed),
        "mixed_first": mixed[:2],
        "fallbacks": fallbacks,
        "exit_code": code,
        "distinguishable": all(
            len({texts[v, p] for v in expected}) == len(expected) for p in PROMPTS
        ),
        "rollback_command_s": [round(s, 3) for s in commands],
        "rollback_served_s": [round(s, 3) for k, s in until_served if k == "rollback"],
        "promote_served_s": [round(s, 3) for k, s in until_served if k == "promote"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("models", type=Path, nargs=2)
    parser.add_argument("--switches", type=int, default=20)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--keep-warm", type=float, default=0.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = run(
            Path(folder),
            given.base.resolve(),
            (given.models[0].resolve(), given.models[1].resolve()),
            switches=given.switches,
            clients=given.clients,
            keep_warm=given.keep_warm,
            context=2048,
        )
    print(json.dumps(seen, indent=1))
    for name in ("rollback_command_s", "rollback_served_s", "promote_served_s"):
        values = seen[name]
        print(f"{name}: median {statistics.median(values):.3f}, max {max(values):.3f}")


if __name__ == "__main__":
    main()
