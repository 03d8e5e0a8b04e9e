"""Request logs as people have them: each known form becomes `Call`s, a request with its answer, time and model.

A form is one entry of `LOG_FORMATS`. Shapes as documented on 2026-11-26 by OpenAI (chat completions, batch, stored
completions), LiteLLM (StandardLoggingPayload), Langfuse (observations), LangSmith (run data format), Helicone (export)
and OpenTelemetry (GenAI semantic conventions 1.37, and the attributes of OpenLLMetry before it).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unshot.data.example import Message
from unshot.data.files import Place, Problem, raw_rows
from unshot.data.formats import Columns, Parsed, read_messages, read_row
from unshot.errors import InputError

Row = Mapping[str, Any]
LANGCHAIN_ROLES = {
    "system": "system", "human": "user", "ai": "assistant", "tool": "tool", "SystemMessage": "system",
    "HumanMessage": "user", "AIMessage": "assistant", "AIMessageChunk": "assistant", "ToolMessage": "tool",
}  # fmt: skip


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


@dataclass
class LogSummary:
    """What a reading met: calls by form, and rows that were not used, by reason."""

    formats: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    first_unknown: str | None = None
    failed: int = 0
    without_answer: int = 0

    def skip(self, reason: str, place: object) -> None:
        """Count a row that is not used."""
        self.unknown[reason] += 1
        self.first_unknown = self.first_unknown or f"{place}: {reason}"


def read_calls(
    paths: Sequence[Path], summary: LogSummary, *, mapping: Mapping[str, str], columns: Columns | None = None
) -> Iterator[Call]:
    """The answered calls of all files. Rows of no known form are counted in `summary`, never dropped in silence.

    `mapping` names the fields of another form: `messages` or `input`, `answer`, `time`, `model`, each as a dotted path.
    Raises `InputError` where a file cannot be read.
    """
    waiting: dict[str, Call] = {}
    answers: dict[str, Call] = {}
    for path in paths:
        for place, row in _rows(path):
            if isinstance(row, Problem):
                summary.skip(str(row), place)
                continue
            try:
                name, calls = calls_of(place, row, mapping, columns)
            except Problem as problem:
                summary.skip(str(problem), place)
                continue
            summary.formats[name] += len(calls)
            for call in calls:
                if call.id is not None and not call.messages:
                    _join(answers, call)
                elif call.id is not None and call.answer is None and not call.failed:
                    _join(waiting, call)
                elif call.failed:
                    summary.failed += 1
                else:
                    summary.without_answer += call.answer is None
                    yield call
    yield from _joined(waiting, answers, summary)


def _join(calls: dict[str, Call], call: Call) -> None:
    """Keep one half of a call; messages of stored completions come one by one."""
    assert call.id is not None
    known = calls.get(call.id)
    if known is None:
        calls[call.id] = call
    else:
        known.messages += call.messages


def _joined(waiting: dict[str, Call], answers: dict[str, Call], summary: LogSummary) -> Iterator[Call]:
    for key, call in waiting.items():
        answer = answers.pop(key, None)
        if answer is None:
            summary.without_answer += 1
            yield call
        elif answer.failed:
            summary.failed += 1
        else:
            call.answer, call.output_tokens = answer.answer, answer.output_tokens
            call.time, call.model = answer.time or call.time, call.model or answer.model
            summary.without_answer += call.answer is None
            yield call
    if answers:
        summary.unknown["an answer whose request is in no file (give the requests' file too)"] += len(answers)


def _rows(path: Path) -> Iterator[tuple[Place, object]]:
    """Rows of a log file; of a directory of the gateway those of its request files."""
    if path.is_dir() and any(path.glob("requests-*.jsonl")):
        path = path / "requests-*.jsonl"
    yield from raw_rows(path)


def calls_of(
    place: Place, row: object, mapping: Mapping[str, str], columns: Columns | None
) -> tuple[str, list[Call]]:
    """The form of a row and its calls. Raises `Problem` for a row of no known form."""
    if not isinstance(row, dict):
        raise Problem(f"expected an object, found {type(row).__name__}")
    if mapping:
        return "fields of --map", [_mapped(row, mapping)]
    for form in LOG_FORMATS:
        try:
            if form.matches(row):
                return form.name, form.parse(row)
        except Problem:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError):
            # Logs are other programs' records: a field of another shape costs its row.
            raise Problem(f"a row like {form.name} whose fields have another shape") from None
    try:
        found = read_row(place, row, columns or Columns(), answers=False)
    except Problem:
        raise Problem("of no known form (name its fields with --map)") from None
    time = next(
        (t for key in ("time", "timestamp", "created_at", "created") if (t := _time(row.get(key)))), None
    )
    example = found.example
    return "rows of inputs", [Call(list(example.messages), example.answer, time, _text(row.get("model")))]


# --- values


def _messages(value: object) -> list[Message]:
    """A list of chat messages; a text is a user's."""
    if isinstance(value, str):
        loaded = _loads(value)
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


def _loads(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _content(value: object) -> str | None:
    """The text of an answer: a text, a message, or a completion with choices."""
    if isinstance(value, str):
        loaded = _loads(value) if value.lstrip().startswith(("{", "[")) else None
        return _content(loaded) if isinstance(loaded, dict) and _is_answer(loaded) else _text(value)
    if isinstance(value, list) and value:
        return _content(value[0])
    if isinstance(value, dict):
        if isinstance(value.get("choices"), list) and value["choices"]:
            choice = value["choices"][0]
            return _content(choice.get("message", choice.get("text"))) if isinstance(choice, dict) else None
        for key in ("message", "content", "text"):
            if key in value:
                return _content(value[key])
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


def _time(value: object) -> float | None:
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


def _at(row: object, path: str) -> object:
    """The value at a dotted path; numbers are places in lists."""
    for part in path.split("."):
        if isinstance(row, str):
            row = _loads(row)
        if isinstance(row, dict):
            row = row.get(part)
        elif isinstance(row, list) and part.lstrip("-").isdigit() and -len(row) <= int(part) < len(row):
            row = row[int(part)]
        else:
            return None
    return row


def _mapped(row: Row, mapping: Mapping[str, str]) -> Call:
    found = {name: _at(row, path) for name, path in mapping.items()}
    source = found.get("messages", found.get("input"))
    if source is None:
        path = mapping.get("messages", mapping.get("input"))
        raise Problem(f"has no `{path}`")
    messages = _messages(source)
    if system := _text(found.get("system")):
        messages.insert(0, {"role": "system", "content": system})
    answer = _content(found.get("answer"))
    return Call(messages, answer, _time(found.get("time")), _text(found.get("model")))


# --- forms


def _has(row: Row, *names: str) -> bool:
    return all(name in row for name in names)


def _body(value: object) -> dict[str, Any]:
    """A request's or response's body: the object, its JSON, or what stands under `body` or `json`."""
    if isinstance(value, str):
        value = _loads(value)
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
    messages = _messages(source)
    if instructions := _text(request.get("instructions")):
        messages.insert(0, {"role": "system", "content": instructions})
    call = Call(
        messages, _content(response), _time(response.get("created")),
        _text(request.get("model")) or _text(response.get("model")), _usage(response.get("usage")),
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
    time = next((t for key in ("time", "timestamp", "created_at") if (t := _time(row.get(key)))), None)
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
        Call([], _content(body), _time(body.get("created")), _text(body.get("model")), _usage(body.get("usage")),
             failed, str(row["custom_id"]))
    ]  # fmt: skip


def _stored(row: Row) -> list[Call]:
    """A stored completion, its messages inside or in a file of their own."""
    answer = Call(
        [],
        _content(row),
        _time(row.get("created")),
        _text(row.get("model")),
        _usage(row.get("usage")),
        id=str(row["id"]),
    )
    messages = row.get("messages", row.get("input"))
    if isinstance(messages, dict):
        messages = messages.get("data")
    if not messages:
        return [answer]
    answer.messages, answer.id = _messages(messages), None
    return [answer]


def _stored_message(row: Row) -> list[Call]:
    """One message of a stored completion: its id is the completion's with a number."""
    content = row.get("content_parts") or row.get("content")
    return [
        Call(_messages([{"role": row["role"], "content": content}]), id=str(row["id"]).rpartition("-")[0])
    ]


def _litellm(row: Row) -> list[Call]:
    failed = str(row.get("status", "success")) not in ("success", "")
    response = row.get("response")
    messages = row.get("messages")
    if not messages or messages == "{}":
        messages = _body(row.get("proxy_server_request")).get("messages")
    usage = _count(row.get("completion_tokens"))
    model = _text(row.get("model"))
    return [
        Call(_messages(messages), _content(response), _time(row.get("startTime")),
             model.rpartition("/")[2] if model else None, usage, failed)
    ]  # fmt: skip


def _langfuse(row: Row) -> list[Call]:
    if str(row.get("type", "GENERATION")).upper() != "GENERATION":
        return []
    usage = _usage(_value(row.get("usageDetails"))) or _usage(_value(row.get("usage")))
    failed = str(row.get("level", "")).upper() == "ERROR"
    time = _time(row.get("startTime", row.get("start_time")))
    return [
        Call(
            _messages(row["input"]), _content(row.get("output")), time, _text(row.get("model")), usage, failed
        )
    ]


def _value(value: object) -> object:
    return _loads(value) if isinstance(value, str) else value


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
            _messages(messages),
            _content(answer),
            _time(row.get("start_time")),
            _text(model),
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
        _pair(request, response, time=_time(row.get("request_created_at")), output_tokens=tokens,
              failed=_failed(response, status) or None)
    ]  # fmt: skip


def _gateway(row: Row) -> list[Call]:
    """A line of `unshot deploy serve`: the shown answer of each request, and its whole prompt in record mode."""
    if row.get("shadow"):
        return []
    source = row.get("messages") or row.get("input")
    if not source:
        raise Problem("a request without its text (serve with the log of texts on)")
    failed = bool(row.get("error"))
    return [
        Call(
            _messages(source),
            _text(row.get("answer")),
            _time(row.get("time")),
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
        answers = _otel_messages(facts.get("gen_ai.output.messages"))
        answer = answers[0]["content"] if answers else None
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
    time = _time(span.get("startTimeUnixNano", span.get("start_time", span.get("startTime"))))
    model = _text(facts.get("gen_ai.request.model")) or _text(facts.get("gen_ai.response.model"))
    tokens = _count(facts.get("gen_ai.usage.output_tokens", facts.get("gen_ai.usage.completion_tokens")))
    return Call(_messages(parts), _text(answer), time, model, tokens, failed)


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


def parse_mapping(pairs: Sequence[str]) -> dict[str, str]:
    """`--map messages=payload.messages` and the like; `InputError` for a name that means nothing."""
    known = ("messages", "input", "system", "answer", "time", "model")
    found = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if name not in known or not equals or not path:
            raise InputError(
                f"--map {pair}: give NAME=FIELD with a name of {', '.join(known)}; FIELD may be a.b.0.c"
            )
        found[name] = path
    if found and not {"messages", "input"} & found.keys():
        raise InputError("--map: name the request's text too, as messages=FIELD or input=FIELD")
    return found
