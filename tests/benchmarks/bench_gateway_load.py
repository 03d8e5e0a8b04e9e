"""The gateway with one and with several workers under load, beside LiteLLM's proxy in the same run.

    python -m tests.benchmarks.bench_gateway_load [--litellm /path/to/litellm] [--requests 1000] [--long 50000]

All stand in front of one scripted back end that answers at once; the gateway writes its request log, LiteLLM none.
Rounds take turns, so that what else the machine does meets all alike. Added time: one connection, one request after the
other, against the back end itself. Then `--long` requests through the gateway with two workers: memory and open files.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from tests.gateways import gateway, scripted
from unshot.engines.server import free_port

# No look at the network, and none for a key, as the gateway has none: without this it refuses to start.
LITELLM_SETTINGS = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    "PYTHONPATH": "",
}
# Seconds until LiteLLM must answer: it imports for long, and longer on a busy machine.
LITELLM_START = 1800
FREE = '[task]\nname = "free"\ninstruction = "Be brief."\n'


class Client:
    """Kept connections to one server."""

    def __init__(self, port: int) -> None:
        self.port = port
        body = json.dumps(
            {"model": "free", "messages": [{"role": "user", "content": "What is due in 30 days?"}]}
        ).encode()
        self.request = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer sk-none\r\nContent-Length: %d\r\n\r\n" % len(body)
        ) + body

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> float:
        start = time.perf_counter()
        writer.write(self.request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"http/1.1 200"):
            raise AssertionError(head[:200])
        if b"content-length:" in head:
            await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
        else:
            while (size := int(await reader.readline(), 16)) > 0:
                await reader.readexactly(size + 2)
            await reader.readline()
        return time.perf_counter() - start

    async def _load(self, requests: int, connections: int) -> list[float]:
        left, seconds = requests, []

        async def work() -> None:
            nonlocal left
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            while left > 0:
                left -= 1
                seconds.append(await self._one(reader, writer))
            writer.close()

        await asyncio.gather(*(work() for _ in range(connections)))
        return seconds

    def load(self, requests: int, connections: int) -> tuple[float, np.ndarray]:
        """Requests a second, and milliseconds of each."""
        start = time.perf_counter()
        seconds = asyncio.run(self._load(requests, connections))
        return requests / (time.perf_counter() - start), 1e3 * np.array(seconds)


@contextlib.contextmanager
def litellm(binary: Path, folder: Path, url: str) -> Iterator[int]:
    """LiteLLM's proxy in front of `url`; its port."""
    port = free_port()
    config = folder / "litellm.yaml"
    config.write_text(
        "model_list:\n  - model_name: free\n"
        f"    litellm_params: {{model: openai/x, api_base: '{url}', api_key: sk-x}}\n"
    )
    with (folder / "litellm.txt").open("w") as log:
        process = subprocess.Popen(
            [str(binary), "--config", str(config), "--port", str(port), "--host", "127.0.0.1"],
            stdout=log, stderr=log, env={**os.environ, **LITELLM_SETTINGS},
        )  # fmt: skip
    begin = time.monotonic()
    try:
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health/liveliness", timeout=20).close()
                break
            if process.poll() is not None or time.monotonic() > begin + LITELLM_START:
                raise AssertionError(
                    f"LiteLLM did not come up: {(folder / 'litellm.txt').read_text()[-2000:]}"
                )
            time.sleep(0.3)
        used = psutil.Process(process.pid).cpu_times()
        print(
            f"LiteLLM came up after {time.monotonic() - begin:.0f} s, with {used.user + used.system:.0f} s of a core",
            flush=True,
        )
        yield port
    finally:
        process.terminate()
        process.wait(30)


def use(pid: int) -> tuple[float, int, int]:
    """MiB (unique to the processes), descriptors and processes of a process and its children."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return (
        sum(p.memory_full_info().uss for p in family) / 2**20,
        sum(p.num_fds() for p in family),
        len(family),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--litellm", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--long", type=int, default=50_000)
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "free.toml").write_text(FREE)
        url = stack.enter_context(scripted("baseline"))
        ports = {"back end": int(url.split(":")[2].split("/")[0])}
        several = None
        for workers in (1, 2):
            running = stack.enter_context(
                gateway(folder, "--case", "free.toml", "--baseline", url, "--baseline-prompt", "none",
                        "--workers", workers, "--log", folder / f"log{workers}")
            )  # fmt: skip
            ports[f"gateway, {workers} worker{'s' if workers > 1 else ''}"] = running.port
            several = running
        if given.litellm:
            ports["LiteLLM"] = stack.enter_context(litellm(given.litellm, folder, url))
        print(f"load average {os.getloadavg()}, {os.cpu_count()} cores", flush=True)
        clients = {name: Client(port) for name, port in ports.items()}
        rates: dict[str, list[float]] = {name: [] for name in clients}
        alone: dict[str, list[np.ndarray]] = {name: [] for name in clients}
        busy: dict[str, list[np.ndarray]] = {name: [] for name in clients}
        for number in range(given.rounds + 1):
            for name, client in clients.items():
                count = max(100, given.requests // (5 if name == "LiteLLM" else 1))
                rate, seconds = client.load(count, given.connections)
                _, one = client.load(max(50, count // 5), 1)
                if number:  # the first round warms up
                    rates[name].append(rate)
                    busy[name].append(seconds)
                    alone[name].append(one)
        base = np.concatenate(alone["back end"])
        for name in clients:
            one, many = np.concatenate(alone[name]), np.concatenate(busy[name])
            print(
                f"{name}: {np.median(rates[name]):.0f} requests/s at {given.connections} connections "
                f"(p50 {np.percentile(many, 50):.1f}, p99 {np.percentile(many, 99):.1f} ms); alone added p50 "
                f"{np.percentile(one, 50) - np.percentile(base, 50):.2f}, p99 "
                f"{np.percentile(one, 99) - np.percentile(base, 99):.2f} ms",
                flush=True,
            )
        assert several is not None
        client = Client(several.port)
        print("0 requests: {:.0f} MiB, {} descriptors, {} processes".format(*use(several.process.pid)))
        for part in range(5):
            client.load(given.long // 5, given.connections)
            facts = use(several.process.pid)
            done = (part + 1) * given.long // 5
            print("{} requests: {:.0f} MiB, {} descriptors, {} processes".format(done, *facts), flush=True)
        lost = [line for line in several.call("/metrics").body.splitlines() if "log_lines_total{" in line]
        print("log:", lost, f"load average {os.getloadavg()}")


if __name__ == "__main__":
    main()
