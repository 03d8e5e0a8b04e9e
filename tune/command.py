"""`unshot tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unshot.flags import case_flags
from unshot.options import PATH, common, out_options, row_options

if TYPE_CHECKING:
    from unshot.case import Case
    from unshot.console import Output


@click.command()
@click.argument("data", type=PATH, required=False)
@click.option("--base", help="Base model: a directory, a hub name, or smollm2-135m (embedded).")
@out_options("Run directory to write.", "run directory", required=False)
@case_flags(
    "--instruction", "--labels", "--answer-field", "--metric", "--judge", "--judge-model", "--judge-key-env",
    "--target", "--method", "--teacher", "--on-policy", "--rank",
    "--layers", "--virtual-tokens", "--learning-rate", "--epochs", "--patience", "--max-length",
    "--gradient-checkpointing", "--dtype", "--init", "--schedule", "--loss-on", "--chat-template", "--mix",
    "--mix-share", "--rehearsal", "--augment-format",
    "--embedder", "--strict", "--group-by", "--time", "--shares", "--validation", "--test",
    seed="tune.seed",
)  # fmt: skip
@click.option("--fsdp", is_flag=True, help="Under torchrun: share the model between the processes.")
@click.option(
    "--dry-run", is_flag=True, help="Show settings with reasons and the memory needed; train nothing."
)
@click.option(
    "--learning-curve", is_flag=True, help="Also train on parts of the rows: what would more rows buy?"
)
@click.option("--report-to", help="tensorboard, mlflow, wandb: comma-separated.")
@click.option("--log-dir", type=PATH, help="TensorBoard's events; default: OUT-logs.")
@click.option(
    "--gates/--no-gates",
    default=None,
    help="Measure forgetting and robustness; default: as the case says, yes.",
)
@row_options
@common
def tune(
    data: Path | None,
    base: str | None,
    final: Path | None,
    overwrite: bool,
    case: Case,
    gates: bool | None,
    out: Output,
    **flags: Any,
) -> None:
    """Fine-tune a base model on DATA (JSONL or CSV) and evaluate it on held-out rows.

    Splits 80/10/10, trains with loss on the answer only, stops at the plateau, and reads the test split once.
    The same command after an interruption goes on where it stopped. Several processes: `torchrun -m unshot tune ...`.
    """
    from tune.data.split import Splitting
    from tune.run import Options, tune_run
    from unshot.errors import GateError, InputError

    if gates is not None:
        case.tune.forgetting = case.tune.robustness = gates
    options = Options(
        **{k: flags.pop(k) for k in ("dry_run", "learning_curve", "report_to", "log_dir", "fsdp")}
    )
    splitting = Splitting.of(case.split)
    if final is None:
        if not options.dry_run:
            raise InputError("no run directory to write; give --out DIRECTORY (or --dry-run)")
        final = Path("run")
    data = data or case.task.data
    if data is None:
        raise InputError("no data; give a JSONL or CSV file, or `data` under [task] in the case file")
    result = tune_run(
        data,
        base or case.candidate.model,
        final,
        case,
        out,
        overwrite=overwrite,
        options=options,
        splitting=splitting,
        **flags,
    )
    if options.dry_run:
        out.result(result, *forecast(result))
        return
    out.result({"out": str(final), **result}, *summary(result, final))
    target, quality = case.task.target, next(g for g in result["gates"] if g["name"] == "quality")
    if target is not None and quality["passed"] is False:
        raise GateError(f"target {target:g} not met on the test split: {quality['detail']}; {final} is kept")
    if target is not None and quality["passed"] is None:
        raise GateError(
            f"whether the target {target:g} is met is not shown: {quality['detail']}; {final} is kept"
        )
    failed = [gate["name"] for gate in result["gates"] if gate["passed"] is False]
    if case.tune.strict and failed:
        raise GateError(
            f"gates failed: {', '.join(failed)} (figures in {final / 'README.md'}); {final} is kept"
        )


def forecast(result: dict[str, Any]) -> list[Any]:
    """A dry run as rich tables: settings with reasons, then memory."""
    from rich.table import Table

    settings = Table(
        title=f"{result['method']} on {result['base']}, {result['device']}", title_justify="left"
    )
    for name in ("setting", "value", "why"):
        settings.add_column(name, overflow="fold")
    for key, reason in result["reasons"].items():
        settings.add_row(key.replace("_", " "), str(result["plan"].get(key, "")), reason)
    plan = result["plan"]
    settings.add_row(
        "steps", f"{result['steps']:,}", f"{plan['rows']} rows, at most {plan['epochs']} epochs, packed"
    )
    memory = Table(title="memory", title_justify="left")
    memory.add_column("term")
    memory.add_column("GB", justify="right")
    memory.add_column("how", overflow="fold")
    for name, value, how in result["memory_terms"]:
        memory.add_row(name, f"{value:.3f}", how)
    free = result["memory"]["free"]
    return [settings, *result["notes"], memory, f"free now: {free / 1e9:.2f} GB"]


def summary(result: dict[str, Any], final: Path) -> list[Any]:
    """The run as rich tables: epochs, then test scores."""
    from rich.table import Table

    epochs = Table(title=f"{result['base']}, {result['method']}: {result['stopped']}", title_justify="left")
    for name in (
        "epoch",
        "train loss",
        "validation loss",
        f"validation {result['test']['metric']}",
        "invalid",
    ):
        epochs.add_column(name, justify="right")
    for row in result["history"]:
        mark = " *" if row["epoch"] == result["best_epoch"] else ""
        epochs.add_row(
            f"{row['epoch']}{mark}",
            f"{row['train_loss']:.3f}",
            f"{row['loss']:.3f}",
            f"{row['score']:.3f}",
            f"{row['invalid']:.1%}",
        )
    test = result["test"]
    what = "agreement with the teacher, test" if result["reference"] == "teacher" else "test"
    line = (
        f"{what} ({test['rows']} rows, read once): {test['metric']} {test['score']:.3f} "
        f"[{test['low']:.3f}, {test['high']:.3f}], accuracy {test['accuracy']:.3f}, invalid {test['invalid']:.1%}"
    )
    words = {True: "passed", False: "FAILED", None: "undecided"}
    lines = [line, *(f"gate {g['name']} {words[g['passed']]}: {g['detail']}" for g in result["gates"])]
    if found := result.get("preference"):
        lines.append(
            f"{found['method']} on {found['pairs']} pairs: validation {found['score_before']:.3f} to "
            f"{found['score_after']:.3f}, right answer likelier in {found['preferred_before']:.0%} to "
            f"{found['preferred_after']:.0%}; {'kept' if found['kept'] else 'taken back'}"
        )
    if result.get("learning_curve"):
        from tune.curve import sentence

        lines.append(sentence(result["learning_curve"]))
    if result.get("prompt_worth"):
        from tune.teach import PromptWorth, worth_table

        lines.append(worth_table(PromptWorth.of(result["prompt_worth"]), test["metric"]))
    return [epochs, *lines, f"written to {final}"]
