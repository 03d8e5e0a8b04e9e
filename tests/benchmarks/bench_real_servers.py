"""Real servers with one model and the same prompts: our times beside those that each server counts itself.

`python -m tests.benchmarks.bench_real_servers [KIND ...]`, kinds as `serve:KIND:` has them; what is not installed is
named with its reason. `--url URL --model NAME` takes a server that runs already (transformers serve) beside them. The
servers' own times: of vLLM and SGLang the histograms of /metrics, of llama-server the sums there, of llama-cpp-python
what llama.cpp prints after each answer into the server's log.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
from collections.abc import Callable
from dataclasses import replace

from bench.counters import Counters, read_counters
from bench.schedule import Load
from bench.sides import LocalServerSystem, open_system
from bench.target import LoadOptions, Target
from bench.traffic import ServerOptions
from unshot import embedded
from unshot.console import Output
from unshot.data.prompts import Prompt
from unshot.engines.server import SERVERS
from unshot.errors import UnshotError

QUIET = Output(verbosity=-1)


def own_times(before: Counters, after: Counters, requests: int) -> tuple[float | None, float | None]:
    """`(milliseconds to the first token, per token)` of llama.cpp's sums: prompt work a request, and time a token."""
    prompt, tokens, decode = (
        after.get(f"llamacpp:{n}", 0.0) - before.get(f"llamacpp:{n}", 0.0)
        for n in ("prompt_seconds_total", "tokens_predicted_total", "tokens_predicted_seconds_total")
    )
    if not tokens:
        return None, None
    # Its clock of generation starts with the first token, which it counts.
    return prompt / requests * 1000, decode / max(tokens - requests, 1) * 1000


def logged_times(log: str, requests: int) -> tuple[float | None, float | None]:
    """The same out of llama.cpp's own print, of the last so many answers: the runs are the tokens after the first."""
    found = [
        [float(v) for v in match]
        for match in re.findall(
            r"prompt eval time =\s+([\d.]+) ms /\s+\d+ tokens.*?\n.*?eval time =\s+([\d.]+) ms /\s+(\d+) runs",
            log,
        )
    ][-requests:]
    if len(found) < requests:
        return None, None
    return sum(f[0] for f in found) / requests, sum(f[1] for f in found) / sum(f[2] for f in found)


def measure(
    name: str, url: str, model: str, requests: int, words: int, tokens: int, log: Callable[[], str] = str
) -> str:
    """One table row; `log` gives what the server has written."""
    server = ServerOptions(model, timeout=300.0, extra={} if url == name else {"ignore_eos": True})
    target = Target(LoadOptions(url, server, prompt_words=str(words), max_tokens=str(tokens)))
    target.warm_up(2)
    before = read_counters(target.api.address)
    got = target.measure(Load("closed", concurrency=1, text="closed:1"), requests, QUIET)
    f, own = got.figures, got.figures.server
    theirs = own_times(before, read_counters(target.api.address), requests)
    if theirs[0] is None:
        theirs = logged_times(log(), requests)
    if own is not None:
        theirs = (own.ttft_ms or theirs[0], own.tpot_ms if own.ttft_ms else theirs[1])

    def beside(mine: float | None, its: float | None) -> str:
        if mine is None or its is None:
            return f"{'-' if mine is None else f'{mine:.1f}'} | - | -"
        return f"{mine:.1f} | {its:.1f} | {mine / its - 1:+.1%}"

    t = f.tokens
    return (
        f"| {name} | {f.answered} of {f.requests} | {t.prompt or 0:.0f} / {t.output or 0:.0f} | "
        f"{beside(f.ttft_ms.mean, theirs[0])} | {beside(f.tpot_ms.mean, theirs[1])} | {max(os.getloadavg()):.1f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(SERVERS))
    parser.add_argument("--url")
    parser.add_argument("--model", default="default")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--words", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=33)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--server-args", default="")
    given = parser.parse_args()
    folder = embedded.ensure(None)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {given.threads} thread(s) a server"
    )
    print("| server | answered | tokens in / out | TTFT | its own | | TPOT | its own | | load |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    sizes = (given.requests, given.words, given.tokens)
    if given.url:
        print(measure(given.url, given.url, given.model, *sizes), flush=True)
        return
    for name in given.kinds:
        kind = SERVERS[name]
        target = embedded.gguf_path() if kind.gguf else folder
        try:
            system = open_system(
                "candidate", f"serve:{name}:{target}", Prompt(), max_tokens=given.tokens, threads=given.threads,
                concurrency=1, options=replace(ServerOptions(), timeout=300.0),
                server_args=given.server_args.split(), out=Output(verbosity=0),
            )  # fmt: skip
        except UnshotError as error:
            print(f"| {name} | not measured: {error} |", flush=True)
            continue
        assert isinstance(system, LocalServerSystem)
        try:
            kept = system.server.log
            row = measure(
                system.library, system.api.address.base, system.api.model, *sizes,
                log=lambda kept=kept: bytes(kept._kept).decode(errors="replace"),  # type: ignore[misc]
            )  # fmt: skip
            print(row, flush=True)
        finally:
            system.close()


if __name__ == "__main__":
    main()
