"""What a client, a web page or a back end may try at the gateway: parameters, sources, slow bodies, odd answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import resource
import socket
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("aiohttp")

from deploy.registry.store import Registry
from deploy.serve import app
from deploy.serve.check import Checker
from deploy.serve.failure import Failure
from deploy.serve.log_worker import clean, tag
from deploy.serve.options import ArmOptions, ServeOptions
from deploy.serve.parameters import DEEPEST, PASSED, checked, read_body
from deploy.serve.request_log import LogSettings, RequestLog
from deploy.serve.run import DeadlineProtocol, arm_specs, with_deadline
from deploy.serve.schema import BadSchema, check_schema
from deploy.serve.target import ArmSpec, Resolver, in_template, own_messages
from tests.fuzz import send
from tests.gateways import until
from tests.inprocess import Served, http, serving, with_limits
from tests.logs import request
from unshot.case import Case, TaskSettings
from unshot.child import command, environment
from unshot.contracts.request_log import Feedback, Unreadable, read_requests
from unshot.contracts.task import Task
from unshot.data.prompts import Prompt
from unshot.data.rows import Example
from unshot.errors import InputError

LABELS = TaskSettings(name="case", labels=["low", "high"], system="Say low or high.", instruction="Risk?")
FREE = TaskSettings(name="case", system="Be brief.", instruction="Brief.")
USER = [{"role": "user", "content": "hi"}]


def completion(content: Any = "low", **more: Any) -> bytes:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": content},
        "finish_reason": "stop",
        **more,
    }
    return json.dumps(
        {"id": "x", "choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
    ).encode()


def saying(*replies: bytes) -> Any:
    """A back end that gives these whole responses in turn, the last one again and again."""
    left = list(replies)

    async def play(head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(left.pop(0) if len(left) > 1 else left[0])

    return play


def ask(
    served: Served, body: Any = None, *headers: str, path: str = "/v1/chat/completions"
) -> tuple[int, Any, bytes]:
    """Status, JSON body (or None) and the whole response."""
    raw = json.dumps({"messages": USER} if body is None else body).encode()
    lines = [f"POST {path} HTTP/1.1", f"Content-Length: {len(raw)}", "Connection: close", *headers]
    names = {h.partition(":")[0].lower() for h in headers}
    lines += [] if "host" in names else ["Host: 127.0.0.1"]
    lines += [] if "content-type" in names else ["Content-Type: application/json"]
    got = send(served.port, "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + raw)
    rest = got.partition(b"\r\n\r\n")[2]
    try:
        value = json.loads(rest)
    except ValueError:
        value = None
    return int(got[9:12]), value, got


# What may be sent.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("grammar", "root ::= ("), ("chat_template", "{{ x }}"), ("mirostat_mode", 2), ("json_schema", {}),
        ("store", True), ("n", 2), ("n", 0), ("temperature", -1), ("temperature", "hot"), ("top_p", 1.5),
        ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", True), ("max_tokens", 2**40), ("seed", 2**70),
        ("stop", 3), ("stop", ["a"] * 5), ("stop", [""]), ("logit_bias", {"a": 1}), ("logit_bias", {"1": 101}),
        ("top_logprobs", 21), ("top_logprobs", 5), ("presence_penalty", 3), ("stream", "yes"), ("stream_options", {}),
        ("response_format", {"type": "xml"}), ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": 3}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "s", "schema": {"pattern": "(a+)+$"}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "s", "schema": {"$ref": "http://x/"}}}),
        ("tools", [{"type": "function"}]), ("tools", [{"type": "function", "function": {"name": "a b"}}]),
        ("tool_choice", "auto"), ("user", 3), ("model", 3), ("audio", {}), ("functions", []), ("metadata", [1]),
        ("messages", None), ("messages", []), ("messages", "hi"), ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": "x", "weight": 1}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]),
        ("messages", [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]),
        ("messages", [{"role": "assistant", "tool_calls": [{"id": "1"}]}]),
        ("messages", [{"role": "tool", "content": "x"}]),
    ],
)  # fmt: skip
def test_what_is_not_of_the_api_is_refused_by_its_name(field: str, value: Any) -> None:
    with pytest.raises(Failure) as refused:
        read_body(json.dumps({"messages": USER, field: value}).encode())
    assert refused.value.status == 400 and (refused.value.param or "").startswith(field)
    assert field in refused.value.detail


def defined(**parts: Any) -> dict[str, Any]:
    """A schema that begins with its part `a`."""
    return {"$defs": parts, "$ref": "#/$defs/a"}


A, B = {"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "array", "minItems": 10**9}, "the most"),
        ({"type": "string", "maxLength": 10**7}, "the most"),
        (defined(a=A), "in a circle"),
        (defined(a={"anyOf": [A, {"type": "null"}]}), "in a circle"),
        (defined(a=B, b={"allOf": [A]}), "in a circle"),
        (defined(a={**B, "items": A}, b={}), "beside"),
        (defined(a={"$ref": "#/$defs/a0"}, a30={},
                 **{f"a{n}": {"anyOf": 2 * [{"$ref": f"#/$defs/a{n + 1}"}]} for n in range(30)}), "written out"),
        (defined(a={"anyOf": 2 * [{"items": A}]}), "several branches"),
        ({"$ref": "#/properties/x", "properties": {"x": {}}}, "under `$defs`"),
        (defined(a={"properties": {"next": {"anyOf": [A, {"type": "null"}]}}}), None),
        (defined(a={"properties": {"left": A, "right": A}}), None),
    ],
)  # fmt: skip
def test_a_schema_whose_work_has_no_bound_is_refused(schema: dict[str, Any], says: str | None) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    body = {"messages": USER, "response_format": asked}
    if says is None:
        assert checked(body).schema == schema
        return
    with pytest.raises(Failure, match=re.escape(says)):
        checked(body)


UNFIT: list[dict[str, Any]] = [
    {"enum": []}, {"type": "string", "enum": []}, {"anyOf": []}, {"oneOf": []}, {"allOf": []}, {"type": []},
    {"type": "text"}, {"type": "integer", "enum": ["a"]}, {"const": 1, "type": "string"}, {"const": 1, "enum": [2]},
    {"enum": ['a"b']}, {"enum": ["a\\b"]}, {"enum": ["a\nb"]}, {"const": "\0"}, {"const": "\U0001f600"},
    {"const": {"k": ["\ud800"]}}, {"type": "integer", "const": 10**400, "multipleOf": 0.1},
    *({"type": "object", "properties": {n: {"type": "null"}}} for n in ("", 'a"b\\', "a\tb", "\U0001f600", "$ref")),
    {"type": "object", "required": ["a"]}, {"properties": {"a": True}}, {"properties": {"a": {"description": "x"}}},
    {"properties": {"a": {"enum": []}}}, {"type": "array", "items": {"enum": []}}, {"items": False}, {"items": {}},
    {"additionalProperties": {"enum": []}}, {"anyOf": [{"type": "null"}, {"enum": []}]}, {"minItems": 2},
    {"type": "array", "minItems": 3, "maxItems": 2}, {"type": "string", "minLength": 2.0},
    {"type": "string", "minLength": 3, "maxLength": 2}, {"type": "number", "minimum": 2, "maximum": 1},
    {"type": "number", "minimum": 1, "exclusiveMaximum": 1}, {"type": "integer", "minimum": 0.2, "maximum": 0.8},
    {"type": "integer", "minimum": 10**30}, {"type": "integer", "minimum": 10**400}, {"allOf": [{"enum": ["a"]}]},
    {"type": "string", "anyOf": [{"type": "null"}]}, {"$defs": {"space": {"type": "null"}}, "$ref": "#/$defs/space"},
    {"properties": {"x": {"$ref": "#/$defs/gone"}}}, {"type": "string", "pattern": "^a$"},
    defined(a={"properties": {"next": A}, "required": ["next"]}),
    defined(a={"type": "array", "items": A, "minItems": 1}),
    {"$defs": {"a_b": {"properties": {"next": {"$ref": "#/$defs/a_b"}}}}, "items": {"$ref": "#/$defs/a_b"}},
    {"type": "string", "$defs": {"a": {"enum": []}}}, {"definitions": {}, "$defs": {}, "type": "null"},
]  # fmt: skip
FIT: list[dict[str, Any]] = [
    {}, {"type": "string"}, {"type": ["string", "null"]}, {"enum": ["low", "h\u00f6ch", 1, None]},
    {"const": {"a": [1]}},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 5}, "minItems": 1, "maxItems": 3},
    {"type": "object", "properties": {"a_b": {"anyOf": [{"type": "string", "maxLength": 9}, {"type": "null"}],
     "default": None, "title": "A B"}}, "required": ["a_b"], "additionalProperties": False},
    {"$defs": {"My_Enum": {"enum": ["x"], "type": "string"}}, "properties": {"e": {"$ref": "#/$defs/My_Enum"}}},
    {"$defs": {"T": {"properties": {"n": {"anyOf": [{"$ref": "#/$defs/T"}, {"type": "null"}]}}, "required": ["n"]}},
     "properties": {"t": {"$ref": "#/$defs/T"}}},
    {"allOf": [{"properties": {"a": {"type": "null"}}}, {"properties": {"b": {"type": "null"}}}]},
    {"type": "object", "additionalProperties": {"type": "string", "format": "date"}}, {"type": "array", "minItems": 1},
]  # fmt: skip


@pytest.mark.parametrize("schema", UNFIT)
def test_a_schema_without_a_grammar_that_something_fits_is_refused(schema: dict[str, Any]) -> None:
    where = "response_format.json_schema.schema"
    asked = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    with pytest.raises(Failure, match=re.escape(f"`{where}`")) as refused:
        checked({"messages": USER, "response_format": asked})
    assert refused.value.status == 400 and refused.value.param == where
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with pytest.raises(Failure, match=re.escape("`tools[0].function.parameters`")):
        checked(
            {
                "messages": USER,
                "tools": [tool],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
            }
        )


@pytest.mark.slow
def test_llama_cpp_reads_the_grammar_of_every_schema_that_is_let_through() -> None:
    """The installed converter and parser on random schemas: what ends a model server is a grammar it cannot read."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    rng = random.Random(5)
    names = [
        "a",
        "b",
        "a_b",
        "T",
        "string",
        "root",
        "alternative-0",
        "a-b",
        "*",
        "\u00e9",
        "value",
        "integral_part",
    ]

    def part(depth: int) -> dict[str, Any]:
        simple = [{"type": rng.choice(["string", "integer", "null", "object", "array", "value"])},
                  {"enum": rng.choices(["x", 1, None, "\u00e9", '"', {"a": "b"}], k=rng.randrange(4))},
                  {"$ref": "#/$defs/" + rng.choice(names[:4])}, {}, {"type": "string", "maxLength": rng.randrange(5)},
                  {"type": "string", "format": "date"}]  # fmt: skip
        if depth == 0 or rng.random() < 0.2:
            return rng.choice(simple)
        inner = [part(depth - 1) for _ in range(rng.randrange(1, 4))]
        members = dict(zip(rng.sample(names, len(inner)), inner, strict=True))
        required = [name for name in members if rng.random() < 0.4]
        return rng.choice([{"anyOf": inner}, {"items": inner[0], "minItems": rng.randrange(2)}, {"allOf": inner},
                           {"type": "object", "properties": members, "required": required,
                            "additionalProperties": rng.choice([True, False, inner[0]])}])  # fmt: skip

    seen = 0
    made = ({"$defs": {n: part(1) for n in names[:4]}, **part(2)} for _ in range(150))
    for schema in [*FIT, *made]:
        try:
            check_schema(schema)
        except BadSchema as error:
            assert schema not in FIT, error
            continue
        try:
            text = json_schema_to_gbnf(json.dumps(schema))
        except (
            Exception
        ):  # the server then holds the answer to any JSON, and the gateway's own check to the schema
            assert "$ref" in schema or schema not in FIT
            continue
        grammar = llama_cpp.llama_sampler_init_grammar(None, text.encode(), b"root")
        assert grammar, schema
        llama_cpp.llama_sampler_free(grammar)
        seen += 1
    assert seen > 15


def test_what_has_no_bearing_is_left_out_and_the_rest_goes_on() -> None:
    given = {
        "temperature": 0.5, "max_tokens": 5, "store": False, "metadata": {"a": "b"}, "service_tier": "auto",
        "seed": None, "stop": ["x"], "logit_bias": {"7": -3.5}, "user": "ada",
    }  # fmt: skip
    found = read_body(json.dumps({"messages": USER, **given}).encode())
    assert found.parameters == {"temperature": 0.5, "max_tokens": 5, "stop": ["x"], "logit_bias": {"7": -3.5}}
    dropped = read_body(json.dumps({"messages": USER, "grammar": "x", "top_k": 3}).encode(), unknown="drop")
    assert dropped.parameters == {} and not set(PASSED) & {"grammar", "chat_template", "store"}


@pytest.mark.parametrize(
    "raw",
    [b"[" * 200_000,
     b'{"messages":' * 300 + b"1" + b"}" * 300, b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
     b'{"messages": [{"role": "user", "content": NaN}]}', b"\xff", b"", b'{"a": 1e999}'],
)  # fmt: skip
def test_json_that_is_deep_or_odd_is_a_bad_request(raw: bytes) -> None:
    with pytest.raises(Failure) as refused:
        read_body(raw)
    assert refused.value.status == 400
    nested: Any = "x"
    for _ in range(DEEPEST + 5):
        nested = [nested]
    with pytest.raises(Failure, match="levels"):
        read_body(json.dumps({"messages": USER, "metadata": nested}).encode())


def test_an_unknown_parameter_never_reaches_a_back_end(tmp_path: Path) -> None:
    limits = with_limits(unknown="drop")
    with serving(tmp_path, saying(http(completion())), task=FREE, log=False, limits=limits) as served:
        assert (
            ask(served, {"messages": USER, "grammar": "root ::= (", "chat_template": "x", "top_k": 1})[0]
            == 200
        )
        sent = json.loads(served.seen[0])
        assert set(sent) == {"messages", "model", "temperature"}


# A request's own failure.


@pytest.mark.cli
@pytest.mark.parametrize(
    ("body", "reply"),
    [
        ({"max_tokens": 1}, http(completion("l", finish_reason="length"))),
        ({"max_tokens": 2}, http(completion("lo"))),
        ({"stop": ["w"]}, http(completion("lo"))),
        ({"logit_bias": {"5": -100}}, http(completion("maybe"))),
        ({"temperature": 2}, http(completion("banana"))),
        ({}, http(b'{"error": {"message": "too long"}}', 400)),
        ({}, http(b'{"error": {"message": "bad"}}', 422)),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, http(b'{"error": "needs --jinja"}', 500)),
        ({"messages": [{"role": "assistant", "content": "x"}]}, http(b'{"error": "roles"}', 500)),
    ],
)  # fmt: skip
def test_a_request_that_fails_for_its_own_sake_takes_the_candidate_from_nobody(
    tmp_path: Path, body: dict[str, Any], reply: bytes
) -> None:
    if "max_tokens" in body and body["max_tokens"] == 2:
        reply = reply.replace(b'"completion_tokens": 1', b'"completion_tokens": 2')
    with serving(tmp_path, saying(http(completion())), saying(reply), task=LABELS) as served:
        for _ in range(7):
            assert ask(served, {"messages": USER, **body})[0] in (200, 400, 502)
        assert served.on_loop(served.supervisor.health)["arms"]["candidate"]["breaker"] == "closed"
    lines = [r for r in read_requests(tmp_path / "log") if r.arm == "candidate"]
    assert len(lines) == 7 and all(r.request_fault for r in lines)


@pytest.mark.cli
def test_a_candidate_that_is_to_blame_is_still_broken_off(tmp_path: Path) -> None:
    with serving(
        tmp_path, saying(http(completion())), saying(http(completion("banana"))), task=LABELS
    ) as served:
        for _ in range(6):
            assert ask(served, {"messages": USER, "max_tokens": 50, "seed": 1})[0] == 200
        assert served.on_loop(served.supervisor.health)["arms"]["candidate"]["breaker"] == "open"
    assert not any(r.request_fault for r in read_requests(tmp_path / "log"))


# Back ends.


def usage(value: Any) -> bytes:
    return json.dumps({**json.loads(completion()), "usage": value}).encode()


@pytest.mark.cli
@pytest.mark.parametrize(
    "body",
    [b'{"id": 5, "id": "x"}', b'{"id": [1], "id": {}}', b'{"id": "x", "correct": 3, "correct": {"a": 1}}'],
)
def test_a_key_that_stands_twice_is_a_bad_request(tmp_path: Path, body: bytes) -> None:
    with serving(tmp_path, saying(http(completion())), task=FREE) as served:
        head = HEAD.replace(b"/v1/chat/completions", b"/v1/feedback").replace(b"500", b"%d" % len(body))
        got = send(served.port, head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + body)
        assert got.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "reply",
    [
        http(usage("lots")), http(usage([])), http(usage({"prompt_tokens": "x"})), http(usage(3)),
        http(usage({"prompt_tokens": 3, "prompt_tokens_details": "x"})), http(usage({"completion_tokens": -1})),
        http(completion(logprobs=3)), http(completion(logprobs={"content": [{"logprob": "x"}]})),
        http(completion(finish_reason=5)),
    ],
)  # fmt: skip
def test_odd_figures_of_a_back_end_cost_no_answer(tmp_path: Path, reply: bytes) -> None:
    with serving(tmp_path, saying(http(completion("high"))), saying(reply), task=LABELS, log=False) as served:
        status, body, _ = ask(served)
        assert status == 200 and body["choices"][0]["message"]["content"] == "low"
        status, _, raw = ask(
            served, {"messages": USER, "stream": True, "stream_options": {"include_usage": True}}
        )
        assert status == 200 and b"low" in raw and b"[DONE]" in raw


@pytest.mark.parametrize(
    "reply",
    [
        http(b'{"choices": []}'), http(b'{"choices": {}}'), http(b'{"choices": [3]}'), http(b'{"choices": [{}]}'),
        http(b'{"choices": [{"message": "x"}]}'), http(completion(7)), http(b"[" * 5000), http(b"null"),
        http(b'{"choices": [{"message": {"content": "\\ud800"}}]}'), http(b"\xff\xfe"), http(b'{"x": NaN}'),
        http(completion("low"), 202), http(b'{"error": {"message": "later"}}', 202), http(b"", 204),
        http(b"", 302, more="Location: http://127.0.0.1:1/v1\r\n"), http(b"", 301, more="Location: /x\r\n"),
        http(b'{"error": "no key"}', 401), http(b'{"error": "who"}', 404), http(b"oops", 599),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_answer_falls_back_whatever_it_is(tmp_path: Path, reply: bytes, stream: bool) -> None:
    with serving(tmp_path, saying(http(completion("high"))), saying(reply), task=FREE, log=False) as served:
        status, _, raw = ask(served, {"messages": USER, "stream": stream})
        assert status == 200 and b"x-unshot-arm: baseline" in raw and b"high" in raw
    with serving(tmp_path / "alone", saying(reply), task=FREE, log=False) as served:
        status, body, _ = ask(served, {"messages": USER, "stream": stream})
        assert status == 502 and body["error"]["message"]


def events(*chunks: Any, end: bytes = b"data: [DONE]\n\n") -> bytes:
    text = b"".join(b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks)
    return http(text + end, kind="text/event-stream")


@pytest.mark.parametrize("delta", ["x", 3, [], {"content": 5}, {"content": ["a"]}, {"tool_calls": 3}])
def test_an_odd_delta_falls_back(tmp_path: Path, delta: Any) -> None:
    good = events({"choices": [{"index": 0, "delta": {"content": "high"}}]})
    bad = events({"choices": [{"index": 0, "delta": delta}]})
    with serving(tmp_path, saying(good), saying(bad), task=FREE, log=False) as served:
        status, _, raw = ask(served, {"messages": USER, "stream": True})
        assert status == 200 and b"high" in raw and b"x-unshot-arm: baseline" in raw


def test_odd_but_harmless_chunks_pass(tmp_path: Path) -> None:
    play = saying(events(
        {"choices": None}, {"choices": [{"index": "a", "delta": None}]}, {"choices": [{"delta": {"content": "low"}}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": "none"}, end=b"",
    ))  # fmt: skip
    with serving(tmp_path, play, task=FREE, log=False) as served:
        status, _, raw = ask(served, {"messages": USER, "stream": True})
        assert status == 200 and b'"content":"low"' in raw and b"error" not in raw and b"[DONE]" in raw


def test_a_back_end_that_refuses_stream_options_streams_without(tmp_path: Path) -> None:
    async def play(head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        if b"stream_options" in body:
            writer.write(http(b'{"error": {"message": "unknown field stream_options"}}', 400))
        else:
            writer.write(events({"choices": [{"index": 0, "delta": {"content": "low"}}]}))

    with serving(tmp_path, play, task=FREE, log=False) as served:
        for _ in range(2):
            assert b'"content":"low"' in ask(served, {"messages": USER, "stream": True})[2]
        assert sum(b"stream_options" in body for body in served.seen) == 1


def test_a_back_end_that_does_not_stream_is_streamed(tmp_path: Path) -> None:
    with serving(tmp_path, saying(http(completion("low"))), task=FREE, log=False) as served:
        raw = ask(served, {"messages": USER, "stream": True})[2]
        assert b'"content":"low"' in raw and b"[DONE]" in raw


def test_tool_calls_are_kept_in_a_labelled_stream(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    reply = json.dumps({"choices": [{"message": message, "finish_reason": "tool_calls"}]}).encode()
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    with serving(tmp_path, saying(http(reply)), task=LABELS, log=False) as served:
        raw = ask(served, {"messages": USER, "tools": tools, "stream": True})[2]
        assert b'"tool_calls":[{"index":0,"id":"c1"' in raw and b'"finish_reason":"tool_calls"' in raw


def test_a_kept_connection_that_was_closed_is_no_failure(tmp_path: Path) -> None:
    """The server closes each connection when the second request comes over it."""
    # By the writer itself: the address of a freed one may come again.
    used: dict[asyncio.StreamWriter, int] = {}

    async def play(head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        count = used[writer] = used.get(writer, 0) + 1
        if count > 1:
            writer.transport.abort()
            return
        writer.write(http(completion()))

    with serving(tmp_path, play, task=FREE, log=False) as served:
        assert [ask(served)[0] for _ in range(12)] == [200] * 12


def test_a_model_name_beyond_latin_1_reaches_the_headers_escaped(tmp_path: Path) -> None:
    with serving(tmp_path, saying(http(completion())), task=FREE, model="模型", log=False) as served:
        status, _, raw = ask(served)
        assert status == 200 and b"x-unshot-version: %E6%A8%A1%E5%9E%8B" in raw


def test_health_is_honest_about_a_server_that_is_gone(tmp_path: Path) -> None:
    async def broken(head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.close()

    with serving(tmp_path, broken, task=FREE, log=False) as served:
        assert (
            b"200"
            in send(served.port, b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")[
                :15
            ]
        )
        backend = served.gateway.routing.baseline
        backend._url = "http://127.0.0.1:9"  # nobody listens there any more
        asyncio.run_coroutine_threadsafe(backend.check_health(), served.loop).result(20)
        got = send(served.port, b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        assert b" 503 " in got[:15] and b'"up":false' in got


# Sources.


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (("Host: evil.example",), 421), (("Host: 127.0.0.1.evil.example",), 421), (("Host: ",), 421),
        (("Host: localhost:8080",), 200), (("Host: [::1]:80",), 200), (("Origin: http://evil.example",), 403),
        (("Origin: null",), 403), (("Host: localhost", "Origin: http://localhost"), 200),
        (("Origin: https://app.example",), 200), (("Host: gateway.example",), 200),
        (("Content-Type: text/plain",), 415), (("Content-Type: application/x-www-form-urlencoded",), 415),
        (("Content-Type: application/json; charset=utf-8",), 200),
    ],
)  # fmt: skip
def test_pages_of_other_sites_get_nothing(tmp_path: Path, headers: tuple[str, ...], status: int) -> None:
    limits = with_limits(hosts=("gateway.example",), origins=("https://app.example",))
    with serving(tmp_path, saying(http(completion())), task=FREE, limits=limits, log=False) as served:
        assert ask(served, None, *headers)[0] == status


def test_an_open_address_goes_by_addresses_and_its_names() -> None:
    def own(name: str, **fields: Any) -> bool:
        api = app.Api(None, with_limits(host="0.0.0.0", **fields), dict)  # type: ignore[arg-type]
        return api._own_name(name)

    assert own("10.0.0.7") and not own("evil.example") and own("gw", hosts=("gw",))
    assert own("evil.example", key="k") and not own("evil.example", key="k", hosts=("gw",))


# Bodies that do not come.


def half(port: int, text: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(text)
    return connection


def everything(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: 500\r\n\r\n"
)


def test_bodies_that_do_not_come_take_no_place(tmp_path: Path) -> None:
    limits = with_limits(concurrency=2, read_timeout=1.5)
    with serving(tmp_path, saying(http(completion())), task=FREE, limits=limits, log=False) as served:
        idle = [half(served.port, HEAD + b'{"mess') for _ in range(20)] + [
            half(served.port, b"") for _ in range(20)
        ]
        assert ask(served)[0] == 200 and served.api.active == 0
        late = everything(idle[0])
        assert b" 408 " in late[:15] and b"did not come" in late
        for connection in idle[20:]:
            assert connection.recv(10) == b""  # cut, without a word from the client
        for connection in idle:
            connection.close()


def test_who_reads_nothing_loses_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeadlineProtocol, "write_timeout", 0.3)
    word = b'data: {"choices": [{"index": 0, "delta": {"content": "%s"}}]}\n\n' % (b"x" * 10_000)

    async def play(head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 X\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(3000):
                writer.write(word)
                await writer.drain()
        writer.close()

    body = json.dumps({"messages": USER, "stream": True}).encode()
    with serving(tmp_path, play, task=FREE, limits=with_limits(concurrency=2), log=False) as served:
        deaf = [half(served.port, HEAD.replace(b"500", b"%d" % len(body)) + body) for _ in range(2)]
        assert until(lambda: served.api.active == 2)
        assert until(lambda: served.api.active == 0)
        for connection in deaf:
            connection.close()


def test_a_request_sent_behind_another_does_not_cost_that_one_its_answer(tmp_path: Path) -> None:
    answered = http(completion())

    async def play(head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1.5)
        writer.write(answered)

    body = json.dumps({"messages": USER}).encode()
    whole = HEAD.replace(b"500", b"%d" % len(body)) + body
    limits = with_limits(read_timeout=0.2)
    with serving(tmp_path, play, task=FREE, limits=limits, log=False, timeout=10.0) as served:
        for behind in (whole[:20], whole[:-5]):  # half a head, half a body
            connection = half(served.port, whole + behind)
            got = everything(connection)  # up to the end: the half one is cut
            assert b" 200 " in got[:15] and completion()[:5] in got
            connection.close()


def test_a_length_beyond_the_limit_is_refused_before_the_body(tmp_path: Path) -> None:
    limits = with_limits(body=1000, read_timeout=30.0)
    with serving(tmp_path, saying(http(completion())), task=FREE, limits=limits, log=False) as served:
        connection = half(served.port, HEAD.replace(b"500", b"999999999999"))
        assert b" 413 " in connection.recv(65536)[:15]
        connection.close()


def test_stopping_waits_for_no_body(tmp_path: Path) -> None:
    limits = with_limits(read_timeout=60.0)
    with serving(tmp_path, saying(http(completion())), task=FREE, limits=limits, log=False) as served:
        connection = half(served.port, HEAD)
        assert until(lambda: bool(served.api._reading))
        served.loop.call_soon_threadsafe(served.api.stop)
        got = everything(connection)
        assert b" 503 " in got[:15] and b"stopping" in got
        connection.close()
    assert with_deadline(3.0).read_timeout == 3.0  # type: ignore[attr-defined]


def test_what_is_out_of_scope_is_refused_by_name(tmp_path: Path) -> None:
    with serving(tmp_path, saying(http(completion())), task=FREE, log=False) as served:
        for path, word in (("/v1/responses", "responses API"), ("/v1/embeddings", "embeddings")):
            status, body, _ = ask(served, path=path)
            assert status == 404 and word in body["error"]["message"]


# The log.


@pytest.mark.cli
def test_without_texts_a_free_answer_is_no_label_and_a_tag_is_plain(tmp_path: Path) -> None:
    task = TaskSettings(name="case", answer_field="name", instruction="x")
    reply = http(completion('{"name": "Jane Roe, 4 Privet Drive"}'))
    with serving(tmp_path, saying(reply), task=task) as served:
        assert ask(served, None, "x-unshot-slice: =HYPERLINK(evil) ada@example.com")[0] == 200
    (line,) = read_requests(tmp_path / "log")
    assert line.label is None and line.schema_ok is True and line.slice == "_HYPERLINK_evil_ [EMAIL]"
    everything = "".join(p.read_text() for p in (tmp_path / "log").iterdir())
    assert "Jane" not in everything and "ada@" not in everything


def test_tags_hold_nothing_that_acts() -> None:
    assert (
        tag("\x1b[31mred", "US") == "_[31mred" and tag("x" * 500, "US") == "x" * 64 and tag("+1", "US") == "1"
    )
    entry = clean(Feedback(id="x", time=1, correction="call 415 555 2671", by="[/x] ada@example.com"), "US")
    assert isinstance(entry, Feedback) and entry.correction == "call [PHONE]" and "ada" not in entry.by


@pytest.mark.cli
def test_the_log_counts_what_it_loses_and_goes_on(tmp_path: Path) -> None:
    counts: dict[str, int] = {}
    warned: list[str] = []
    log = RequestLog(
        LogSettings(tmp_path, texts=True, longest_text=100),
        counted=lambda o: counts.update({o: counts.get(o, 0) + 1}),
        warn=warned.append,
    )
    log.put(request(1, input="mail ada@example.com " + "x" * 500, answer="y"))
    assert until(lambda: counts.get("written") == 1)
    (line,) = read_requests(tmp_path)
    assert line.cut and line.input is not None and "[EMAIL]" in line.input and len(line.input) <= 100
    log._process.kill()
    log._process.wait()
    for n in range(2, 30):
        log.put(request(n))
        time.sleep(0.01)
    assert until(lambda: counts.get("written", 0) + counts.get("lost", 0) == 29)
    assert counts["lost"] >= 1 and any("started again" in w for w in warned)
    log.close()
    assert len(list(read_requests(tmp_path))) == counts["written"]


@pytest.mark.cli
def test_lines_that_come_together_are_written_together_whole_or_not_at_all_and_each_is_counted(
    tmp_path: Path,
) -> None:
    lines = [f"R{request(n, input='x' * 40).to_json()}\n".encode() for n in range(200)]
    odd = [b"\n", b"R{}\n", b"R" + b"[" * 5000 + b"\n"]
    torn = b'R{"id": "half'

    def wrote(folder: Path, limit: int | None) -> Counter[str]:
        """Every answer of a writer whose files may hold `limit` bytes."""
        done = subprocess.run(
            command("deploy.serve.log_worker", str(folder), "US"),
            input=b"".join([*lines, *odd, torn]),
            capture_output=True,
            env=environment(),
            preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
            check=True,
        )
        return Counter(done.stdout.decode().splitlines())

    whole = wrote(tmp_path / "whole", None)
    assert whole == {"written": 200, "failed RecordError": 3}
    assert [r.id for r in read_requests(tmp_path / "whole")] == [f"r{n}" for n in range(200)]
    (size,) = (p.stat().st_size for p in (tmp_path / "whole").glob("requests-*"))
    full = wrote(tmp_path / "full", size // 2)
    assert full["written"] + full["failed File too large"] == 200 and 90 < full["written"] < 110
    unreadable = Unreadable()
    assert len(list(read_requests(tmp_path / "full", unreadable))) == full["written"] and not unreadable.lines


@pytest.mark.cli
def test_a_phone_region_is_read_in_any_case_and_an_unknown_one_refused(tmp_path: Path) -> None:
    from unshot.data.personal import check_region, redacted
    from unshot.errors import InputError

    assert (
        check_region(" gb ") == "GB" and redacted("ring 020 7946 0958", check_region("gb")) == "ring [PHONE]"
    )
    for bad in ("XX", "Germany", "", "1"):
        with pytest.raises(InputError, match="phone-region"):
            check_region(bad)


def test_redaction_of_a_long_text_finds_what_a_short_one_holds() -> None:
    from unshot.data.personal import redacted

    filler = "lorem ipsum 12 "
    text = (filler * 120 + "mail ada@example.com, GB82 WEST 1234 5698 7654 32, +1 415 555 2671. ") * 3
    got = redacted(text)
    assert got.count("[EMAIL]") == got.count("[IBAN]") == got.count("[PHONE]") == 3
    for cut in range(0, 60, 7):  # wherever the windows fall
        assert "ada@" not in redacted("x" * (1990 - cut) + " ada@example.com " + "y" * 500)


# The client's own long prompt.

PROMPT = Prompt(
    system="Say low or high.", examples=(Example(({"role": "user", "content": "no cap"},), "high", 1),)
)
FRONT = [{"role": "system", "content": "Say low or high."}, {"role": "user", "content": "no cap"},
         {"role": "assistant", "content": "high"}]  # fmt: skip


def test_the_known_prompt_is_found_exactly_or_not_at_all() -> None:
    assert own_messages([*FRONT, *USER], PROMPT) == USER
    parts = [{**FRONT[0], "content": [{"type": "text", "text": "Say low or high."}]}, *FRONT[1:]]
    assert own_messages([*parts, *USER], PROMPT) == USER
    for other in (
        [{**FRONT[0], "content": "Say low or high. "}, *FRONT[1:], *USER],
        [{**FRONT[0], "role": "developer"}, *FRONT[1:], *USER],
        [*FRONT[:2], *USER], [*FRONT], [*USER], [*FRONT, FRONT[0], *USER], [FRONT[1], FRONT[0], FRONT[2], *USER],
    ):  # fmt: skip
        assert own_messages(other, PROMPT) is None
    assert own_messages(USER, Prompt()) is None
    assert in_template("Clause: abc\nAnswer:", "Clause: {{text}}\nAnswer:") == "abc"
    assert in_template("Clause: abc\nAnswer!", "Clause: {{text}}\nAnswer:") is None
    assert in_template("Sort.\n\nabc", "Sort.") == "abc"


def test_a_slot_that_no_request_fills_is_said_or_refused(tmp_path: Path) -> None:
    template = tmp_path / "prompt.txt"
    template.write_text("Title: {{title}}\nText: {{text}}", encoding="utf-8")
    registry = Registry(tmp_path / "store")
    two = Resolver(Case(task=TaskSettings(examples=template)), registry, None, None)
    with pytest.raises(InputError, match="has the slots title, text, and a user's message fills one"):
        two.resolve("baseline", ArmSpec("http://127.0.0.1:9/v1"), None, registry.state())
    dated = Resolver(Case(task=TaskSettings(system="Today is {{day}}.")), registry, None, None)
    (line,) = dated.unfilled()
    assert "the case's system prompt has the slot `{{day}}`" in line


@pytest.mark.cli
def test_a_recording_gateway_passes_on_and_replaces_only_the_known_prompt(tmp_path: Path) -> None:
    """The official way: same calls before, during and after; the candidate gets the short prompt."""
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "no cap", "completion": "high"}\n')
    task = TaskSettings(
        name="case", labels=["low", "high"], system="Say low or high.", examples=few, instruction="Risk?"
    )
    raw = {
        "messages": [*FRONT, *USER],
        "model": "gpt-4o",
        "temperature": 0.3,
        "store": True,
        "metadata": {"a": "b"},
    }
    play, candidate = saying(http(completion("high"))), saying(http(completion("low")))
    with serving(tmp_path / "a", play, task=task, record=True, texts=True) as served:
        status, body, _ = ask(served, raw, "Authorization: Bearer sk-client-own-key-123")
        assert (
            status == 200 and body["model"] == "gpt-4o" and body["choices"][0]["message"]["content"] == "high"
        )
        assert json.loads(served.seen[0]) == raw
    (line,) = read_requests(tmp_path / "a" / "log")
    assert line.messages is not None and [m.content for m in line.messages][:1] == ["Say low or high."]
    assert "sk-client" not in "".join(p.read_text() for p in (tmp_path / "a" / "log").iterdir())
    with serving(tmp_path / "b", play, candidate, task=task, record=True) as served:
        assert ask(served, raw)[1]["choices"][0]["message"]["content"] == "low"
        sent = json.loads(served.seen[-1])
        assert [m["content"] for m in sent["messages"]] == ["Risk?", "hi"] and "store" not in sent
        other = {**raw, "messages": [{"role": "system", "content": "Another prompt."}, *USER]}
        status, body, got = ask(served, other)
        assert status == 200 and b"x-unshot-arm: baseline" in got and json.loads(served.seen[-1]) == other
        assert b"x-unshot-arm: baseline" in ask(served, {**raw, "n": 2})[2], (
            "what the candidate does not take"
        )
    lines = list(read_requests(tmp_path / "b" / "log"))
    assert [(r.arm, r.share) for r in lines] == [("candidate", 1.0), ("baseline", 0.0), ("baseline", 0.0)]


@pytest.mark.cli
@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": "x"},
        {"type": "json_schema", "json_schema": {"name": "s"}},
        {"type": "json_schema", "json_schema": {"name": "s", "schema": {"required": -1}}},
        {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "nothing"}}},
        {"type": "json_schema", "json_schema": {"name": "s", "schema": []}},
        "json_schema",
        [],
    ],
)
def test_a_recording_gateway_leaves_an_odd_response_format_to_the_api(tmp_path: Path, wanted: Any) -> None:
    for stream in (False, True):
        with serving(
            tmp_path / str(stream), saying(http(completion())), saying(http(completion())), task=FREE, record=True,
            share=0.5,
        ) as served:  # fmt: skip
            for user in "abcdef":  # drawn into both arms
                body = {"messages": USER, "user": user, "response_format": wanted, "stream": stream}
                status = ask(served, body)[0]
                assert status == 200
            assert json.loads(served.seen[-1])["response_format"] == wanted
            assert not served.warnings


@pytest.mark.parametrize("spec", ["gguf:model.gguf", "champion", "v1"])
def test_only_an_api_gets_what_nobody_checked(spec: str) -> None:
    options = ServeOptions(ArmOptions(spec), ArmOptions(), record=True)
    with pytest.raises(InputError, match="unchecked"):
        arm_specs(options, has_registry=True)


def test_a_schema_asked_for_is_checked() -> None:
    schema = {
        "type": "object",
        "required": ["a"],
        "additionalProperties": False,
        "properties": {"a": {"type": "string"}},
    }
    checker = Checker(Task()).with_schema(schema)
    assert checker.check('{"a": "x"}')[0] is True and checker.check('{"a": 1}')[0] is False
    assert checker.check("[" * 100_000)[0] is False


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("\uff21\uff24\uff21\uff20example.com", "[EMAIL]"), ("mailto:ada%40example.com", "mailto:[EMAIL]"),
        ("4111\u00a01111\u00a01111\u00a01111", "[CARD]"), ("+49\u202f89\u202f1234567", "[PHONE]"),
        ("4111\u20111111\u20111111\u20111111", "[CARD]"), ("GB29\u00a0NWBK\u00a060161331926819", "[IBAN]"),
    ],
)  # fmt: skip
def test_personal_data_in_other_signs_is_found_too(text: str, left: str) -> None:
    pytest.importorskip("phonenumbers")
    from unshot.data.personal import redacted

    assert redacted(text) == left and redacted(f"one {text} two") == f"one {left} two"


def test_secrets_by_other_names_and_in_fragments_are_hidden() -> None:
    from unshot.secret import hide, is_secret

    assert hide("https://h/v1#access_token=abc") == "https://h/v1#access_token=[SECRET]"
    assert hide("https://h/?sig=abc&x=1") == "https://h/?sig=[SECRET]&x=1"
    assert all(map(is_secret, ("x-auth", "pwd", "session_id"))) and not is_secret("author")
