"""Chat templates of files that bring no Hugging Face tokenizer, rendered the way transformers renders them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from unshot.data.rows import Message
from unshot.errors import InputError


class ChatTemplate:
    """A compiled Jinja chat template, run in Jinja's sandbox since it comes out of a model file."""

    def __init__(self, source: str, *, bos: str = "", eos: str = "") -> None:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise InputError(f"the model's chat template is not valid Jinja ({error})") from None
        self._tokens = {"bos_token": bos, "eos_token": eos}

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt text up to where the assistant starts to answer."""
        from jinja2 import TemplateError

        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self._tokens)
        except TemplateError as error:
            raise InputError(f"the chat template refuses these messages ({error})") from None


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    # Unlike Jinja's own filter this does not escape HTML characters.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
