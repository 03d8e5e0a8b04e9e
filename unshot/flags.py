"""The flags that stand for keys of the case file, and --case.

Such a flag takes its type, its bounds and its help from the case's records, so that it means the same and takes the
same forms on every command.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from unshot.options import (
    EMBEDDER,
    PATH,
    TEXT,
    TEXT_OR_FILE,
    Command,
    Factor,
    Names,
    Number,
    Option,
    output,
)

# A flag and the key of the case file that it stands for, on every command that has it.
FLAGS = {
    "--prompt": "task.examples",
    "--inputs": "task.inputs",
    "--system": "task.system",
    "--instruction": "task.instruction",
    "--labels": "task.labels",
    "--answer-field": "task.answer_field",
    "--metric": "task.metric",
    "--judge": "task.judge",
    "--judge-model": "task.judge_model",
    "--judge-key-env": "task.judge_key_env",
    "--target": "task.target",
    "--current": "task.current",
    "--fails": "task.fails",
    "--examples-at-hand": "task.examples_at_hand",
    "--rate": "traffic.rate",
    "--peak-factor": "traffic.peak_factor",
    "--arrival-cv": "traffic.arrival_cv",
    "--output-tokens": "traffic.output_tokens",
    "--reasoning-tokens": "traffic.reasoning_tokens",
    "--offline": "traffic.offline",
    "--slo-ttft": "traffic.slo.ttft_ms",
    "--slo-tpot": "traffic.slo.tpot_ms",
    "--slo-e2e": "traffic.slo.e2e_ms",
    "--engine": "candidate.engine",
    "--kv-cache": "candidate.kv_cache",
    "--tensor-parallel": "candidate.tensor_parallel",
    "--max-sequences": "candidate.max_sequences",
    "--chunk": "candidate.chunk",
    "--speculative-tokens": "candidate.speculative_tokens",
    "--acceptance": "candidate.acceptance",
    "--price-factor": "candidate.price_factor",
    "--cold-start-s": "plan.cold_start_s",
    "--min-replicas": "plan.min_replicas",
    "--cheaper-api": "plan.cheaper_api",
    "--group-by": "split.group_by",
    "--time": "split.time",
    "--shares": "split.shares",
    "--validation": "split.validation",
    "--test": "split.test",
    "--method": "tune.method",
    "--teacher": "tune.teacher",
    "--rank": "tune.rank",
    "--layers": "tune.layers",
    "--virtual-tokens": "tune.virtual_tokens",
    "--learning-rate": "tune.learning_rate",
    "--epochs": "tune.epochs",
    "--patience": "tune.patience",
    "--max-length": "tune.max_length",
    "--init": "tune.init",
    "--schedule": "tune.schedule",
    "--loss-on": "tune.loss_on",
    "--chat-template": "tune.chat_template",
    "--gradient-checkpointing": "tune.gradient_checkpointing",
    "--dtype": "tune.dtype",
    "--mix": "tune.mix",
    "--mix-share": "tune.mix_share",
    "--rehearsal": "tune.rehearsal",
    "--on-policy": "tune.on_policy",
    "--augment-format": "tune.augment_format",
    "--embedder": "tune.embedder",
    "--strict": "tune.strict",
    "--to": "export.to",
    "--requests": "bench.requests",
    "--cold-requests": "bench.cold_requests",
    "--concurrency": "bench.concurrency",
    "--margin": "bench.margin",
    "--claim": "bench.claim",
}
# Names that a flag had on some command before; they go on working there.
OLDER = {
    "--prompt": ("--baseline-prompt",),
    "--system": ("--baseline-system",),
    "--group-by": ("--group",),
}
# Keys of one yes or no that have a flag for the no as well.
BOTH_WAYS = ("tune.gradient_checkpointing",)


def key_flags(*names: str, help: dict[str, str] | None = None) -> Callable[[Command], Command]:
    """Add flags of `FLAGS` to a command that reads no case; it gets each by the last part of its key."""

    def decorate(function: Command) -> Command:
        for name in reversed(names):
            key = FLAGS[name]
            function = _case_flag(name, key, (help or {}).get(name), key.rpartition(".")[2])(function)
        return function

    return decorate


def case_flags(*names: str, help: dict[str, str] | None = None, **keys: str) -> Callable[[Command], Command]:
    """Add flags that stand for keys of the case file, and --case; the command gets the loaded case as `case`.

    `names` are flags of `FLAGS`; `keys` are flags of this command alone, with their key (`gpu="candidate.gpu"`);
    `help` says more than the case's records about a flag.
    """
    wanted = {name: FLAGS[name] for name in names}
    wanted |= {f"--{name.replace('_', '-')}": key for name, key in keys.items()}
    more = help or {}

    def decorate(function: Command) -> Command:
        @functools.wraps(function)
        def wrapper(*args: Any, case_path: Path | None, **kwargs: Any) -> Any:
            from unshot.case_file import load_case

            if (
                click.get_current_context().invoked_subcommand is not None
            ):  # a group: its command reads its own
                return None
            given = {key: kwargs.pop(_dest(key)) for key in wanted.values()}
            given = {key: list(v) or None if isinstance(v, tuple) else v for key, v in given.items()}
            return function(*args, case=load_case(case_path, given, output()), **kwargs)

        command = case_option(wrapper)
        for name, key in reversed(wanted.items()):
            command = _case_flag(name, key, more.get(name))(command)
        return command

    return decorate


def _dest(key: str) -> str:
    return f"case__{key.replace('.', '__')}"


def _case_flag(
    name: str, key: str, text: str | None, dest: str | None = None
) -> Callable[[Command], Command]:
    from unshot.case_file import keys

    if key == "bench.claim":
        return click.option(name, _dest(key), type=Factor(), help="Claimed factor, e.g. 5-10.")
    known = keys()[key]
    settings = option_settings(known)
    shown = text or known.text
    if known.default not in (None, [], "", False, True) and not settings.get("multiple"):
        shown += (
            f" [default: {known.default:g}]"
            if isinstance(known.default, float)
            else f" [default: {known.default}]"
        )
    declaration = f"{name}/--no-{name[2:]}" if key in BOTH_WAYS else name
    return click.option(
        declaration,
        dest or _dest(key),
        cls=Option,
        older=OLDER.get(name, ()),
        default=None,
        help=shown,
        **settings,
    )


def option_settings(key: Any) -> dict[str, Any]:
    """The click settings of a flag for a key of the case file."""
    from msgspec import inspect

    kind = key.inner
    if isinstance(kind, inspect.ListType):
        return (
            {"type": Names(key.accepted)}
            if key.name.startswith("task.")
            else {"type": TEXT, "multiple": True}
        )
    if key.accepted():
        return {"type": click.Choice(key.accepted())}
    if isinstance(kind, inspect.BoolType):
        return {"is_flag": True}
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        bounds = {name: getattr(kind, name) for name in ("ge", "gt", "le", "lt")}
        return {"type": Number(whole=isinstance(kind, inspect.IntType), key=key.name, **bounds)}
    if isinstance(kind, inspect.CustomType):
        return {"type": PATH}
    if key.name == "tune.embedder":
        return {"type": EMBEDDER}
    return {"type": TEXT_OR_FILE if key.text_or_file else TEXT}


def case_option(function: Command) -> Command:
    """Add --case FILE (default: ./unshot.toml if it is there)."""
    return click.option(
        "--case",
        "case_path",
        type=PATH,
        default=None,
        help="Case file; default ./unshot.toml if it is there.",
    )(function)
