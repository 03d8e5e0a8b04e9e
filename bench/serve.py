"""`serve:gguf:PATH`: a real local server for a GGUF file, started for the run and ended with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.remote import Remote, open_remote
from unshot.console import Output
from unshot.data.prompts import Prompt
from unshot.engines import Engine, open_engine, parse_spec
from unshot.engines.server import LocalServer, free_port, server_command
from unshot.errors import InputError
from unshot.machine import usable_cores


def open_served(
    side: str,
    spec: str,
    prompt: Prompt,
    *,
    max_tokens: int,
    threads: int | None,
    concurrency: int,
    timeout: float,
    out: Output,
) -> Served:
    """Start a server for `gguf:PATH` and wait until it answers.

    `llama-server` where it is on the PATH, else llama-cpp-python's own server. Raises `InputError` for another
    kind of model, `OutsideError` where no server can be started.
    """
    kind, target = parse_spec(spec)
    if kind != "gguf":
        raise InputError(
            f"serve:{spec}: only serve:gguf:PATH can be started here; give a URL for other servers"
        )
    # Also checks the file before a server dies of it; and counts tokens with the model's own tokenizer.
    engine = open_engine(spec, threads=threads)
    port = free_port()
    cores = threads or usable_cores()
    command = server_command(Path(target), port, cores, concurrency, logprobs=False)
    out.log(f"{side}: starting {Path(command[0]).name} {' '.join(command[1:4])} on port {port}")
    server = LocalServer.start(f"serve:{spec}", command, port)
    try:
        server.wait()
    except BaseException:
        server.end()
        engine.close()
        raise
    remote = open_remote(
        side,
        server.address.base,
        prompt,
        model=Path(target).name,
        max_tokens=max_tokens,
        concurrency=concurrency,
        timeout=timeout,
        # llama-cpp-python's server penalises repetition by default, the labels of the prompt among it.
        extra={"repeat_penalty": 1.0},
    )
    return Served(remote, server, engine, spec, cores)


class Served(Remote):
    """A remote system whose server is ours."""

    def __init__(self, remote: Remote, server: LocalServer, engine: Engine, spec: str, cores: int) -> None:
        super().__init__(**{name: getattr(remote, name) for name in Remote.__dataclass_fields__})
        self._server = server
        self.pid = server.process.pid
        self._engine = engine
        self._spec = spec
        self._cores = cores
        self.count = lambda text: len(engine.tokenize(text))
        self.count_prompt = lambda messages: len(engine.prompt_ids(messages))

    def facts(self) -> dict[str, Any]:
        own = self._engine.facts().plain()
        return {**super().facts(), **own, "spec": f"serve:{self._spec}", "threads": self._cores}

    def close(self) -> None:
        self._server.end()
        self._engine.close()
