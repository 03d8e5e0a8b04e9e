"""What is exported: a run of `unshot tune`, an adapter trained elsewhere, or a whole model (merged, or a
bare base).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from export.adapter import Adapter
from export.experts import load_on
from export.families import Config
from export.foreign import bring_in, is_adapter, named_base
from export.merge import Merged
from export.peft_check import check
from export.reference import Reference, effective_config, evaluated
from unshot.case import Case
from unshot.console import Output
from unshot.contracts.manifest import NAME as MANIFEST
from unshot.contracts.manifest import BaseModel, InputFile, describe_data, describe_file, read_manifest
from unshot.contracts.task import Task, read_task
from unshot.data.files import read_object
from unshot.data.load import load_rows
from unshot.data.prompts import Prompt
from unshot.data.rows import Example, Message, read_examples
from unshot.engines.base import one_or_more
from unshot.errors import InputError
from unshot.methods import METHODS
from unshot.models import Source, resolve
from unshot.text.chat import Chat, load_tokenizer, run_template


@dataclass
class Model:
    """A base model, its adapter (None for a whole model) and the rows it is checked on.

    `tokenizer` is the directory of its tokenizer and chat template, the base's unless the adapter brought its
    own.
    """

    name: str
    base: Source
    fingerprint: BaseModel
    adapter_path: Path | None
    adapter: Adapter | None
    chat: Chat
    task: Task | None = None
    rows: list[Example] = field(default_factory=list)
    inputs: list[InputFile] = field(default_factory=list)
    run: Path | None = None
    tokenizer: Path = Path()
    notes: list[str] = field(default_factory=list)
    keep: object = None  # what must live as long as the model does

    def __post_init__(self) -> None:
        if self.tokenizer == Path():
            self.tokenizer = self.base.path

    @cached_property
    def config(self) -> Config:
        """The base's configuration with its class's defaults."""
        return effective_config(self.base.path, self.base.config())

    def merged(self) -> Merged:
        """The merged tensors, to be read one by one."""
        return Merged(self.base.weight_files(), self.config, self.adapter)

    def bare(self) -> Merged:
        """The base's tensors without the adapter."""
        return Merged(self.base.weight_files(), self.config)

    def reference(self, *, streams: bool = False) -> Reference:
        """The evaluated model in transformers; `streams` reads it layer by layer in every pass."""
        return evaluated(
            self.base.path, self.adapter_path, files=self.base.weight_files(), vocabulary=self.merged().resized,
            streams=streams,
        )  # fmt: skip

    def requests(self) -> list[list[Message]]:
        """The messages of each row, with the tuned model's instruction as the system message."""
        return [self.prompt.request(row) for row in self.rows]

    @cached_property
    def ends(self) -> list[int]:
        """Tokens that end an answer: the template's end of turn, the tokenizer's eos, those of generation_config."""
        tokenizer = self.chat.tokenizer
        tokens = int(
            self.merged().resized or self.config.get("vocab_size") or tokenizer.backend.get_vocab_size()
        )
        for name, token in (("turn ends with", self.chat.end), ("end-of-text token is", tokenizer.eos)):
            if token is not None and token >= tokens:
                raise InputError(
                    f"{self.tokenizer}: the {name} {tokenizer.token(token)!r}, number {token}, and the model has "
                    f"{tokens} tokens; the tokenizer is another model's, or its configuration names a token it lacks"
                )
        more = generation_ends(self.base.path / "generation_config.json", tokens)
        everything = [self.chat.end, tokenizer.eos, *more]
        return list(dict.fromkeys(token for token in everything if token is not None))

    @property
    def prompt(self) -> Prompt:
        """The prompt that the model was tuned with."""
        return Prompt(system=self.task.instruction if self.task else None)


def open_source(
    text: str, base: str | None, out: Output, data: Path | None = None, case: Case | None = None
) -> Model:
    """Open a run directory, an adapter directory, or a whole model by name or directory.

    `base` overrides where the adapter's base model lies; `data` are rows to check on in place of the run's
    test split, read as `case` says. Raises `InputError` for a damaged run, or a base whose files differ from
    those that were tuned.
    """
    path = Path(text)
    if (path / MANIFEST).is_file() and not (path / "config.json").is_file():
        model = _open_run(path, base, out)
    elif is_adapter(path) and (path.parent / MANIFEST).is_file():
        raise InputError(
            f"{path}: the adapter of a run; give the run directory {path.parent}, whose hashes are checked"
        )
    elif is_adapter(path):
        model = _open_adapter(path, base, out)
    elif base is not None:
        raise InputError("--base goes with a run or an adapter; a whole model is named by the argument alone")
    else:
        source = resolve(text, out)
        model = Model(
            source.name, source, source.fingerprint(), None, None, Chat(load_tokenizer(source.path))
        )
    if data is not None:
        case = case or Case()
        long, instruction = case.long_prompt(), model.prompt.system
        model.rows = load_rows(
            data,
            case.rows_as(),
            out,
            prompt=long if long.given else None,
            instruction=instruction,
            answers=False,
        )
        model.inputs.append(describe_data(data))
    elif not model.rows:
        model.rows = [
            Example(({"role": "user", "content": t},), None, n) for n, t in enumerate(built_in(), start=1)
        ]
    _ = model.ends  # a damaged file is named before any work
    for stray in model.base.stray_files():
        out.warn(f"{model.base.path / stray}: not part of the model by its index; left out")
    for note in model.notes:
        out.log(note)
    return model


def _open_run(path: Path, base: str | None, out: Output) -> Model:
    manifest = read_manifest(path, stage="tune")
    method = manifest.tune.method if manifest.tune else None
    recorded = manifest.base
    if recorded is None or not recorded.sha256:
        raise InputError(f"{path}: the run has no record of its base; run `unshot tune` again")
    known = METHODS[method] if method else None
    if known is not None and known.virtual:
        raise InputError(
            f"{path}: tuned by prompt tuning, whose vectors stand before the prompt and are no weights: no GGUF or "
            "ONNX file holds them; serve the base with peft, or run `unshot tune --method lora`"
        )
    adapter = None if known is not None and known.whole else path / "adapter"
    if adapter is None:
        if base is not None:
            raise InputError(f"{path}: all weights were tuned and lie in {path / 'model'}; leave --base out")
        if not (path / "model").is_dir():
            raise InputError(f"{path}: the run has no model directory; run `unshot tune` again")
        source = resolve(str(path / "model"), out)
    else:
        if not adapter.is_dir():
            raise InputError(f"{path}: the run has no adapter; run `unshot tune` again")
        source = resolve(base or recorded.location(), out)
    fingerprint = source.fingerprint()
    if adapter is not None:
        _same_base(path, source, recorded, fingerprint)
    return Model(
        name=path.resolve().name,
        base=Source(recorded.name, source.path, source.license or recorded.license),
        fingerprint=fingerprint.changed(name=recorded.name),
        adapter_path=adapter,
        adapter=load_on(adapter, source) if adapter else None,
        chat=Chat(load_tokenizer(source.path, run_template(path))),
        task=read_task(path / "task.json"),
        rows=read_examples(path / "splits" / "test.jsonl"),
        inputs=[describe_file(path / MANIFEST)],
        run=path,
    )


def _same_base(path: Path, source: Source, recorded: BaseModel, fingerprint: BaseModel) -> None:
    """`InputError` where a file of the base is not the one that was tuned."""
    stray = set(source.stray_files())
    for name, digest in recorded.sha256.items():
        if name not in stray and fingerprint.sha256.get(name) != digest:
            raise InputError(
                f"{source.path / name}: not the file that {path} was tuned on; an adapter fits only its own base, give "
                f"that with --base (it was {recorded.name})"
            )


def _open_adapter(path: Path, base: str | None, out: Output) -> Model:
    """An adapter that another tool trained, on the base that `base` or its own configuration names."""
    named = base or named_base(path)
    source = resolve(named, out)
    notes = [] if base else [f"{path}: base {named}, from the adapter's configuration"]
    own = (path / "tokenizer.json").is_file()
    if own:
        notes.append(f"{path}: tokenizer and chat template are the adapter's own")
    foreign = bring_in(path, source)
    notes += [f"{path}: {note}" for note in check(foreign.folder, source.path)]
    tokenizer = path if own else source.path
    return Model(
        name=path.resolve().name,
        base=source,
        fingerprint=source.fingerprint(),
        adapter_path=foreign.folder,
        adapter=load_on(foreign.folder, source),
        chat=Chat(load_tokenizer(tokenizer)),
        inputs=[describe_file(f) for f in sorted(path.iterdir()) if f.suffix in (".json", ".safetensors")],
        tokenizer=tokenizer,
        notes=[*notes, *(f"{path}: {note}" for note in foreign.notes)],
        keep=foreign.keep,
    )


def generation_ends(path: Path, tokens: int) -> list[int]:
    """End tokens of a `generation_config.json`, none where there is no such file; `InputError` for a damaged one."""
    if not path.is_file():
        return []
    found = one_or_more(read_object(path, advice="; mend or remove it").get("eos_token_id"))
    for token in found:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < tokens:
            raise InputError(
                f"{path}: eos_token_id holds {json.dumps(token)[:40]}, which is no token of the model (0 to "
                f"{tokens - 1}); mend the file"
            )
    return found


def built_in() -> list[str]:
    """The package's own varied prompts, for a model without a test split."""
    text = Path(__file__).with_name("prompts.txt").read_text(encoding="utf-8")
    return [line.replace("\\n", "\n") for line in text.split("\n") if line.strip()]
