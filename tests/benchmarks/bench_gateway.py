"""What the gateway adds to a call: the same requests straight to a back end and through the gateway, alternating.

    python -m tests.benchmarks.bench_gateway [--requests 1500] [--gguf MODEL.gguf]

The back end is a scripted server on bare sockets that answers at once, so that what is left is the gateway; with
--gguf a llama.cpp server of that model too. Both paths send the back end the same messages: the few-shot prompt of
the demo, which direct calls send themselves.
"""

from __future__ import annotations

import argparse
import http.client
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import ROOT
from tests.gateways import gateway, scripted
from unshot.case_file import load_case
from unshot.engines.server import LocalServer, free_port, server_command

CASE = ROOT / "unshot" / "demo" / "unshot.toml"
CLAUSE = "The Customer shall indemnify the Supplier from all claims, whether or not caused by the Supplier."
FREE = '[task]\nname = "free"\ninstruction = "Be brief."\n'


class Caller:
    """One kept connection; `call` gives milliseconds to the first and to the last byte of the body."""

    def __init__(self, port: int, body: dict[str, Any]) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        self.body = json.dumps(body).encode()

    def call(self) -> tuple[float, float]:
        start = time.perf_counter()
        self.connection.request(
            "POST", "/v1/chat/completions", self.body, {"Content-Type": "application/json"}
        )
        response = self.connection.getresponse()
        response.read(1)
        first = time.perf_counter()
        response.read()
        if response.status != 200:
            raise AssertionError(f"status {response.status}")
        return (first - start) * 1e3, (time.perf_counter() - start) * 1e3


def compare(direct: Caller, through: Caller, requests: int) -> dict[str, float]:
    """Milliseconds of both paths and what the gateway adds, at p50 and p99, to the whole answer and its first byte."""
    for caller in (direct, through):
        for _ in range(max(2, requests // 20)):
            caller.call()
    seen = np.array([[direct.call(), through.call()] for _ in range(requests)])
    out = {}
    for name, column in (("", 1), ("first byte ", 0)):
        for q in (50, 99):
            a, b = np.percentile(seen[:, 0, column], q), np.percentile(seen[:, 1, column], q)
            out |= {f"{name}direct p{q}": a, f"{name}gateway p{q}": b, f"{name}added p{q}": b - a}
    return {k: round(float(v), 3) for k, v in out.items()}


def messages() -> list[dict[str, str]]:
    return [dict(m) for m in load_case(CASE).long_prompt().messages(CLAUSE)]


def user() -> list[dict[str, str]]:
    return [{"role": "user", "content": CLAUSE}]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--gguf-requests", type=int, default=40)
    given = parser.parse_args()
    table = {}
    with tempfile.TemporaryDirectory() as name, scripted("baseline") as url:
        folder = Path(name)
        port = int(url.split(":")[2].split("/")[0])
        body = {"messages": messages(), "temperature": 0}
        arms = ["--baseline", url]
        with gateway(folder, "--case", CASE, *arms) as running:
            table["labels, whole answer"] = compare(
                Caller(port, body), Caller(running.port, {"messages": user()}), given.requests
            )
        with gateway(folder, "--case", CASE, *arms, "--log", folder / "log", "--log-texts") as running:
            table["the same, request log with texts"] = compare(
                Caller(port, body), Caller(running.port, {"messages": user()}), given.requests
            )
        free = folder / "free.toml"
        free.write_text(FREE)
        with gateway(folder, "--case", free, *arms, "--baseline-prompt", "short") as running:
            stream = {"messages": user(), "stream": True}
            short = [{"role": "system", "content": "Be brief."}, *user()]
            table["free text, streamed"] = compare(
                Caller(port, {**stream, "messages": short}), Caller(running.port, stream), given.requests
            )
        if given.gguf:
            own = free_port()
            command = server_command(given.gguf.resolve(), own, 1, 1, context=2048)
            server = LocalServer.start("the model alone", command, own)
            try:
                server.wait()
                with gateway(folder, "--case", CASE, "--candidate", f"http://127.0.0.1:{own}/v1") as running:
                    more = {"max_tokens": 4, "repeat_penalty": 1.0}
                    short = [{"role": "system", "content": load_case(CASE).task.instruction}, *user()]
                    table[f"real model, {given.gguf.name}"] = compare(
                        Caller(own, {"messages": short, "temperature": 0, **more}),
                        Caller(running.port, {"messages": user(), **more}),
                        given.gguf_requests,
                    )
            finally:
                server.end()
    for case, row in table.items():
        print(f"{case}:")
        for q in ("p50", "p99"):
            print("  " + ", ".join(f"{k} {v:.2f} ms" for k, v in row.items() if k.endswith(q)))


if __name__ == "__main__":
    main()
