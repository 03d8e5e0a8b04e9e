"""What a client may send: the parameters of the OpenAI API that reach a back end, each checked here.

Nothing else is passed on: a back end's own extras (a grammar, a chat template) can end its process. What has no bearing
on the answer is left out; what this gateway does not do is refused by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, cast

import msgspec
from msgspec import Meta, Struct

from deploy.serve.failure import Failure
from deploy.serve.schema import BadSchema, check_schema

Json = dict[str, object]
# Levels of lists and objects in a body; more is nobody's request.
DEEPEST = 64
LONGEST_KEY = 256
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
PROMPT_ROLES = ("system", "developer")
MEDIA = ("image_url", "input_image", "input_audio", "file", "input_file", "video_url")

Int32 = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Name = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Strict(Struct, forbid_unknown_fields=True):
    """An object with these fields and no other."""


class TextPart(Strict, tag_field="type", tag="text"):
    text: str


class RefusalPart(Strict, tag_field="type", tag="refusal"):
    refusal: str


class CalledFunction(Strict):
    name: Name
    arguments: str


class ToolCall(Strict):
    id: Annotated[str, Meta(max_length=LONGEST_KEY)]
    function: CalledFunction
    type: Literal["function"] = "function"


class System(Strict, tag_field="role", tag="system"):
    content: str | list[TextPart]
    name: Name | None = None


class Developer(System, tag="developer"):
    pass


class User(System, tag="user"):
    pass


class Assistant(Strict, tag_field="role", tag="assistant"):
    content: str | list[TextPart | RefusalPart] | None = None
    name: Name | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    # What answers carry and clients send back with them; not passed on.
    function_call: CalledFunction | None = None
    annotations: list[object] | None = None
    audio: None = None


class ToolAnswer(Strict, tag_field="role", tag="tool"):
    content: str | list[TextPart]
    tool_call_id: Annotated[str, Meta(max_length=LONGEST_KEY)]


class FunctionAnswer(Strict, tag_field="role", tag="function"):
    content: str | None
    name: Name


Message = System | Developer | User | Assistant | ToolAnswer | FunctionAnswer


class Function(Strict):
    name: Name
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: Name


class ToolChoice(Strict):
    type: Literal["function"]
    function: NamedFunction


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextFormat(Strict, tag_field="type", tag="text"):
    pass


class JsonFormat(Strict, tag_field="type", tag="json_object"):
    pass


class NamedSchema(Strict):
    name: Name
    schema: Json
    description: str | None = None
    strict: bool | None = None


class SchemaFormat(Strict, tag_field="type", tag="json_schema"):
    json_schema: NamedSchema


Penalty = Annotated[float, Meta(ge=-2, le=2)]
Stop = Annotated[str, Meta(min_length=1, max_length=1000)]

# Passed on, in the form given here.
PASSED: dict[str, object] = {
    "frequency_penalty": Penalty,
    "logit_bias": dict[Annotated[str, Meta(pattern=r"^\d{1,9}$")], Annotated[float, Meta(ge=-100, le=100)]],
    "logprobs": bool,
    "max_completion_tokens": Int32,
    "max_tokens": Int32,
    "parallel_tool_calls": bool,
    "presence_penalty": Penalty,
    "reasoning_effort": Literal["none", "minimal", "low", "medium", "high", "xhigh"],
    "response_format": TextFormat | JsonFormat | SchemaFormat,
    "seed": Int64,
    "stop": Stop | Annotated[list[Stop], Meta(max_length=4)],
    "temperature": Annotated[float, Meta(ge=0, le=2)],
    "tool_choice": Literal["none", "auto", "required"] | ToolChoice,
    "tools": Annotated[list[Tool], Meta(max_length=128)],
    "top_logprobs": Annotated[int, Meta(ge=0, le=20)],
    "top_p": Annotated[float, Meta(ge=0, le=1)],
}
# The gateway's own to act on.
OWN: dict[str, object] = {
    "messages": Annotated[list[Message], Meta(min_length=1)],
    "model": Annotated[str, Meta(max_length=LONGEST_KEY)],
    "n": Annotated[int, Meta(ge=1, le=1)],
    "stream": bool,
    "stream_options": StreamOptions,
    "user": Annotated[str, Meta(max_length=10_000)],
}
# No bearing on the answer: checked and left out.
LEFT_OUT: dict[str, object] = {
    "metadata": dict[str, str],
    "modalities": list[Literal["text"]],
    "prediction": Json,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
    "safety_identifier": str,
    "service_tier": str,
    "store": Literal[False],
    "verbosity": str,
}
# Of the OpenAI API, and not done here.
REFUSED = ("audio", "functions", "function_call", "web_search_options")
# With any of these in a request, an answer that breaks the task may be the request's doing.
STEERING = (
    "frequency_penalty", "logit_bias", "max_completion_tokens", "max_tokens", "presence_penalty", "reasoning_effort",
    "response_format", "stop", "tool_choice", "tools", "top_p",
)  # fmt: skip


@dataclass(frozen=True)
class ChatRequest:
    """A checked request: the client's messages and the parameters that go to a back end as they are."""

    messages: list[Json]
    parameters: Json = field(default_factory=dict)
    model: str | None = None
    user: str | None = None
    stream: bool = False
    include_usage: bool = False

    @property
    def limit(self) -> int | None:
        """The longest answer that the client asked for, tokens."""
        values = [self.parameters.get(k) for k in ("max_completion_tokens", "max_tokens")]
        return min((v for v in values if isinstance(v, int)), default=None)

    @property
    def steers(self) -> bool:
        """Whether the request sets what can keep a good model from a good answer."""
        heat = self.parameters.get("temperature", 0)
        return any(name in self.parameters for name in STEERING) or (
            isinstance(heat, int | float) and heat > 1
        )

    @property
    def schema(self) -> Json | None:
        """The JSON schema that the answer was asked to fit."""
        wanted = self.parameters.get("response_format")
        if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
            return cast(Json, wanted["json_schema"]["schema"])
        return None

    @property
    def brings_prompt(self) -> bool:
        """Whether the client sent instructions of its own."""
        return any(m["role"] in PROMPT_ROLES for m in self.messages)


def bad(message: str, name: str | None = None) -> Failure:
    """A request that cannot be answered as it is; `name` is the field at fault."""
    return Failure("bad request", message, status=400, param=name)


def read_body(raw: bytes, *, unknown: str = "refuse") -> ChatRequest:
    """A request's body. `unknown` is `refuse` or `drop`: what happens to parameters that are not passed on.

    Raises `Failure` 400 with the field's name.
    """
    return checked(decoded(raw), unknown=unknown)


def decoded(raw: bytes) -> Json:
    """A JSON object of a bounded depth. Raises `Failure` 400."""
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise bad(f"the body is not JSON ({str(error)[:120]})") from None
    if not isinstance(body, dict):
        raise bad("the body is not a JSON object")
    if raw.count(b"[") + raw.count(b"{") > DEEPEST and too_deep(body):
        raise bad(f"the body is nested more than {DEEPEST} levels deep")
    return body


def too_deep(value: object, most: int = DEEPEST) -> bool:
    """Whether lists and objects nest deeper than `most`; walks level by level, so that no depth can hurt."""
    level: list[object] = [value]
    for _ in range(most):
        level = [
            child
            for one in level
            if isinstance(one, dict | list)
            for child in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return any(isinstance(one, dict | list) for one in level)


def checked(body: Json, *, unknown: str = "refuse") -> ChatRequest:
    """The request that a JSON object holds. Raises `Failure` 400 with the field's name."""
    given: Json = {}
    for name, value in body.items():
        if (value is None and name != "messages") or (name in LEFT_OUT and unknown == "drop"):
            continue
        kind = PASSED.get(name) or OWN.get(name) or LEFT_OUT.get(name)
        if kind is not None:
            check(name, value, kind)
            given[name] = value
        elif name in REFUSED:
            if unknown == "refuse":
                raise bad(f"`{name}` is not done by this gateway; leave it out", name)
        elif unknown == "refuse":
            raise bad(
                f"`{name[:80]}` is not a parameter that this gateway passes on; leave it out", name[:80]
            )
    if "messages" not in given:
        raise bad("`messages` is missing; it must be a list with at least one message", "messages")
    parameters = {k: v for k, v in given.items() if k in PASSED}
    check_together(given, parameters)
    options = given.get("stream_options")
    return ChatRequest(
        messages=[passed_message(m) for m in cast(list[Json], given["messages"])],
        parameters=parameters,
        model=cast("str | None", given.get("model")),
        user=cast("str | None", given.get("user")),
        stream=given.get("stream") is True,
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
    )


def check(name: str, value: object, kind: object) -> None:
    """Raise `Failure` 400 unless a parameter has its form."""
    try:
        msgspec.convert(value, type=kind)  # type: ignore[call-overload]
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `")
        where = name + place.rstrip("`").removeprefix("$") if place.startswith("$") else name
        message = f"`{where}` is not what the API takes: {text[:1].lower()}{text[1:200]}"
        if name == "messages" and any(f"'{media}'" in text for media in MEDIA):
            message = f"`{where}`: this gateway takes text only; images, audio and files are refused"
        elif name == "n":
            message = "`n` must be 1: this gateway gives one answer a request"
        elif name == "store":
            message = "`store` must be false: this gateway keeps no answers to be fetched later"
        raise bad(message, where) from None


def check_together(given: Json, parameters: Json) -> None:
    """What two parameters must agree in. Raises `Failure` 400."""
    if "top_logprobs" in parameters and parameters.get("logprobs") is not True:
        raise bad("`top_logprobs` needs `logprobs` true", "top_logprobs")
    if "stream_options" in given and given.get("stream") is not True:
        raise bad("`stream_options` needs `stream` true", "stream_options")
    for name in ("tool_choice", "parallel_tool_calls"):
        if name in parameters and parameters.get(name) != "none" and not parameters.get("tools"):
            raise bad(f"`{name}` needs `tools`", name)
    wanted = parameters.get("response_format")
    schemas = {}
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
        schemas["response_format.json_schema.schema"] = wanted["json_schema"]["schema"]
    if isinstance(chosen := parameters.get("tool_choice"), dict):  # a call of it is held to a grammar
        for n, tool in enumerate(cast(list[Json], parameters["tools"])):
            function = cast(Json, tool["function"])
            if function["name"] == chosen["function"]["name"] and function.get("parameters") is not None:
                schemas[f"tools[{n}].function.parameters"] = function["parameters"]
    for name, schema in schemas.items():
        try:
            check_schema(cast(Json, schema))
        except BadSchema as error:
            raise bad(f"`{name}` {error}", name) from None


def passed_message(message: Json) -> Json:
    """A checked message without what is not for the back end."""
    left_out = ("annotations", "audio", "function_call", "refusal")
    return {k: v for k, v in message.items() if k not in left_out and (v is not None or k == "content")}


def text_of(message: Json) -> str:
    """The text of a message whose content is a text or a list of parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str))
    return content if isinstance(content, str) else ""


def last_text(messages: Sequence[Json]) -> str:
    """The text of the last message that is a user's, else of the last one."""
    mine = [m for m in messages if m.get("role") == "user"]
    return text_of(mine[-1] if mine else messages[-1])


def passed_on(body: Json) -> ChatRequest:
    """A request that goes on to today's API as it came, for a gateway that only records; its frame is checked.

    Raises `Failure` 400 with the field's name.
    """
    body = {k: v for k, v in body.items() if v is not None}
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad("`messages` must be a list with at least one message", "messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise bad(f"`messages[{number}]` must be an object with a `role`", f"messages[{number}]")
    for name in ("model", "user"):
        if not isinstance(body.get(name, ""), str):
            raise bad(f"`{name}` must be a text", name)
    if not isinstance(body.get("stream", False), bool):
        raise bad("`stream` must be true or false", "stream")
    options = body.get("stream_options")
    own = ("messages", "model", "stream", "stream_options")
    return ChatRequest(
        messages=messages,
        parameters={k: v for k, v in body.items() if k not in own},
        model=body.get("model"),  # type: ignore[arg-type]
        user=body.get("user"),  # type: ignore[arg-type]
        stream=body.get("stream") is True,
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
    )
