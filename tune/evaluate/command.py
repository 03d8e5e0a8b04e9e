"""`unshot eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unshot.engines.embedder import ACCEPTED
from unshot.flags import case_flags, key_flags
from unshot.metrics.thresholds import REVIEW_ACCEPT
from unshot.options import PATH, SHARE, common, out_options, row_options, whole

if TYPE_CHECKING:
    from unshot.case import Case
    from unshot.console import Output


@click.command("eval")
@click.argument("run", type=PATH)
@click.option("--data", type=PATH, help="Rows to score on; default: the run's test split.")
@click.option("--compare", "other", metavar="RUN", type=PATH, help="A second run, same rows.")
@click.option("--base", help="Where the base model lies, if not where it was tuned.")
@out_options("Directory for scores and answers.", required=False)
@click.option("--seed", type=whole(0), default=0, show_default=True, help="Seed of the bootstrap.")
@key_flags(
    "--metric", "--embedder", "--judge", "--judge-model", "--judge-key-env",
    help={
        "--metric": "What is scored; default: the task's metric.",
        "--embedder": f"For BERTScore and paraphrases: {ACCEPTED}.",
    },
)  # fmt: skip
@click.option("--judge-rows", type=whole(1), default=50, show_default=True, help="Rows for the judge.")
@click.option(
    "--review",
    type=PATH,
    help="Draw a blinded sheet for people: FILE.csv or FILE.html.",
)
@click.option("--review-rows", type=whole(1), default=50, show_default=True, help="Rows of the sheet.")
@click.option(
    "--from-review",
    type=PATH,
    multiple=True,
    metavar="SHEET",
    help="Read a filled sheet back (several: several reviewers); no answer is generated.",
)
@click.option(
    "--accept",
    type=SHARE,
    default=REVIEW_ACCEPT.value,
    show_default=True,
    help="Share of answers that reviewers must accept.",
)
@case_flags()
@row_options
@common
def evaluate(
    run: Path,
    case: Case,
    judge: str | None,
    judge_model: str | None,
    judge_key_env: str | None,
    from_review: tuple[Path, ...],
    accept: float,
    out: Output,
    **settings: Any,
) -> None:
    """Score RUN's really generated answers, with intervals; every reading of a test is recorded in the run.

    The task is the run's; of the case file [rows] and the long prompt say how the rows of --data are read.
    A judge's key comes from UNSHOT_JUDGE_KEY or OPENAI_API_KEY. --from-review records the gate `review` in the run;
    with --judge it says how far the judge agrees with the people.
    """
    import contextlib

    from tune.evaluate.tables import review_tables, tables
    from unshot.errors import GateError, InputError
    from unshot.metrics.judge import open_judge

    if from_review and settings["review"]:
        raise InputError("--review draws a sheet and --from-review reads one; give one of them")
    with contextlib.ExitStack() as stack:
        opened = None
        if judge:
            opened = open_judge(judge, judge_model, judge_key_env)
            stack.callback(opened.close)
        if from_review:
            from tune.evaluate.review import from_review as read_back
            from unshot.contracts.manifest import read_manifest

            read_manifest(run, stage="tune")
            result = read_back(run, from_review, opened, out, accept=accept, seed=settings["seed"])
            out.result(result.plain(), *review_tables(result))
            if result.gate.passed is False:
                raise GateError(f"the gate `review` failed: {result.gate.detail}")
            return
        from tune.evaluate.run import Ask, evaluate_run

        long = case.long_prompt() if settings["data"] else None
        found = evaluate_run(
            run, out, Ask(judge=opened, prompt=long if long and long.given else None, **settings)
        )
    if found.reading.reading > 1:
        out.warn(
            f"reading {found.reading.reading} of {found.reading.data}: what is chosen by its score is no longer tested "
            "by it"
        )
    if found.test_seal.others and (warning := found.test_seal.warning()):
        out.warn(warning)
    if found.like_training:
        out.warn(f"{len(found.like_training)} of {found.rows} rows are near-duplicates of training rows")
    if found.caution:
        out.warn(found.caution)
    out.result(found.plain(), *tables(found))
