"""What is exported: a run of `unshot tune`, or a bare base model (so that a baseline comes from the same exporter)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from export.adapter import Adapter, load_adapter
from export.merge import Merged
from unshot.console import Output
from unshot.contracts.manifest import NAME as MANIFEST
from unshot.contracts.manifest import BaseModel, InputFile, describe_file, read_manifest
from unshot.contracts.task import Task, read_task
from unshot.data.prompts import Prompt
from unshot.data.rows import Example, Message, read_examples
from unshot.errors import InputError
from unshot.models import Source, resolve
from unshot.text.chat import Chat, load_tokenizer


@dataclass
class Model:
    """A base model, its adapter (None for a bare base or a fully tuned one) and the rows it is checked on."""

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

    def merged(self) -> Merged:
        """The merged tensors, to be read one by one."""
        return Merged(self.base.weight_files(), self.base.config(), self.adapter)

    def requests(self) -> list[list[Message]]:
        """The messages of each row, with the tuned model's instruction as the system message."""
        return [self.prompt.request(row) for row in self.rows]

    @property
    def prompt(self) -> Prompt:
        """The prompt that the model was tuned with."""
        return Prompt(system=self.task.instruction if self.task else None)


def open_source(text: str, base: str | None, out: Output) -> Model:
    """Open a run directory or a base model by name or directory.

    `base` overrides where the run's base model lies. Raises `InputError` for a damaged run, or a base whose
    files differ from those that were tuned.
    """
    path = Path(text)
    if path.is_dir() and not (path / MANIFEST).is_file() and (path / "adapter_config.json").is_file():
        raise InputError(f"{path}: a bare adapter; give the run directory that `unshot tune` wrote")
    if (path / MANIFEST).is_file() and not (path / "config.json").is_file():
        return _open_run(path, base, out)
    if base is not None:
        raise InputError("--base goes with a run directory; a bare base model is named by the argument alone")
    source = resolve(text, out)
    return Model(
        name=source.name,
        base=source,
        fingerprint=source.fingerprint(),
        adapter_path=None,
        adapter=None,
        chat=Chat(load_tokenizer(source.path)),
        rows=[Example(({"role": "user", "content": t},), None, n) for n, t in enumerate(built_in(), start=1)],
    )


def _open_run(path: Path, base: str | None, out: Output) -> Model:
    manifest = read_manifest(path, stage="tune")
    method = manifest.tune.method if manifest.tune else None
    if method == "prompt":
        raise InputError(
            f"{path}: tuned by prompt tuning, whose vectors stand before the prompt and are no weights: no GGUF or "
            "ONNX file holds them; serve the base with peft, or run `unshot tune --method lora`"
        )
    recorded = manifest.base
    if recorded is None or not recorded.sha256:
        raise InputError(f"{path}: the run has no record of its base; run `unshot tune` again")
    if method == "full":
        return _open_full(path, base, recorded, out)
    if not (path / "adapter").is_dir():
        raise InputError(f"{path}: the run has no adapter; run `unshot tune` again")
    source = resolve(base or recorded.location(), out)
    fingerprint = source.fingerprint()
    for name, digest in recorded.sha256.items():
        if fingerprint.sha256.get(name) != digest:
            raise InputError(
                f"{source.path / name}: not the file that {path} was tuned on; an adapter fits only its own base, "
                f"give that with --base (it was {recorded.name})"
            )
    return Model(
        name=path.resolve().name,
        base=Source(recorded.name, source.path, source.license or recorded.license),
        fingerprint=fingerprint.changed(name=recorded.name),
        adapter_path=path / "adapter",
        adapter=load_adapter(path / "adapter"),
        chat=Chat(load_tokenizer(source.path)),
        task=read_task(path / "task.json"),
        rows=read_examples(path / "splits" / "test.jsonl"),
        inputs=[describe_file(path / MANIFEST)],
        run=path,
    )


def _open_full(path: Path, base: str | None, recorded: BaseModel, out: Output) -> Model:
    """A run whose every weight was tuned: RUN/model is the tuned model, and there is no adapter."""
    if base is not None:
        raise InputError(f"{path}: all weights were tuned and lie in {path / 'model'}; leave --base out")
    if not (path / "model").is_dir():
        raise InputError(f"{path}: the run has no model directory; run `unshot tune` again")
    source = resolve(str(path / "model"), out)
    return Model(
        name=path.resolve().name,
        base=Source(recorded.name, source.path, recorded.license),
        fingerprint=source.fingerprint().changed(name=recorded.name),
        adapter_path=None,
        adapter=None,
        chat=Chat(load_tokenizer(source.path)),
        task=read_task(path / "task.json"),
        rows=read_examples(path / "splits" / "test.jsonl"),
        inputs=[describe_file(path / MANIFEST)],
        run=path,
    )


def built_in() -> list[str]:
    """The package's own varied prompts, for a base model without a test split."""
    text = Path(__file__).with_name("prompts.txt").read_text(encoding="utf-8")
    return [line.replace("\\n", "\n") for line in text.split("\n") if line.strip()]
