"""The real model in a real llama.cpp server behind the gateway: a schema holds, and no request ends the server."""

from __future__ import annotations

import json
import random
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("uvicorn")
pytest.importorskip("aiohttp")
pytest.importorskip("sse_starlette")

from tests.fuzz import body, send, wrong_with
from tests.gateways import Running, gateway
from tests.test_deploy_attacks import FIT, UNFIT
from unshot import embedded

pytestmark = pytest.mark.slow
SCHEMA = {
    "type": "object",
    "properties": {"risk": {"enum": ["low", "high"]}, "clauses": {"type": "integer"}},
    "required": ["risk", "clauses"],
    "additionalProperties": False,
}
# Each ends a llama-cpp-python or llama-server process, or makes it work without end, where it is passed on.
DEADLY: list[dict[str, Any]] = [
    {"grammar": "root ::= ("}, {"grammar": 'root ::= root "a"'},
    {"chat_template": "{% for x in range(10**9) %}{% endfor %}"},
    {"response_format": {"type": "json_object", "schema": {"type": "nonsense"}}},
    *(
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}}
        for schema in (
            {"$ref": "#/$defs/none"}, {"pattern": "(a+)+$"}, {"enum": []}, {"type": "array", "minItems": 10**9},
            {"type": "string", "minLength": 10**9}, {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
            {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}, "$ref": "#/$defs/a"},
            {"type": "array", "items": {"type": "integer", "minimum": 10**30}}, {"enum": ["\ud800", "\0", '"', "\\"]},
            {"type": "string", "format": "nonsense"}, {"type": ["string", "null"]}, {"const": {"a": [1, None]}}, {},
            {"type": "object", "properties": {'a"b\\': {"type": "null"}}, "required": ['a"b\\']},
            *FIT, *UNFIT,
        )
    ),
    {"logit_bias": {"99999999": 100}}, {"logit_bias": {"-1": 100}}, {"max_tokens": 2**31 - 1}, {"seed": -(2**63)},
    {"stop": ["\ud800"]}, {"top_logprobs": 20, "logprobs": True, "max_tokens": 1}, {"temperature": 2, "top_p": 0},
    {"messages": [{"role": "assistant", "content": "x"}]}, {"messages": [{"role": "user", "content": ""}]},
    {"messages": [{"role": "user", "content": "x " * 4000}]},
    {"messages": [{"role": "user", "content": "\0<|im_end|>"}]},
    {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "$ref": "#/x"}}}]},
]  # fmt: skip


def sent(running: Running, given: dict[str, Any]) -> int:
    """The status of a request; no answer within a minute fails."""
    asked = {"messages": [{"role": "user", "content": "Is this risky?"}], "max_tokens": 4, **given}
    raw = json.dumps(asked).encode()
    request = urllib.request.Request(
        f"{running.url}/chat/completions", raw, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_schema_is_enforced_and_no_request_ends_the_model_server(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[task]\nname = "free"\ninstruction = "Answer briefly."\n')
    model = embedded.gguf_path()
    with gateway(
        tmp_path, "--case", "c.toml", "--baseline", f"gguf:{model}", "--baseline-prompt", "short", "--context", 512,
        "--threads", 1, "--timeout", 30, "--max-tokens", 8,
    ) as running:  # fmt: skip
        pid = running.child(model.name).pid
        wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
        answer = running.ask(
            "The Customer shall indemnify the Supplier.", response_format=wanted, max_tokens=60
        )
        assert answer.status == 200, answer.body
        value = json.loads(answer.text)
        assert value["risk"] in ("low", "high") and isinstance(value["clauses"], int) and len(value) == 2
        for given in DEADLY:
            if given.get("max_tokens", 0) > 1000:
                given = {**given, "stop": [" ", ".", "\n"]}
            status = sent(running, given)
            assert status != 500, given
            assert running.child(model.name).pid == pid, given
        rng = random.Random(4)
        for _ in range(25):
            raw = body(rng)
            head = (
                "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            )
            data = f"{head}Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n".encode() + raw
            assert wrong_with(data, send(running.port, data)) is None, raw[:300]
        assert running.child(model.name).pid == pid and running.metric("unshot_restarts_total") == 0
        assert running.ask("hi", max_tokens=2).status == 200
