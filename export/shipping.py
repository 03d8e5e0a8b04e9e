"""What goes beside an artifact: model card, Modelfile for Ollama, server command lines, SHA-256 sums."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from export.boundaries import SERVED
from export.ollama import modelfile
from export.peft_adapter import served_rank
from export.source import Model
from unshot.catalog.formats import Target
from unshot.contracts.gates import read_gates
from unshot.contracts.manifest import Gate, sha256
from unshot.contracts.parity import FileReport
from unshot.data.files import write_text

SUMS = "SHA256SUMS"
WORDS = {True: "passed", False: "**failed**", None: "undecided"}
NOT_REVIEWED = (
    "**No human has reviewed this model's answers.** The scores are automated metrics alone; do not ship on those. "
    "`unshot eval RUN --review sheet.html` draws a blinded sample from the run."
)


def write_shipping(
    model: Model, targets: Sequence[Target], reports: Sequence[FileReport], gates: Sequence[Gate], work: Path
) -> None:
    """Write the files that a deployment needs beside the artifacts in `work`."""
    gguf = [t for t in targets if t.kind == "gguf"]
    if gguf:
        first = next(r for r in reports if r.target == str(gguf[0]))
        write_text(work / "Modelfile", modelfile(model, gguf[0], served(model, first)))
    for name, text in serve(model, targets, reports).items():
        write_text(work / name, text)
        (work / name).chmod(0o755)
    write_text(work / "README.md", card(model, targets, reports, gates))
    files = sorted(f for f in work.rglob("*") if f.is_file() and ".scratch" not in f.parts and f.name != SUMS)
    lines = [f"{sha256(f)}  {f.relative_to(work).as_posix()}\n" for f in files]
    write_text(work / SUMS, "".join(lines))


def served(model: Model, report: FileReport) -> int:
    """Tokens that a file is served with: the model's, at most `SERVED`, and none for which it is not the model."""
    return min(
        int(model.config.get("max_position_embeddings") or SERVED), SERVED, report.right_up_to or SERVED
    )


ADDRESS = '--host "${HOST:-127.0.0.1}" --port "${PORT:-8080}"'


def serve(model: Model, targets: Sequence[Target], reports: Sequence[FileReport]) -> dict[str, str]:
    """`serve.sh`, which starts the first file's usual server, and one script a server, `serve-NAME.sh`.

    Each listens at `HOST` and `PORT` of the environment, by default 127.0.0.1 and 8080, with an OpenAI-compatible API.
    """
    head = ["#!/bin/sh", 'cd "$(dirname "$0")" || exit 1']
    commands: list[tuple[str, str]] = []
    notes: list[str] = []
    for target, report in zip(targets, reports, strict=True):
        name, context = shlex.quote(target.name), served(model, report)
        if report.right_up_to is not None:
            head.append(f"# {name} is right up to {report.right_up_to} tokens: {'; '.join(report.notes)}")
        if target.kind == "lora":
            notes.append(
                f"llama-server --model BASE.gguf --lora {name}  # or several --lora, chosen per request"
            )
        elif target.kind == "gguf":
            commands += _gguf(model, target, context)
        elif target.kind == "peft":
            commands.append(("vllm", _vllm_adapter(model, target, context)))
        elif target.kind == "hf":
            named = f"--served-model-name {shlex.quote(model.name)} {ADDRESS}"
            commands.append(("vllm", f"exec vllm serve ./{name} --max-model-len {context} {named}"))
        elif target.engine == "genai":
            notes.append(f"{name}: onnxruntime_genai.Model({target.name!r})")
        else:
            notes.append(f"{name}: optimum.onnxruntime.ORTModelForCausalLM.from_pretrained({target.name!r})")
    files: dict[str, str] = {}
    for server, command in commands:
        files.setdefault(f"serve-{server}.sh", "\n".join([*head, command]) + "\n")
    first = commands[0][1] if commands else ""
    whole = [*head, *([first] if first else []), *(f"# {note}" for note in notes)]
    return {"serve.sh": "\n".join(whole) + "\n", **files}


def _gguf(model: Model, target: Target, context: int) -> list[tuple[str, str]]:
    """The servers of a GGUF file, the usual one first; Ollama's starts from the Modelfile beside it."""
    name, alias = shlex.quote(target.name), shlex.quote(model.name)
    tag = re.sub(r"[^a-z0-9._-]+", "-", model.name.lower()).strip("-._") or "model"
    return [
        (
            "llama-server",
            f"exec llama-server --model {name} --alias {alias} --ctx-size {context} --jinja {ADDRESS}",
        ),
        (
            "llama-cpp-python",
            f"exec python -m llama_cpp.server --model {name} --model_alias {alias} --n_ctx {context} {ADDRESS}",
        ),
        ("ollama", f"ollama create {tag} -f Modelfile && exec ollama run {tag}"),
    ]


def _vllm_adapter(model: Model, target: Target, context: int) -> str:
    """vLLM with the base, and the adapter beside it under the model's name."""
    assert model.adapter is not None
    folder = f"./{shlex.quote(target.name)}"
    base = shlex.quote(model.base.name if "/" in model.base.name else str(model.base.path))
    return (
        f'exec vllm serve "${{BASE:-{base}}}" --enable-lora --max-lora-rank {served_rank(model.adapter)} '
        f"--lora-modules {shlex.quote(model.name)}={folder} --tokenizer {folder} --generation-config {folder} "
        f"--max-model-len {context} {ADDRESS}"
    )


def card(
    model: Model, targets: Sequence[Target], reports: Sequence[FileReport], gates: Sequence[Gate]
) -> str:
    """The model card: what it is, where it comes from, under which licence, how equal each file is, its gates."""
    licence = model.base.license
    head = ["---", f"base_model: {model.base.name}"]
    head += [f"license: {licence.lower()}"] if licence else []
    head += ["pipeline_tag: text-generation", "---", ""]
    made = (
        f"{model.base.name}, tuned on `{model.task.name}`" if model.task else f"{model.base.name}, not tuned"
    )
    body = [
        f"# {model.name}",
        "",
        f"{made}. Written by `unshot export`; `manifest.json` holds versions and hashes.",
        "",
    ]
    if model.task and model.task.instruction:
        body += ["System prompt it was tuned with:", "", f"> {model.task.instruction}", ""]
    body += [
        "| file | KL (nats) | top-1 | cosine | perplexity ratio | verdict |",
        "|---|---|---|---|---|---|",
        *(_row(t, r) for t, r in zip(targets, reports, strict=True)),
        "",
        "Each file was run in its own engine on the run's test rows and compared with the model that was evaluated "
        "(fp32, adapter unmerged); `parity.json` has every figure and limit.",
        "",
        *gate_lines(gates),
        f"Licence of the base (SPDX): {licence or 'not recorded; see the base model'}. The training data is not part "
        "of these files; its licence is the data owner's to state.",
    ]
    return "\n".join([*head, *body]) + "\n"


def _row(target: Target, report: FileReport) -> str:
    found = report.figures.logits
    if found is None:
        words = "; ".join(report.failures or [report.verdict, *report.notes])
        return f"| {target.name} | | | | | {words} |"
    verdict = "equal within its limits" if report.passed else "; ".join(report.failures)
    if report.right_up_to is not None:
        verdict += f", right up to {report.right_up_to} tokens ({'; '.join(report.notes)})"
    cells = [
        target.name,
        f"{found.kl:.2g}",
        f"{found.top1_strict:.2%}",
        f"{found.cosine:.5f}",
        "" if found.perplexity is None else f"{found.perplexity:.4f}",
        verdict,
    ]
    return f"| {' | '.join(cells)} |"


def gates_of(model: Model, reports: Sequence[FileReport]) -> list[Gate]:
    """The run's gates by name (none for a bare base), `parity` of this export, and `review` in any case."""
    found = read_gates(model.run) if model.run else {}
    failed = [f"{r.target}: {'; '.join(r.failures)}" for r in reports if not r.passed]
    open_ones = [f"{r.target}: not proven here" for r in reports if not r.proven]
    equal = f"{len(reports) - len(open_ones)} files equal to the evaluated model within their limits"
    found["parity"] = Gate(
        name="parity",
        passed=False if failed else None if open_ones else True,
        detail="; ".join(failed or [*open_ones, equal]),
        figures={"files": {r.target: r.passed and r.proven for r in reports}},
    )
    if model.run and "review" not in found:
        found["review"] = Gate(
            name="review", passed=None, detail="no human has reviewed the answers; automated metrics alone"
        )
    return list(found.values())


def gate_lines(gates: Sequence[Gate]) -> list[str]:
    """The gates as the model card shows them; a missing review is said in words."""
    if not any(gate.name == "review" for gate in gates):
        return []
    lines = ["## Gates", "", "| gate | answer | what was seen |", "|---|---|---|"]
    for gate in gates:
        lines.append(f"| {gate.name} | {WORDS[gate.passed]} | {gate.detail.replace('|', '/')} |")
    review = next(gate for gate in gates if gate.name == "review")
    # A gate that nobody filled in has no figures.
    return [*lines, "", *([] if review.figures else [NOT_REVIEWED, ""])]
