"""Chat messages to token ids and back: the one tokenizer and the one template of every room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unshot.data.files import optional_object
from unshot.data.rows import Message
from unshot.errors import InputError, OutsideError
from unshot.text import gguf
from unshot.text.repair import ANSWER, QUESTION, repaired
from unshot.text.template import Template, load_template


class Tokenizer:
    """A `tokenizers.Tokenizer` with its chat template; ids equal to transformers', text never cleaned up."""

    def __init__(self, backend: Any, template: Template, where: str) -> None:
        self.backend, self.where = backend, where
        backend.no_truncation()
        backend.no_padding()
        # id -> tokenizers.AddedToken (`content`, `special`)
        self.added: dict[int, Any] = backend.get_added_tokens_decoder()
        self.template, self.repairs = repaired(template, [t.content for t in self.added.values()])

    def ids(self, text: str) -> list[int]:
        """Token ids; special tokens written in the text are taken as such, none are added."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def many(self, texts: Sequence[str]) -> list[list[int]]:
        """`ids` of many texts."""
        return [list(e.ids) for e in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ids, special tokens left out unless asked for; spaces stay as they are ("Pourquoi ?")."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=not special)
        return text

    def token(self, number: int) -> str:
        """The token of an id."""
        return str(self.backend.id_to_token(number))

    def _special(self, name: str) -> int | None:
        text = self.template.tokens.get(name)
        number = self.backend.token_to_id(text) if text else None
        return None if number is None else int(number)

    @property
    def eos(self) -> int | None:
        """The id of the end-of-text token."""
        return self._special("eos_token")

    @property
    def bos(self) -> int | None:
        """The id of the start-of-text token."""
        return self._special("bos_token")

    @property
    def pad(self) -> int | None:
        """The id of the padding token."""
        return self._special("pad_token")


def load_tokenizer(path: Path, template: str | None = None) -> Tokenizer:
    """The tokenizer of a model directory, of a `tokenizer.json`, or of a `.gguf` file, with its chat template.

    `template` is another template: a file, or one of the model's named ones. Raises `InputError` for what cannot be
    read or has no chat template, `OutsideError` where the package tokenizers is missing.
    """
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError:
        raise OutsideError(
            "an open model's tokens need the package tokenizers; run `pip install tokenizers`"
        ) from None
    if path.suffix == ".gguf":
        fields = gguf.read_metadata(path)
        return Tokenizer(gguf.build_tokenizer(fields, path), gguf.template(fields, path), path.name)
    folder = path if path.is_dir() else path.parent
    file = folder / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file}: no such file; give a directory with tokenizer.json, that file, or a .gguf")
    try:
        backend = Backend.from_str(file.read_text(encoding="utf-8"))  # a fifth faster than from_file
        _configure(backend, folder)
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{file}: the tokenizer cannot be loaded ({error})") from None
    return Tokenizer(backend, load_template(folder, template), folder.name)


def run_template(run: Path) -> str | None:
    """The chat template that a run of `unshot tune` keeps of its own, for `load_tokenizer`; None: the base's."""
    path = run / "chat_template.jinja"
    return str(path) if path.is_file() else None


def _configure(backend: Any, folder: Path) -> None:
    """What `tokenizer_config.json` changes about `tokenizer.json`, as transformers' PreTrainedTokenizerFast has it."""
    from tokenizers import AddedToken, pre_tokenizers

    config = optional_object(folder / "tokenizer_config.json")
    known = {repr(t) for t in backend.get_added_tokens_decoder().values()}
    names = [
        v["content"] if isinstance(v, dict) else v for k, v in config.items() if k.endswith("_token") and v
    ]
    fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    for _, facts in sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0])):
        token = AddedToken(**{k: facts[k] for k in fields if k in facts})
        if repr(token) not in known:
            token.special = token.special or token.content in names
            backend.add_tokens([token])
    present = {t.content for t in backend.get_added_tokens_decoder().values()}
    backend.add_tokens(
        [AddedToken(n, special=True) for n in names if isinstance(n, str) and n not in present]
    )
    first = backend.pre_tokenizer
    prefix = bool(config.get("add_prefix_space", False))
    if isinstance(first, pre_tokenizers.ByteLevel) and first.add_prefix_space != prefix:
        first.add_prefix_space = prefix
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))


@dataclass(frozen=True)
class Encoded:
    """One training row: `ids` (prompt then answer) and how many of them are prompt.

    `earlier` are the spans (start, end) of answers within the prompt that carry loss too (`--loss-on all`).
    """

    ids: list[int]
    prompt_length: int
    earlier: tuple[tuple[int, int], ...] = field(default=(), kw_only=True)

    @property
    def answer_length(self) -> int:
        """Tokens of the last answer, the end-of-turn token included."""
        return len(self.ids) - self.prompt_length

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where the tokens that carry loss stand, as (start, end)."""
        return [*self.earlier, (self.prompt_length, len(self.ids))]


class Chat:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end = self._end_of_turn()

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt text up to where the assistant starts to answer."""
        return self.tokenizer.template.render(messages)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of `render(messages)`; the template writes its own special tokens."""
        return self.tokenizer.ids(self.render(messages))

    def encode(self, messages: Sequence[Message], answer: str, *, every: bool = False) -> Encoded:
        """Prompt and answer, tokenised apart as at inference, ending with the end-of-turn token.

        With `every` the earlier assistant turns carry loss too. `InputError` where an answer holds the end-of-turn
        token written out: the model would learn to stop there.
        """
        prompt = self.prompt_ids(messages)
        reply = self.tokenizer.ids(answer)
        if self.end in reply:
            raise InputError(
                f"the answer holds the end-of-turn token {self.tokenizer.token(self.end)!r} written out, where the "
                "model would learn to stop; take it out of the answer"
            )
        earlier = self._earlier(messages, prompt) if every else ()
        return Encoded([*prompt, *reply, self.end], len(prompt), earlier=earlier)

    def _earlier(self, messages: Sequence[Message], prompt: list[int]) -> tuple[tuple[int, int], ...]:
        """Spans of the earlier assistant turns in the prompt's ids, each with its end-of-turn token.

        A turn's span is what the prompt up to it (as at inference) and the conversation with it do not share; turns
        that the template writes otherwise later on (a thinking block left out) cannot be told and carry no loss.
        """
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or message.get("weight") == 0:
                continue
            before = self.prompt_ids(messages[:number])
            turn = [*self.tokenizer.ids(message["content"]), self.end]
            start, stop = len(before), len(before) + len(turn)
            if prompt[:start] == before and prompt[start:stop] == turn:
                spans.append((start, stop))
        return tuple(spans)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return self.tokenizer.decode(ids)

    def _end_of_turn(self) -> int:
        """The special token with which the template ends an assistant turn (else the tokenizer's eos).

        `InputError` where the template does not write what the assistant says: no end can be told then.
        """
        turn: list[Message] = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER},
        ]
        text = self.tokenizer.template.render(turn, generate=False)
        _, found, tail = text.rpartition(ANSWER)
        if not found:
            raise InputError(
                f"{self.tokenizer.template.where}: the chat template does not write the assistant's answer; give "
                "another one (--chat-template FILE)"
            )
        ids = self.tokenizer.ids(tail.strip()) if tail.strip() else []
        if ids and ids[0] in self.tokenizer.added:
            return int(ids[0])
        if self.tokenizer.eos is None:
            raise InputError(
                f"{self.tokenizer.where}: the tokenizer has neither an end-of-turn token in its template nor an eos "
                "token"
            )
        return self.tokenizer.eos
