"""An OpenAI-compatible server whose answers are scripted by the request: `python -m tests.scripted PORT NAME`.

The user's last message holds what each server is to do: `candidate=http 500; baseline=say low`. Unknown servers and
plain messages get `ok NAME`. With `-m FILE --port PORT` it is a model server that a test may put on the PATH.
Actions: `say TEXT`, `http STATUS`, `hang`, `cut` (mid-stream), `reset`, `garbage`.
`{"...": ...}` after `say` is returned as it is. Written on bare sockets so that it costs next to nothing.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Handler(asyncio.Protocol):
    def __init__(self, name: str) -> None:
        self.name = name
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].decode("latin-1")
            length = 0
            for line in head.split("\r\n")[1:]:
                key, _, value = line.partition(":")
                if key.lower() == "content-length":
                    length = int(value)
            if len(self.buffer) < end + 4 + length:
                return
            body = self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            if head.startswith("GET"):
                self.send(200, {"object": "list", "data": [{"id": self.name, "object": "model"}]})
            else:
                self.answer(json.loads(body))

    def send(self, status: int, value: Any) -> None:
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.transport.write(
            f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
            + raw
        )

    def action(self, body: dict[str, Any]) -> str:
        for part in str(body["messages"][-1]["content"]).split(";"):
            name, _, action = part.strip().partition("=")
            if name == self.name:
                return action
        return f"say ok {self.name}"

    def answer(self, body: dict[str, Any]) -> None:
        verb, _, rest = self.action(body).partition(" ")
        if verb == "http":
            self.send(int(rest), {"error": {"message": f"scripted {rest}"}})
        elif verb == "reset":
            self.transport.abort()
        elif verb == "garbage":
            self.send(200, b"<html>not an answer</html>")
        elif verb in ("say", "cut"):
            if body.get("stream"):
                self.stream(rest, cut=verb == "cut", body=body)
            elif verb == "cut":
                self.transport.write(b"HTTP/1.1 200 X\r\nContent-Length: 500\r\n\r\n{")
                self.transport.close()
            else:
                self.whole(rest, body)

    def facts(self, body: dict[str, Any], text: str) -> dict[str, Any]:
        words = sum(len(str(m.get("content")).split()) for m in body["messages"])
        return {
            "prompt_tokens": words,
            "completion_tokens": len(text.split()),
            "total_tokens": words + len(text.split()),
            "prompt_tokens_details": {"cached_tokens": 1},
        }

    def whole(self, text: str, body: dict[str, Any]) -> None:
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "stop",
        }
        if body.get("logprobs"):
            choice["logprobs"] = {
                "content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.5}]
            }
        self.send(
            200,
            {
                "id": "x",
                "object": "chat.completion",
                "created": 1,
                "model": self.name,
                "choices": [choice],
                "usage": self.facts(body, text),
                "seen": {k: v for k, v in body.items() if k != "messages"},
                "messages": body["messages"],
            },
        )

    def stream(self, text: str, *, cut: bool, body: dict[str, Any]) -> None:
        words = text.split() or [""]
        out = [b"HTTP/1.1 200 X\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"]
        head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": self.name}

        def add(value: dict[str, Any] | bytes) -> None:
            raw = value if isinstance(value, bytes) else b"data: " + json.dumps(value).encode() + b"\n\n"
            out.append(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")

        add({**head, "choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]})
        for number, word in enumerate(words):
            if cut and number == len(words) // 2:
                self.transport.write(b"".join(out))
                self.transport.close()
                return
            space = " " if number else ""
            add(
                {**head, "choices": [{"index": 0, "delta": {"content": space + word}, "finish_reason": None}]}
            )
        add({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if (body.get("stream_options") or {}).get("include_usage"):
            add({**head, "choices": [], "usage": self.facts(body, text)})
        add(b"data: [DONE]\n\n")
        self.transport.write(b"".join(out) + b"0\r\n\r\n")


class Model(Handler):
    """A server that fails and is right as often as its model file says: `{"fails": 0.01, "right": 0.9}`."""

    def __init__(self, path: str) -> None:
        super().__init__("model")
        self.odds = json.loads(Path(path).read_text())

    def action(self, body: dict[str, Any]) -> str:
        if random.random() < self.odds["fails"]:
            return "http 500"
        return "say right" if random.random() < self.odds["right"] else "say wrong"


async def main(port: int, make: Callable[[], Handler]) -> None:
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    given = sys.argv[1:]
    if "-m" in given:  # as `llama-server -m FILE --port PORT ...`
        asyncio.run(main(int(given[given.index("--port") + 1]), lambda: Model(given[given.index("-m") + 1])))
    else:
        asyncio.run(main(int(given[0]), lambda: Handler(given[1])))
