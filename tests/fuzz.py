"""Requests and command lines that nobody should send, by seed: `python -m tests.fuzz --minutes 60 [--seed N]`.

What must hold whatever is sent: an answer comes, none is a 500, an error is worded as the API words it; a command line
ends with a documented exit code in one line, without "internal error", and leaves no half-written output.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import random
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tests.inprocess import Served, http, serving, with_limits
from unshot.case import TaskSettings as Task

WORDS = ("", "a", "low", "high", "../../x", "\x00", "nan", "inf", "-1", "1e400", "0", "é", "模型",
         "[/red]", "\ud800", "=1+1", "x" * 300, "http://h/v1", "http://u:p@h/v1?k=s", "gguf:/none",
         "true", "null", "{}",
         "[]", "\x1b[31m", "v1", "99")  # fmt: skip
PARAMETERS = (
    "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed", "n", "logprobs", "top_logprobs",
    "logit_bias", "presence_penalty", "frequency_penalty", "response_format", "tools", "tool_choice", "stream",
    "stream_options", "user", "model", "store", "metadata", "grammar", "chat_template", "parallel_tool_calls",
    "reasoning_effort", "functions", "modalities", "prediction", "mirostat_mode", "messages", "",
)  # fmt: skip

OTHER_PATHS = ("/v1/feedback", "/v1/models", "/v1/models/%ff", "/healthz", "/metrics", "/v1/responses", "/",
               "/v1/embeddings", "//", "/v1/models/" + "x" * 3000)  # fmt: skip


def value(rng: random.Random, depth: int = 3) -> Any:
    """Any JSON value."""
    kind = rng.randrange(12)
    if kind < 3:
        return rng.choice(WORDS)
    if kind == 3:
        return rng.choice((0, 1, -1, 2, 5, 10**6, 2**31, 2**63, 10**30, -(10**30)))
    if kind == 4:
        return rng.choice((0.0, 0.5, -0.1, 1e-300, 1e300, 2.0000001, float("nan"), float("inf")))
    if kind == 5:
        return rng.choice((True, False, None))
    if depth and kind < 9:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if depth:
        return {rng.choice(WORDS): value(rng, depth - 1) for _ in range(rng.randrange(4))}
    return None


def plausible(rng: random.Random, name: str) -> Any:
    """A value that a parameter might well have."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    known: dict[str, tuple[Any, ...]] = {
        "temperature": (0, 0.7, 2, 2.1), "top_p": (0.1, 1, 1.1), "max_tokens": (1, 16, 0),
        "stop": ("x", ["a", "b"], []),
        "seed": (1, -5), "n": (1, 2), "logprobs": (True, False), "top_logprobs": (3, 21), "stream": (True, False),
        "logit_bias": ({"5": -100}, {"x": 1}), "user": ("ada", ""), "model": ("case", "gpt-4o"),
        "response_format": ({"type": "text"}, {"type": "json_object"},
                            {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
                            {"type": "json_schema", "json_schema": {"name": "s", "schema": {"$ref": "#/x"}}},
                            {"type": "json_schema", "json_schema": {"name": "s", "schema": {"pattern": "(a+)+$"}}}),
        "tools": ([{"type": "function", "function": {"name": "f", "parameters": schema}}], []),
        "tool_choice": ("auto", {"type": "function", "function": {"name": "f"}}),
        "stream_options": ({"include_usage": True}, {}), "grammar": ("root ::= x",), "store": (True, False),
    }  # fmt: skip
    return rng.choice(known[name]) if name in known else value(rng)


def message(rng: random.Random) -> Any:
    if rng.random() < 0.1:
        return value(rng)
    content: Any = rng.choice(("hi", "", "x" * 200, "\ud800", "\U0001f600"))
    if rng.random() < 0.2:
        content = [
            rng.choice(
                ({"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "x"}}, value(rng))
            )
        ]
    found = {
        "role": rng.choice(("user", "user", "user", "assistant", "system", "tool", "me")),
        "content": content,
    }
    if rng.random() < 0.15:
        found[rng.choice(("name", "tool_calls", "tool_call_id", "refusal", "x"))] = value(rng)
    return found


def body(rng: random.Random) -> bytes:
    """The body of a chat request: right, wrong, or no JSON at all."""
    kind = rng.random()
    if kind < 0.05:
        return rng.randbytes(rng.randrange(200))
    if kind < 0.08:
        return rng.choice(
            (b"", b"{", b"[" * 100_000, b'{"a":' * 5000, b"\xff\xfe{}", b"null", b'"x"', b"1" * 5000)
        )
    given: dict[str, Any] = {"messages": [message(rng) for _ in range(rng.choice((1, 1, 1, 2, 3, 0)))]}
    if rng.random() < 0.4:
        given = {"messages": [{"role": "user", "content": "hi"}], "stream": rng.random() < 0.5}
    for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
        name = rng.choice(PARAMETERS)
        given[name] = plausible(rng, name) if rng.random() < 0.7 else value(rng)
    raw = json.dumps(given, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:
        place = rng.randrange(len(raw))
        raw = raw[:place] + rng.randbytes(3) + raw[place + 1 :]
    return raw


def request_bytes(rng: random.Random) -> bytes:
    """A whole HTTP request; some are none."""
    content = body(rng)
    path = "/v1/chat/completions"
    if rng.random() < 0.15:
        path = rng.choice(OTHER_PATHS)
    method = rng.choices(
        ("POST", "GET", "PUT", "OPTIONS", "HEAD", "DELETE", "TRACE"), (150, 3, 1, 1, 1, 1, 1)
    )[0]
    lines = [f"{method} {path} HTTP/1.1"]
    lines.append(
        rng.choices(("Host: 127.0.0.1", "Host: evil.example", "Host: [::1]:80", "Host:"), (40, 1, 1, 1))[0]
    )
    lines.append(
        rng.choices(("Content-Type: application/json", "Content-Type: text/plain", "X: y"), (40, 1, 1))[0]
    )
    if rng.random() < 0.05:
        lines.append(
            rng.choice(("Origin: http://evil.example", "Origin: null", "Authorization: Bearer \xe9"))
        )
    if rng.random() < 0.2:
        name = rng.choice(("x-unshot-user", "x-unshot-slice", "x-unshot-feedback-token", "Cookie"))
        lines.append(f"{name}: {rng.choice(('a', chr(233) * 5, 'x' * 2000, '[/b]'))}")
    if rng.random() < 0.1:
        chunk = f"{len(content):x}\r\n".encode() + content + b"\r\n0\r\n\r\n" if content else b"0\r\n\r\n"
        head = "\r\n".join([*lines, "Transfer-Encoding: chunked", "Connection: close"])
        return head.encode("latin-1") + b"\r\n\r\n" + chunk
    length = len(content) if rng.random() < 0.97 else rng.choice((len(content) + 50, 10**12))
    head = "\r\n".join([*lines, f"Content-Length: {length}", "Connection: close"])
    return head.encode("latin-1") + b"\r\n\r\n" + content


def reply(rng: random.Random, stream: bool) -> bytes:
    """What a back end may send: an answer, an odd one, or something else."""
    usage = rng.choice(
        ({"prompt_tokens": 3, "completion_tokens": 1}, None, "lots", [], {"prompt_tokens": "x"}, 10**30)
    )
    content = rng.choice(("low", "low", "low", "high", None, 7, "\ud800", "x" * 5000, ["a"]))
    kind = rng.random()
    if kind < 0.2:
        status = rng.choice((202, 204, 301, 302, 400, 401, 404, 413, 422, 429, 500, 503, 599))
        return http(
            b'{"error": {"message": "no"}}',
            status,
            more="Location: http://127.0.0.1:1/\r\nRetry-After: x\r\n",
        )
    if kind < 0.25:
        return http(
            rng.choice((b"<html>", b"", b"[]", b"null", b"[" * 3000, b'{"choices": 3}', b'{"choices": [3]}'))
        )
    if stream and rng.random() < 0.8:
        delta = rng.choice(
            ({"content": content}, None, "x", {"content": content, "tool_calls": rng.choice((None, 3, [{}]))})
        )
        chunks = [{"choices": rng.choice(([{"index": 0, "delta": delta}], None, {}, [3], []))},
                  {"choices": [{"index": rng.choice((0, "a", -1)), "delta": {},
                                "finish_reason": rng.choice(("stop", 3))}]},
                  {"choices": [], "usage": usage}]  # fmt: skip
        text = b"".join(b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks)
        return http(text + rng.choice((b"data: [DONE]\n\n", b"", b"data: {\n\n")), kind="text/event-stream")
    answer = {"choices": [{"message": {"content": content, "tool_calls": rng.choice((None, [], 3))},
                           "finish_reason": rng.choice(("stop", "length", None, 5)),
                           "logprobs": rng.choice((None, {}, 3, {"content": [{"logprob": "x"}]}))}],
              "usage": usage, "created": rng.choice((1, "x", None)), "deep": []}  # fmt: skip
    return http(json.dumps(answer).encode())


def back_end(rng: random.Random) -> Callable[..., Any]:
    async def play(head: bytes, raw: bytes, writer: asyncio.StreamWriter) -> None:
        if rng.random() < 0.03:
            writer.close()
            return
        data = reply(rng, b'"stream":true' in raw)
        writer.write(data if rng.random() < 0.97 else data[: len(data) // 2])
        if rng.random() < 0.05:
            writer.close()

    return play


def send(port: int, data: bytes) -> bytes:
    """The whole response; empty where the connection was closed without one."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
        parts = []
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                parts.append(part)
        return b"".join(parts)


def wrong_with(sent: bytes, got: bytes) -> str | None:
    """What is wrong with an answer; None where nothing is."""
    whole = sent.partition(b"\r\n\r\n")
    length = next(
        (int(x.split(b":")[1]) for x in whole[0].split(b"\r\n") if x.startswith(b"Content-Length:")), 0
    )
    if not got:
        return None if length > len(whole[2]) else "no answer"
    head, _, rest = got.partition(b"\r\n\r\n")
    first = head.split(b" ", 2)
    if not head.startswith(b"HTTP/1.1 ") or not first[1].isdigit():
        return f"not HTTP: {got[:80]!r}"
    status = int(first[1])
    if status == 500:
        return f"status 500: {rest[:200]!r}"
    if status >= 400 and b"application/json" in head and sent[:4] != b"HEAD":
        error = json.loads(rest)["error"]
        if not isinstance(error["message"], str) or set(error) != {"message", "type", "param", "code"}:
            return f"an error in other words: {rest[:200]!r}"
    if status == 200 and b"text/event-stream" in head and b"data: [DONE]" not in rest:
        return f"a stream without an end: {rest[-200:]!r}"
    if status == 200 and b"application/json" in head and sent[:4] != b"HEAD":
        json.loads(rest)
    return None


def fuzz_requests(folder: Path, seed: int, number: int) -> list[str]:
    """Send `number` requests; what went wrong."""
    found: list[str] = []
    for part, (labelled, record) in enumerate(((True, False), (False, False), (False, True))):
        rng = random.Random(f"{seed} {part}")
        task = Task(
            name="case",
            labels=["low", "high"] if labelled else None,
            system="Be brief.",
            instruction="Brief.",
        )
        scripts = back_end(random.Random(f"{seed} a {part}")), back_end(random.Random(f"{seed} b {part}"))
        limits = with_limits(read_timeout=0.6, body=200_000, unknown=rng.choice(("refuse", "drop")))
        with serving(folder / str(part), *scripts, task=task, record=record, texts=True, share=0.5, limits=limits,
                     timeout=1.0) as served:  # fmt: skip
            for index in range(-(-number // 3)):
                data = request_bytes(rng)
                fault = wrong_with(data, send(served.port, data))
                if fault:
                    found.append(f"seed {seed}, part {part}, request {index}: {fault}; sent {data[:300]!r}")
            found += settled(served)
    return found


def settled(served: Served) -> list[str]:
    """What must hold after all requests: no place is taken, nothing failed inside."""
    deadline = time.monotonic() + 10
    while served.api.active and time.monotonic() < deadline:
        time.sleep(0.02)
    found = [f"{served.api.active} places stay taken"] if served.api.active else []
    health = served.on_loop(served.supervisor.health)
    found += [
        f"{arm}: {facts['active']} requests stay" for arm, facts in health["arms"].items() if facts["active"]
    ]
    return found + [w for w in served.warnings if "please report" in w]


# Commands that would train, download, measure or serve for long: their lines must be wrong to end soon.
SLOW = {
    "tune",
    "export",
    "bench",
    "eval",
    "demo",
    "serve",
    "golden",
    "load",
    "run",
    "distil",
    "label",
    "compare",
}
CASE = """
[task]
name = "t"
examples = "data.jsonl"
instruction = "Risk?"

[baseline]
api = "gpt-4o"
"""
PATHS = ("none", "data.jsonl", "empty", "case.toml", "store", "log", "art", "bad.json", ".", "out")


def commands() -> list[tuple[tuple[str, ...], click.Command]]:
    """Every command with its words."""
    from unshot.cli import cli

    found: list[tuple[tuple[str, ...], click.Command]] = []

    def walk(command: click.Command, words: tuple[str, ...]) -> None:
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                if inner is not None:
                    walk(inner, (*words, name))
            return
        found.append((words, command))

    walk(cli, ())
    return found


# Arguments with which a command does its work; odd options are then added to them.
WORKING: dict[str, list[str]] = {
    "plan": ["--case", "case.toml", "--approximate"], "data check": ["data.jsonl"],
    "data split": ["data.jsonl", "--out", "parts"],
    "data import": ["log"], "deploy ab": ["log"], "deploy drift": ["log", "--window", "40", "--settle", "40"],
    "deploy registry add": ["art", "--store", "store"], "deploy registry list": ["--store", "store"],
    "deploy registry show": ["v1", "--store", "store"], "deploy registry init": ["--store", "other"],
    "deploy promote": ["v1", "--store", "store", "--as", "challenger"], "deploy split": ["10", "--store", "store"],
    "deploy rollback": ["--store", "store"],
    "deploy retrain": ["log", "--data", "data.jsonl", "--champion", "art", "--out", "out"],
    "init": ["new.toml"],
}  # fmt: skip


def line(rng: random.Random, words: tuple[str, ...], command: click.Command) -> list[str]:
    """A command line: some options with values that may or may not be theirs, arguments that may be missing."""
    found = list(words)
    wild = rng.choice((0.02, 0.08, 0.25))
    working = WORKING.get(" ".join(words), []) if rng.random() < 0.6 else []
    found += working
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            if not working and rng.random() < 0.9:
                found.append(rng.choice(PATHS if rng.random() < 0.8 else WORDS))
        elif rng.random() < wild + 0.5 * parameter.required and parameter.opts:
            if not rng.random() < 0.02:
                found.append(rng.choice(parameter.opts))
            if not getattr(parameter, "is_flag", False):
                choices = getattr(parameter.type, "choices", None)
                numbers = ["1", "2", "10", "0.5", "0", "100"]
                kind = parameter.type.name
                likely = (
                    numbers
                    if kind in ("integer", "float")
                    else list(PATHS)
                    if kind == "path"
                    else [*numbers, *PATHS]
                )
                likely = list(map(str, choices)) if choices else likely
                found.append(str(rng.choice(likely)) if rng.random() < 0.85 else rng.choice(WORDS))
    if rng.random() < 0.1:
        found.append(rng.choice(("--json", "-q", "-v", "--help", "--nonsense", *WORDS)))
    if set(words) & SLOW:
        found.append("--no-such-option")
    return found


def prepare(folder: Path) -> None:
    """A folder with a bit of everything that commands read."""
    from tests.deploy_cases import make_artifact
    from tests.logs import split_log

    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"clause {n}", "completion": "low" if n % 2 else "high"} for n in range(12)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "case.toml").write_text(CASE)
    (folder / "bad.json").write_text('{"a": [1, ')
    (folder / "empty").mkdir(exist_ok=True)
    make_artifact(folder / "art")
    split_log(folder / "log", 60, right=(0.9, 0.9))


def run_line(arguments: list[str]) -> tuple[int, str, str]:
    """A command line in this process: exit code, stdout, stderr."""
    from unshot.__main__ import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code
        else:
            code = 0
    return (code if isinstance(code, int) else 1), out.getvalue(), err.getvalue()


def fuzz_lines(folder: Path, seed: int, number: int) -> list[str]:
    """Run `number` command lines in `folder`; what went wrong."""
    rng = random.Random(f"{seed} lines")
    known = commands()
    found = []
    before = Path.cwd()
    prepare(folder)
    os.chdir(folder)
    try:
        for index in range(number):
            arguments = line(rng, *rng.choice(known))
            try:
                code, out, err = run_line(arguments)
            except BaseException as error:
                found.append(f"seed {seed}, line {index}: {type(error).__name__}: {error}; {arguments}")
                continue
            fault = fault_of(arguments, code, out, err)
            if fault:
                found.append(f"seed {seed}, line {index}: {fault}; {arguments}")
        left = [
            p.name
            for p in folder.rglob("*")
            if p.name.endswith((".partial", ".tmp")) and "store" not in p.parts
        ]
        found += [f"half-written output left: {name}" for name in left]
    finally:
        os.chdir(before)
    return found


# A command that reads files, and the files of the prepared folder whose damage it meets.
READERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("plan --case case.toml --approximate --rate 2 --output-tokens 4 --out o", ("case.toml", "data.jsonl")),
    ("data check data.jsonl --out o", ("data.jsonl",)), ("data check data.csv --out o", ("data.csv",)),
    ("data split data.csv --out o", ("data.csv",)), ("data split data.jsonl --out o", ("data.jsonl",)),
    ("data import log --out o", ("log/*",)), ("deploy ab log --out o --case case.toml", ("log/*", "case.toml")),
    ("deploy drift log --window 40 --settle 40 --reference data.jsonl", ("log/*", "data.jsonl")),
    ("deploy registry add art --store store", ("art/*", "store/*", "store/*/*/*")),
    ("deploy registry show v1 --store store", ("store/*", "store/*/*/*")),
    ("deploy promote v1 --store store --by x --why y", ("store/*", "store/*/*/*", "tuned/*")),
    ("deploy rollback --store store --by x", ("store/*",)), ("deploy split 5 --store store --by x", ("store/*",)),
    ("deploy retrain log --data data.jsonl --champion champion --store store --out o",
     ("log/*", "data.jsonl", "store/*")),
    ("deploy init o --case case.toml --model m", ("case.toml", "data.jsonl")),
    ("deploy serve --candidate champion --store store --case case.toml --host 256.1.1.1", ("case.toml", "store/*")),
)  # fmt: skip
SCRAPS = (b"", b"null", b"[]", b"{}", b"3", b'"x"', b"\xef\xbb\xbf", b"\xff\xfe{}", b"[" * 20_000, b'{"a":' * 3000,
          b"\x00" * 50, b"1" * 6000, b'{"a": NaN}', b"\n\n")  # fmt: skip
TOKEN = re.compile(rb'"[^"\n]*"|-?\d+(?:\.\d+)?|true|false|null|\w+')
TOKENS = (b'""', b"-1", b"0", b"1e400", b"nan", b"true", b"[]", b"{}", b'"\\ud800"', b'"../../x"', b"9" * 30,
          b'[1, "a"]', b"2026-01-01", b"[[a]]", b"\x00", b"\xab", b'"[/b]"', b"=", b"\n", b"{a=1}")  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values of a JSON value are, itself left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for k, v in inner for place in ((*at, k), *places(v, (*at, k)))]


def changed(rng: random.Random, document: Any) -> Any:
    """A JSON value with one value of it replaced, removed or added."""
    known = places(document)
    if not known:
        return value(rng)
    *path, last = rng.choice(known)
    held = document
    for key in path:
        held = held[key]
    if rng.random() < 0.7:
        held[last] = value(rng)
    elif rng.random() < 0.7:
        del held[last]
    elif isinstance(held, dict):
        held[rng.choice(WORDS)] = value(rng)
    return document


def damage(rng: random.Random, path: Path) -> str:
    """Damage a file (or what is in its place by now) in one of many ways; which."""
    raw = path.read_bytes() if path.is_file() else b""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    kinds = (
        "truncated",
        "flipped",
        "value",
        "token",
        "scrap",
        "directory",
        "link",
        "loop",
        "gone",
        "half",
        "doubled",
    )
    kind = rng.choices(kinds, (3, 3, 10, 8, 4, 1, 1, 1, 1, 1, 1))[0]
    with contextlib.suppress(ValueError, IndexError):
        if kind == "value" and path.suffix == ".jsonl":
            lines = raw.splitlines()
            place = rng.randrange(len(lines))
            lines[place] = json.dumps(changed(rng, json.loads(lines[place]))).encode()
            raw = b"\n".join(lines) + b"\n"
        elif kind == "value":
            text = json.dumps(changed(rng, json.loads(raw)), ensure_ascii=rng.random() < 0.7)
            raw = text.encode("utf-8", "surrogatepass")
    found = list(TOKEN.finditer(raw[:50_000]))
    if kind == "token" and found:
        one = rng.choice(found)
        raw = raw[: one.start()] + rng.choice(TOKENS) + raw[one.end() :]
    if kind == "flipped" and raw:
        flipped = bytearray(raw)
        for _ in range(rng.choice((1, 3, 20))):
            flipped[rng.randrange(min(len(raw), rng.choice((16, 400, len(raw)))))] = rng.randrange(256)
        raw = bytes(flipped)
    if kind == "directory":
        path.mkdir()
    elif kind in ("link", "loop"):
        path.symlink_to("/nowhere/at/all" if kind == "link" else path.name)
    elif kind != "gone":
        cut = rng.randrange(len(raw) + 1) if kind in ("truncated", "half") else len(raw)
        path.write_bytes(
            {"scrap": rng.choice(SCRAPS), "doubled": raw + raw[: len(raw) // 2]}.get(kind, raw[:cut])
        )
    return kind


def fuzz_files(folder: Path, seed: int, number: int) -> list[str]:
    """Run `number` commands on a damaged file each; what went wrong."""
    rng, found, before = random.Random(f"{seed} files"), [], Path.cwd()
    base, work = folder / "base", folder / "work"
    prepare(base)
    rows = (base / "data.jsonl").read_text().splitlines()
    pairs = [json.loads(row) for row in rows]
    (base / "data.csv").write_text(
        "prompt,completion\n" + "".join(f"{p['prompt']},{p['completion']}\n" for p in pairs)
    )
    prepare_store(base)
    for index in range(number):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(base, work)
        os.chdir(work)
        command, files = rng.choice(READERS)
        known = sorted(path for pattern in files for path in work.glob(pattern) if path.is_file())
        where = rng.choice(known)
        what = f"{where.relative_to(work)} {damage(rng, where)}"
        arguments = [*command.split(), *(["--json"] if rng.random() < 0.2 else [])]
        try:
            code, out, err = run_line(arguments)
            fault = fault_of(arguments, code, out, err)
        except BaseException as error:
            code, fault = -1, f"{type(error).__name__}: {error}"
        finally:
            os.chdir(before)
        if fault is None and code >= 2 and (work / "o").exists():
            fault = f"exit code {code}, and an output is left"
        if fault is None:
            left = [p.name for p in work.rglob("*") if p.name.endswith((".partial", ".tmp"))]
            fault = f"half-written output left: {left}" if left else None
        if fault:
            found.append(f"seed {seed}, file {index}: {fault}; {what}; {command}")
    return found


def prepare_store(folder: Path) -> None:
    """A registry with a champion that may be promoted."""
    from deploy.registry.store import Registry
    from tests.deploy_cases import make_artifact, make_tuned

    tuned = make_tuned(folder / "tuned", quality=True, forgetting=True, review=True)
    store = Registry(folder / "store")
    store.add(make_artifact(folder / "art2", b"2", run=tuned))
    store.move("champion", 1, by="ada")


def fault_of(arguments: list[str], code: int, out: str, err: str) -> str | None:
    """What is wrong with how a command line ended; None where nothing is."""
    if "internal error" in err or "Traceback" in err:
        return err.strip()[-300:]
    if code not in (0, 1, 2, 3):
        return f"exit code {code}: {err[-200:]}"
    errors = [x for x in err.splitlines() if x.startswith("error:")]
    if code >= 2 and len(errors) != 1:
        return f"exit code {code} with {len(errors)} error lines: {err[-300:]}"
    if "--json" in arguments and code >= 2 and "error" not in json.loads(out or "{}"):
        return f"no error in the JSON: {out[:200]}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    seed, faults, count = options.seed, 0, 0
    while time.monotonic() < end:
        with tempfile.TemporaryDirectory() as text:
            for fault in (
                *fuzz_requests(Path(text) / "r", seed, 300),
                *fuzz_lines(Path(text) / "l", seed, 300),
                *fuzz_files(Path(text) / "f", seed, 200),
            ):
                faults += 1
                print(fault, flush=True)
        seed, count = seed + 1, count + 800
        print(f"seed {seed - 1}: {count} so far, {faults} faults", flush=True)
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
