"""The forms of request logs, each with how its rows become calls.

A form is one entry of `LOG_FORMATS`. Shapes as documented on 2026-11-26 by OpenAI (chat completions, batch, stored
completions), LiteLLM (StandardLoggingPayload), Langfuse (observations), LangSmith (run data format), Helicone (export)
and OpenTelemetry (GenAI semantic conventions 1.37, and the attributes of OpenLLMetry before it).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from unshot.data.example import Message
from unshot.data.files import Problem
from unshot.data.messages import Parsed, Row, read_messages

LANGCHAIN_ROLES = {
    "system": "system", "human": "user", "ai": "assistant", "tool": "tool", "SystemMessage": "system",
    "HumanMessage": "user", "AIMessage": "assistant", "AIMessageChunk": "assistant", "ToolMessage": "tool",
}  # fmt: skip

# Parts of a message that are its text.
TEXTS = ("text", "output_text", "input_text")


@dataclass
class Call:
    """One request. `time` is seconds since 1970, UTC; `answer` None where there is no text; `failed` was not answered.

    `id` joins a request to an answer that stands elsewhere (batch files, stored completions).
    """

    messages: list[Message]
    answer: str | None = None
    time: float | None = None
    model: str | None = None
    output_tokens: int | None = None
    failed: bool = False
    id: str | None = None


@dataclass(frozen=True)
class LogFormat:
    """One form of a log: its name, how a row of it is known, and the calls in a row."""

    name: str
    matches: Callable[[Row], bool]
    parse: Callable[[Row], list[Call]]


def chat(value: object) -> list[Message]:
    """A list of chat messages; a text is a user's."""
    if isinstance(value, str):
        loaded = loads(value)
        if isinstance(loaded, list | dict):
            value = loaded
        elif value.strip():
            return [{"role": "user", "content": value}]
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if isinstance(value, dict) and "role" in value:
        value = [value]
    if isinstance(value, list) and value and all(_is_plain(m) for m in value):
        return value
    return read_messages(Parsed([]), value, "messages")


def _is_plain(message: object) -> bool:
    """Whether a message is as it should be already; most of a large log's are."""
    return (
        isinstance(message, dict)
        and len(message) == 2
        and message.get("role") in ("system", "user", "assistant")
        and isinstance(message.get("content"), str)
    )


def loads(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def text_of(value: object) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def answer_of(value: object) -> str | None:
    """The text of an answer: a text, a message, a completion of any of the known APIs; None where it was cut off."""
    if isinstance(value, str):
        loaded = loads(value) if value.lstrip().startswith(("{", "[")) else None
        return answer_of(loaded) if isinstance(loaded, dict) and _is_answer(loaded) else text_of(value)
    if isinstance(value, list) and value:
        if all(isinstance(part, dict) and "type" in part and "role" not in part for part in value):
            return text_of(
                "".join(str(part["text"]) for part in value if part.get("text") and part["type"] in TEXTS)
            )
        return answer_of(value[0])
    if isinstance(value, dict):
        if value.get("stop_reason") == "max_tokens" or value.get("status") == "incomplete":
            return None
        if isinstance(value.get("choices"), list) and value["choices"]:
            choice = value["choices"][0]
            if not isinstance(choice, dict) or choice.get("finish_reason") == "length":
                return None
            return answer_of(choice.get("message", choice.get("text")))
        if isinstance(
            value.get("output"), list
        ):  # the Responses API: reasoning and calls stand beside the message
            said = [
                item for item in value["output"] if isinstance(item, dict) and item.get("type") == "message"
            ]
            return answer_of(said[-1].get("content")) if said else None
        for key in ("message", "content", "text"):
            if key in value:
                return answer_of(value[key])
    return None


def _is_answer(value: dict[str, Any]) -> bool:
    return "choices" in value or ("role" in value and "content" in value)


def _count(value: object) -> int | None:
    return (
        int(value) if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 else None
    )


def _usage(value: object) -> int | None:
    """Output tokens as an API or a tracing tool reports them."""
    usage = value if isinstance(value, dict) else {}
    return next(
        (
            n
            for key in ("completion_tokens", "output_tokens", "output")
            if (n := _count(usage.get(key))) is not None
        ),
        None,
    )


def seconds(value: object) -> float | None:
    """Seconds since 1970 from seconds, milli-, micro- or nanoseconds, or ISO 8601 (UTC where no zone is given)."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        try:
            date = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
        except ValueError:
            return None
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    for limit, unit in ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3)):
        if number >= limit:
            return number / unit
    return number if number >= 1e8 else None


def _has(row: Row, *names: str) -> bool:
    return all(name in row for name in names)


def _body(value: object) -> dict[str, Any]:
    """A request's or response's body: the object, its JSON, or what stands under `body` or `json`."""
    if isinstance(value, str):
        value = loads(value)
    if not isinstance(value, dict):
        return {}
    for key in ("body", "json"):
        inner = value.get(key)
        if isinstance(inner, dict | str) and "messages" not in value and "choices" not in value:
            return _body(inner)
    return value


def _failed(response: object, status: object = None) -> bool:
    code = _count(status)
    error = response.get("error") if isinstance(response, dict) else None
    return bool(error) or (code is not None and code >= 400)


def _pair(request: dict[str, Any], response: dict[str, Any], **facts: Any) -> Call:
    if "messages" not in request and "input" not in request and "prompt" not in request:
        raise Problem("a request without messages")
    source = request.get("messages", request.get("input", request.get("prompt")))
    messages = chat(source)
    # The Responses API has the system prompt beside the input, Anthropic's beside the messages.
    system = request.get("instructions") or request.get("system")
    if instructions := answer_of(system):
        messages = [{"role": "system", "content": instructions}, *messages]
    elif system:
        raise Problem("a system prompt that is no text")
    call = Call(
        messages, answer_of(response), seconds(response.get("created")),
        text_of(request.get("model")) or text_of(response.get("model")), _usage(response.get("usage")),
    )  # fmt: skip
    for name, value in facts.items():
        if value is not None:
            setattr(call, name, value)
    return call


def _request_response(row: Row) -> list[Call]:
    response = (
        _body(row["response"])
        if isinstance(row["response"], dict)
        else {"choices": [{"text": row["response"]}]}
    )
    time = next((t for key in ("time", "timestamp", "created_at") if (t := seconds(row.get(key)))), None)
    status = (
        row["response"].get("status_code", row["response"].get("status"))
        if isinstance(row["response"], dict)
        else None
    )
    request = _body(row["request"]) if "request" in row else dict(row)
    return [_pair(request, response, time=time, failed=_failed(response, status) or None)]


def _batch_request(row: Row) -> list[Call]:
    return [_pair(_body(row["body"]), {}, id=str(row["custom_id"]))]


def _batch_answer(row: Row) -> list[Call]:
    response = row["response"] if isinstance(row["response"], dict) else {}
    body = _body(response)
    failed = bool(row.get("error")) or _failed(body, response.get("status_code"))
    return [
        Call([], answer_of(body), seconds(body.get("created")), text_of(body.get("model")), _usage(body.get("usage")),
             failed, str(row["custom_id"]))
    ]  # fmt: skip


def _stored(row: Row) -> list[Call]:
    """A stored completion, its messages inside or in a file of their own."""
    answer = Call(
        [],
        answer_of(row),
        seconds(row.get("created")),
        text_of(row.get("model")),
        _usage(row.get("usage")),
        id=str(row["id"]),
    )
    messages = row.get("messages", row.get("input"))
    if isinstance(messages, dict):
        messages = messages.get("data")
    if not messages:
        return [answer]
    answer.messages, answer.id = chat(messages), None
    return [answer]


def _stored_message(row: Row) -> list[Call]:
    """One message of a stored completion: its id is the completion's with a number."""
    content = row.get("content_parts") or row.get("content")
    return [Call(chat([{"role": row["role"], "content": content}]), id=str(row["id"]).rpartition("-")[0])]


def _litellm(row: Row) -> list[Call]:
    failed = str(row.get("status", "success")) not in ("success", "")
    response = row.get("response")
    messages = row.get("messages")
    if not messages or messages == "{}":
        messages = _body(row.get("proxy_server_request")).get("messages")
    usage = _count(row.get("completion_tokens"))
    model = text_of(row.get("model"))
    return [
        Call(chat(messages), answer_of(response), seconds(row.get("startTime")),
             model.rpartition("/")[2] if model else None, usage, failed)
    ]  # fmt: skip


def _langfuse(row: Row) -> list[Call]:
    if str(row.get("type", "GENERATION")).upper() != "GENERATION":
        return []
    usage = _usage(_value(row.get("usageDetails"))) or _usage(_value(row.get("usage")))
    failed = str(row.get("level", "")).upper() == "ERROR"
    time = seconds(row.get("startTime", row.get("start_time")))
    return [
        Call(chat(row["input"]), answer_of(row.get("output")), time, text_of(row.get("model")), usage, failed)
    ]


def _value(value: object) -> object:
    return loads(value) if isinstance(value, str) else value


def _langsmith(row: Row) -> list[Call]:
    if row["run_type"] != "llm":
        return []
    inputs, outputs = _value(row["inputs"]), _value(row.get("outputs"))
    messages = inputs.get("messages", inputs.get("prompts")) if isinstance(inputs, dict) else None
    if isinstance(messages, list) and messages and isinstance(messages[0], list):
        messages = messages[0]
    if isinstance(messages, list):
        messages = [_langchain(m) for m in messages]
    answer = outputs
    if isinstance(outputs, dict) and isinstance(outputs.get("generations"), list):
        first = outputs["generations"]
        while isinstance(first, list) and first:
            first = first[0]
        answer = first.get("text") or _langchain(first.get("message")) if isinstance(first, dict) else None
    extra = row.get("extra")
    settings: Any = extra.get("invocation_params") if isinstance(extra, dict) else None
    model = settings.get("model", settings.get("model_name")) if isinstance(settings, dict) else None
    model = model or (inputs.get("model") if isinstance(inputs, dict) else None)
    usage = _count(row.get("completion_tokens"))
    return [
        Call(
            chat(messages),
            answer_of(answer),
            seconds(row.get("start_time")),
            text_of(model),
            usage,
            bool(row.get("error")),
        )
    ]


def _langchain(message: object) -> object:
    """A message as LangChain serialises it, as role and content."""
    if not isinstance(message, dict) or "role" in message:
        return message
    own: Any = message.get("kwargs", message.get("data", message))
    kind = message["id"][-1] if isinstance(message.get("id"), list) else message.get("type", own.get("type"))
    return {"role": LANGCHAIN_ROLES.get(str(kind), str(kind)), "content": own.get("content")}


def _helicone(row: Row) -> list[Call]:
    request, response = _body(row["request_body"]), _body(row.get("response_body"))
    status = row.get("response_status")
    tokens = _count(row.get("completion_tokens"))
    return [
        _pair(request, response, time=seconds(row.get("request_created_at")), output_tokens=tokens,
              failed=_failed(response, status) or None)
    ]  # fmt: skip


def _gateway(row: Row) -> list[Call]:
    """A line of `unshot deploy serve`: the shown answer of each request, and its whole prompt in record mode."""
    if row.get("shadow"):
        return []
    source = row.get("messages") or row.get("input")
    if not source:
        raise Problem("a request without its text (serve with the log of texts on)")
    if row.get("cut"):
        raise Problem("a request whose text the log cut, being too long for it")
    failed = bool(row.get("error"))
    return [
        Call(
            chat(source),
            text_of(row.get("answer")),
            seconds(row.get("time")),
            None,
            _count(row.get("completion_tokens")),
            failed,
        )
    ]


def _attributes(value: object) -> dict[str, Any]:
    """OTLP's list of keys and typed values as a dict."""
    if isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for item in value if isinstance(value, list) else []:
        found[item.get("key")] = _otlp(item.get("value"))
    return found


def _otlp(value: object) -> object:
    if not isinstance(value, dict):
        return value
    if "arrayValue" in value:
        return [_otlp(v) for v in value["arrayValue"].get("values", [])]
    if "kvlistValue" in value:
        return _attributes(value["kvlistValue"].get("values", []))
    kind, inner = next(iter(value.items()), ("", None))
    return int(str(inner)) if kind == "intValue" else inner


def _spans(row: Row) -> Iterator[Row]:
    for resource in row.get("resourceSpans", []):
        for scope in resource.get("scopeSpans", []):
            yield from scope.get("spans", [])


def _otel(row: Row) -> list[Call]:
    spans = list(_spans(row)) if "resourceSpans" in row else [row]
    return [call for span in spans if (call := _span(span)) is not None]


def _span(span: Row) -> Call | None:
    facts = _attributes(span.get("attributes"))
    if not any(str(k).startswith("gen_ai.") for k in facts):
        return None
    events: dict[str, Any] = {}
    for event in span.get("events") or []:
        if isinstance(event, dict):
            events |= _attributes(event.get("attributes"))
    facts = {**events, **facts}
    if "gen_ai.input.messages" in facts:
        parts = [*_otel_messages(facts.get("gen_ai.system_instructions"), "system"),
                 *_otel_messages(facts["gen_ai.input.messages"])]  # fmt: skip
        told = _value(facts.get("gen_ai.output.messages"))
        answers = _otel_messages(told)
        cut = isinstance(told, list) and bool(told) and told[0].get("finish_reason") == "length"
        answer = answers[0]["content"] if answers and not cut else None
    else:
        parts = _numbered(facts, "gen_ai.prompt")
        told = _numbered(facts, "gen_ai.completion", role="assistant")
        answer = told[0]["content"] if told else None
    if not parts:
        raise Problem("a span without its messages (switch the capture of content on)")
    status = span.get("status")
    failed = bool(facts.get("error.type")) or (
        isinstance(status, dict) and status.get("code") in (2, "STATUS_CODE_ERROR")
    )
    time = seconds(span.get("startTimeUnixNano", span.get("start_time", span.get("startTime"))))
    model = text_of(facts.get("gen_ai.request.model")) or text_of(facts.get("gen_ai.response.model"))
    tokens = _count(facts.get("gen_ai.usage.output_tokens", facts.get("gen_ai.usage.completion_tokens")))
    return Call(chat(parts), text_of(answer), time, model, tokens, failed)


def _otel_messages(value: object, role: str | None = None) -> list[dict[str, Any]]:
    """Messages of the semantic conventions: `{role, parts: [{type, content}]}`; instructions are parts alone."""
    value = _value(value)
    if not isinstance(value, list) or not value:
        return []
    if role is not None:
        value = [{"role": role, "parts": value}]
    found = []
    for message in value:
        if not isinstance(message, dict):
            continue
        texts = [
            {"type": "text", "text": part.get("content", part.get("response"))}
            for part in message.get("parts", [])
            if isinstance(part, dict) and part.get("type") in ("text", "tool_call_response")
        ]
        calls = [
            {"function": {"name": part.get("name"), "arguments": part.get("arguments")}}
            for part in message.get("parts", [])
            if isinstance(part, dict) and part.get("type") == "tool_call"
        ]
        content = "\n".join(str(t["text"]) for t in texts)
        found.append(
            {"role": message.get("role"), "content": content, **({"tool_calls": calls} if calls else {})}
        )
    return found


def _numbered(facts: Mapping[str, Any], prefix: str, role: str | None = None) -> list[dict[str, Any]]:
    """OpenLLMetry's `gen_ai.prompt.0.role`, `gen_ai.prompt.0.content`, and so on."""
    found: list[dict[str, Any]] = []
    while f"{prefix}.{len(found)}.content" in facts:
        number = len(found)
        found.append({
            "role": facts.get(f"{prefix}.{number}.role", role), "content": facts[f"{prefix}.{number}.content"]
        })  # fmt: skip
    return found


LOG_FORMATS: tuple[LogFormat, ...] = (
    LogFormat("OpenTelemetry GenAI spans", lambda r: "resourceSpans" in r or any(
        str(k).startswith("gen_ai.") for k in _attributes(r.get("attributes"))), _otel),
    LogFormat("the gateway's log", lambda r: _has(r, "arm", "assigned", "version"), _gateway),
    LogFormat("Helicone export", lambda r: "request_body" in r, _helicone),
    LogFormat("LangSmith runs", lambda r: _has(r, "run_type", "inputs"), _langsmith),
    LogFormat("Langfuse observations", lambda r: "input" in r and bool({"traceId", "trace_id"} & r.keys()), _langfuse),
    LogFormat("LiteLLM log", lambda r: _has(r, "startTime", "call_type"), _litellm),
    LogFormat("OpenAI batch, requests", lambda r: _has(r, "custom_id", "body"), _batch_request),
    LogFormat("OpenAI batch, answers", lambda r: _has(r, "custom_id", "response"), _batch_answer),
    LogFormat("OpenAI stored completions", lambda r: r.get("object") == "chat.completion", _stored),
    LogFormat("OpenAI stored completions, messages", lambda r: _has(r, "id", "role") and str(r["id"]).startswith(
        "chatcmpl-"), _stored_message),
    LogFormat("requests and responses", lambda r: _has(r, "request", "response") or _has(r, "messages", "response"),
              _request_response),
)  # fmt: skip
