"""What goes beside an artifact: model card, Modelfile for Ollama, server command lines, SHA-256 sums."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from export.boundaries import SERVED
from export.ollama import modelfile
from export.source import Model
from unshot.catalog.formats import Target
from unshot.contracts.gates import read_gates
from unshot.contracts.manifest import Gate, sha256
from unshot.contracts.parity import FileReport
from unshot.data.files import write_text

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
    write_text(work / "serve.sh", serve(model, targets, reports))
    (work / "serve.sh").chmod(0o755)
    write_text(work / "README.md", card(model, targets, reports, gates))
    files = sorted(
        f for f in work.rglob("*") if f.is_file() and ".scratch" not in f.parts and f.name != "SHA256SUMS"
    )
    lines = [f"{sha256(f)}  {f.relative_to(work).as_posix()}\n" for f in files]
    write_text(work / "SHA256SUMS", "".join(lines))


def served(model: Model, report: FileReport) -> int:
    """Tokens that a file is served with: the model's, at most `SERVED`, and none for which it is not the model."""
    return min(
        int(model.config.get("max_position_embeddings") or SERVED), SERVED, report.right_up_to or SERVED
    )


def serve(model: Model, targets: Sequence[Target], reports: Sequence[FileReport]) -> str:
    """One command line per artifact, as a shell script that runs the first."""
    lines = [
        "#!/bin/sh",
        "# Serves the model over an OpenAI-compatible API; the first command runs, the others are for other servers.",
        'cd "$(dirname "$0")" || exit 1',
    ]
    commands: list[str] = []
    notes: list[str] = []
    for target, report in zip(targets, reports, strict=True):
        name, context = shlex.quote(target.name), served(model, report)
        if report.right_up_to is not None:
            lines.append(f"# {name} is right up to {report.right_up_to} tokens: {'; '.join(report.notes)}")
        if target.kind == "lora":
            notes.append(
                f"llama-server --model BASE.gguf --lora {name}  # or several --lora, chosen per request"
            )
        elif target.kind == "gguf":
            alias = shlex.quote(model.name)
            commands += [
                f"llama-server --model {name} --alias {alias} --ctx-size {context} --jinja --port 8080",
                f"python -m llama_cpp.server --model {name} --model_alias {alias} --n_ctx {context}",
            ]
            tokenizer = shlex.quote(str(model.base.path))
            commands.append(f"vllm serve ./{name} --tokenizer {tokenizer} --max-model-len {context}")
        elif target.kind == "hf":
            commands.append(f"vllm serve ./{name} --max-model-len {context}")
        elif target.engine == "genai":
            notes.append(f"{name}: onnxruntime_genai.Model({target.name!r})")
        else:
            notes.append(f"{name}: optimum.onnxruntime.ORTModelForCausalLM.from_pretrained({target.name!r})")
    lines += [f"exec {c}" if n == 0 else f"# {c}" for n, c in enumerate(commands)]
    lines += [f"# {note}" for note in notes]
    return "\n".join(lines) + "\n"


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
        return f"| {target.name} | | | | | {'; '.join(report.failures)} |"
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
    found["parity"] = Gate(
        name="parity",
        passed=not failed,
        detail="; ".join(failed) or f"{len(reports)} files equal to the evaluated model within their limits",
        figures={"files": {r.target: r.passed for r in reports}},
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
