"""The one chat-template renderer: what transformers' `apply_chat_template` writes, with jinja2 alone and with an end.

The rules were read from transformers 4.57, `utils/chat_template_utils.py`: an immutable sandbox, trimmed blocks, loop
controls, `tojson` without HTML escapes, `raise_exception`, `strftime_now`, `{% generation %}` blocks, and the
special tokens as variables. A test compares the two. `unshot.text.sandbox` bounds steps, time and memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from unshot.data.example import without_tools
from unshot.data.files import optional_object
from unshot.errors import InputError

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULT = "default"


class Template:
    """One chat template with its special tokens; `InputError` where it does not compile."""

    def __init__(self, source: str, tokens: Mapping[str, Any], where: str) -> None:
        from unshot.text.sandbox import MAX_SOURCE

        self.source, self.tokens, self.where = source, dict(tokens), where
        if len(source) > MAX_SOURCE:
            raise InputError(
                f"{where}: the chat template has {len(source):,} characters; at most {MAX_SOURCE:,} are read"
            )
        try:
            self._template = _environment().from_string(source)
        except Exception as error:  # jinja2's syntax errors, and Python's for what it makes of them
            raise InputError(f"{where}: the chat template does not compile ({_reason(error)})") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        generate: bool = True,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text; `generate` ends it where the assistant starts to answer.

        `tools` are those that the messages carry where none are given. `variables` are set beside (and over) the
        special tokens, e.g. `enable_thinking`. Raises `InputError` for
        anything that the template raises, and where it takes too many steps, too long, or makes too much text.
        """
        from unshot.text.sandbox import Exhausted, limited

        given, carried = without_tools(messages)
        tools = carried if tools is None else tools
        settings = {**self.tokens, **(variables or {})}
        try:
            with limited(*_size([given, tools, documents])) as budget:
                text: str = self._template.render(
                    messages=given,
                    tools=tools,
                    documents=documents,
                    add_generation_prompt=generate,
                    **settings,
                )
                if len(text) > budget.output:
                    raise Exhausted(f"it makes a prompt of {len(text):,} characters")
        except Exhausted as error:
            raise InputError(f"{self.where}: the chat template was stopped: {error}") from None
        except Exception as error:  # the template's own raise_exception, and anything its code does
            raise InputError(
                f"{self.where}: the chat template refuses these messages ({_reason(error)})"
            ) from None
        return text


def _size(value: Any) -> tuple[int, int]:
    """Items and characters of what a template is given (JSON values)."""
    items = characters = 0
    stack = [value]
    while stack:
        item = stack.pop()
        items += 1
        if isinstance(item, str):
            characters += len(item)
        elif isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)
    return items, characters


def _reason(error: Exception) -> str:
    """What went wrong, on one line; Python's own kinds of errors by name."""
    from jinja2 import TemplateError

    text = " ".join(str(error).split())[:300]
    return (
        text if isinstance(error, TemplateError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
    )


def _environment() -> Any:
    import jinja2
    import jinja2.ext

    from unshot.text.sandbox import BoundedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %} ... {% endgeneration %}` marks what the assistant wrote; here it is just its body."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own form

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> Any:
            return caller()

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    return BoundedEnvironment(
        filters={"tojson": tojson},
        functions={"raise_exception": raise_exception, "strftime_now": strftime_now},
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )


def load_template(folder: Path, chosen: str | None = None) -> Template:
    """The chat template of a model directory, with its special tokens.

    Looked for as transformers does: `chat_template.jinja` (and `additional_chat_templates/`), else `chat_template` in
    `tokenizer_config.json`, a text or a list of named ones, of which `default` is taken. `chosen` is another name, or
    a file. Special tokens come from `tokenizer_config.json` and `special_tokens_map.json`. Raises `InputError` where
    there is no such template.
    """
    config = optional_object(folder / "tokenizer_config.json")
    tokens = special_tokens(config, optional_object(folder / "special_tokens_map.json"))
    found = _templates(folder, config)
    if chosen is not None and chosen not in found:
        file = Path(chosen).expanduser()
        if not file.is_file():
            names = f"; the model has {', '.join(sorted(found))}" if found else ""
            raise InputError(f"chat template {chosen}: no such file{names}")
        return Template(_read_text(file), tokens, str(file))
    source = found.get(chosen or DEFAULT)
    if source:
        return Template(source, tokens, str(folder))
    if found:
        raise InputError(
            f"{folder}: its chat templates are {', '.join(sorted(found))}, and none is the default; choose one "
            "(--chat-template NAME in `unshot tune`), or name it `default` in tokenizer_config.json"
        )
    raise InputError(
        f"{folder}: no chat template (chat_template.jinja or tokenizer_config.json); use an instruct model's "
        "directory, or give one (--chat-template FILE in `unshot tune`)"
    )


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    files = {p.stem: _read_text(p) for p in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files[DEFAULT] = _read_text(folder / "chat_template.jinja")
    if files:
        return files
    source = config.get("chat_template")
    where = f"{folder / 'tokenizer_config.json'}: `chat_template`"
    if isinstance(source, list):
        if not all(isinstance(t, dict) and isinstance(t.get("name"), str) for t in source):
            raise InputError(f"{where} is a list whose items lack `name` and `template`")
        source = {t["name"]: t.get("template") for t in source}
    named = source if isinstance(source, dict) else {DEFAULT: source} if source else {}
    if not all(isinstance(text, str) for text in named.values()):
        raise InputError(f"{where} is no text, and no list of named texts")
    return named


def special_tokens(config: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens by the names that templates know them by."""
    tokens: dict[str, Any] = {}
    for key in SPECIAL:
        value = _content(config.get(key, extra.get(key)))
        if value:
            tokens[key] = value
    own = config.get("extra_special_tokens")
    for key, value in own.items() if isinstance(own, dict) else ():
        tokens[key] = _content(value)
    more = config.get("additional_special_tokens") or extra.get("additional_special_tokens")
    if isinstance(more, list) and more:
        tokens["additional_special_tokens"] = [_content(t) for t in more]
    return tokens


def _content(value: Any) -> str | None:
    """A special token is a string or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as UTF-8 text ({error})") from None


def set_template(folder: Path, template: Template) -> None:
    """Put a run's own chat template into a model directory whose tokenizer was copied from the base."""
    from unshot.data.files import write_text

    if load_template(folder).source == template.source:
        return
    write_text(folder / "chat_template.jinja", template.source)
    path = folder / "tokenizer_config.json"
    config = optional_object(path)
    if config.pop("chat_template", None) is not None:
        write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
