"""Chat templates rendered as transformers' `apply_chat_template` renders them, with jinja2 alone.

The rules were read from transformers 4.57, `utils/chat_template_utils.py`: an immutable sandbox, trimmed blocks, loop
controls, `tojson` without HTML escapes, `raise_exception`, `strftime_now`, `{% generation %}` blocks, and the
special tokens as variables. A test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from unshot.data.rows import Message
from unshot.errors import InputError

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Template:
    """One chat template with its special tokens; `InputError` where it does not compile."""

    def __init__(self, source: str, tokens: Mapping[str, Any], where: str) -> None:
        from jinja2 import TemplateError

        self.tokens = dict(tokens)
        self.where = where
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise InputError(f"{where}: the chat template does not compile ({error})") from None

    def render(self, messages: Sequence[Message], *, generate: bool = True) -> str:
        """The prompt text; `generate` ends it where the assistant starts to answer."""
        try:
            text: str = self._template.render(
                messages=[dict(m) for m in messages],
                tools=None,
                documents=None,
                add_generation_prompt=generate,
                **self.tokens,
            )
        except Exception as error:  # the template's own raise_exception, and anything its code does
            raise InputError(f"{self.where}: the chat template refuses these messages ({error})") from None
        return text


def _environment() -> Any:
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

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

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def load_template(folder: Path) -> Template:
    """The chat template of a model directory: `chat_template.jinja`, else in `tokenizer_config.json`.

    Special tokens come from `tokenizer_config.json` and `special_tokens_map.json`. Raises `InputError` where there
    is no template.
    """
    config = _read_json(folder / "tokenizer_config.json")
    extra = _read_json(folder / "special_tokens_map.json")
    tokens: dict[str, Any] = {}
    for key in SPECIAL:
        value = _content(config.get(key, extra.get(key)))
        if value is not None:
            tokens[key] = value
    more = config.get("additional_special_tokens") or extra.get("additional_special_tokens")
    if more:
        tokens["additional_special_tokens"] = [_content(t) for t in more]
    source = config.get("chat_template")
    file = folder / "chat_template.jinja"
    if file.is_file():
        source = file.read_text(encoding="utf-8")
    if isinstance(source, list):
        source = {t["name"]: t["template"] for t in source}
    if isinstance(source, dict):
        source = source.get("default")
    if not source:
        raise InputError(
            f"{folder}: no chat template (chat_template.jinja or tokenizer_config.json); use an instruct model's "
            "directory"
        )
    return Template(source, tokens, str(folder))


def _content(value: Any) -> str | None:
    """A special token is a string or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    return loaded if isinstance(loaded, dict) else {}
