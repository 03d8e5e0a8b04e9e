"""`unshot tune --teacher self`: the teacher's answers before training, and afterwards what the prompt was worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tune.distil import Teaching, key
from unshot.cache import making
from unshot.case import Case
from unshot.console import Output
from unshot.contracts.record import Record
from unshot.data.files import json_digest
from unshot.data.prompts import Prompt
from unshot.data.rows import Example
from unshot.errors import InputError
from unshot.metrics.answers import INVALID, parse_answer
from unshot.models import Source
from unshot.text.chat import Chat, load_tokenizer

if TYPE_CHECKING:
    from tune.job import Job

# Longest answer that is asked of the teacher, tokens; a longer one is left out and counted.
MAX_ANSWER = 512


class SystemFigures(Record):
    """One system on the held-out inputs. Shares and scores come with the bounds of a 95% interval."""

    system: str
    prompt_tokens: float
    # Equal answers, and KL divergence in nats per answer token from the prompted base.
    agreement: list[float]
    divergence: list[float]
    # The task's metric on the data's own labels; None if it has none.
    score: list[float] | None = None


class PromptWorth(Record):
    """What the prompt was worth: base without it, base with it, and the tuned model without it, on the same rows."""

    rows: int
    labelled: int
    systems: list[SystemFigures]

    @property
    def gap_closed(self) -> float:
        """Share of the bare base's divergence from the prompted base that tuning took away."""
        bare, _, tuned = (system.divergence[0] for system in self.systems)
        return 1 - tuned / bare if bare > 0 else 0.0


def teach(source: Source, prompt: Prompt, rows: Sequence[Example], case: Case, out: Output) -> Teaching:
    """Ask the base, with the long prompt, for the answer to every row.

    The answers are kept in the cache directory by their content (token ids and probabilities, no text), so that
    another run with the same base, prompt and rows does not ask again. Raises `InputError` without a prompt.
    """
    from tune.distil import ask, load_answers, save_answers
    from tune.model import load_base, pick_device, uses_bf16

    if not prompt.given:
        raise InputError("--teacher self needs the long prompt: give `system` or `examples` under [task]")
    if case.tune.augment_format or case.tune.method == "prompt":
        raise InputError(
            "--teacher self goes without augment_format and without --method prompt; leave it out"
        )
    chat = Chat(load_tokenizer(source.path))
    distinct = list({key(row): row for row in rows}.values())
    prompts = [chat.prompt_ids(prompt.request(row)) for row in distinct]
    limit = int(source.config().get("max_position_embeddings") or 0)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if limit and len(prompts[longest]) + MAX_ANSWER > limit:
        raise InputError(
            f"line {distinct[longest].line}: {len(prompts[longest])} tokens with the long prompt and {MAX_ANSWER} for "
            f"the answer, more than the {limit} of {source.name}; shorten the prompt or leave the row out"
        )
    device = pick_device()
    bf16 = uses_bf16(case.tune, device)
    digest = json_digest([source.fingerprint().sha256, prompts, MAX_ANSWER, bf16])
    with making(f"teacher/{digest}.safetensors") as kept:
        if kept.is_file():
            out.log(f"the teacher's answers to these {len(distinct)} inputs are known from an earlier run")
            found = load_answers(kept)
        else:
            out.log(f"asking {source.name} with the long prompt for the answers to {len(distinct)} inputs")
            net = load_base(source, device, bf16=bf16)
            with out.progress() as bar:
                task = bar.add_task("teacher", total=len(prompts), note="")
                found = ask(
                    net, prompts, end=chat.end, max_tokens=MAX_ANSWER, progress=lambda n: bar.advance(task, n)
                )
            save_answers(kept, found)
            del net
    answers = {key(row): a for row, a in zip(distinct, found, strict=True) if a.finished(chat.end)}
    unfinished = len(distinct) - len(answers)
    if unfinished:
        out.warn(
            f"{unfinished} of {len(distinct)} inputs left out: no end of the answer within {MAX_ANSWER} tokens"
        )
    texts = {name: chat.decode(answer.ids[:-1]).strip() for name, answer in answers.items()}
    if case.task.labels:
        classes, field = case.task.labels, case.task.answer_field
        outside = [n for n, t in texts.items() if parse_answer(t, labels=classes, field=field) == INVALID]
        if outside:
            out.warn(
                f"{len(outside)} of {len(distinct)} inputs left out: the teacher's answer is none of the labels"
            )
        for name in outside:
            del answers[name]
    if not answers:
        raise InputError(f"{source.name} gave no usable answer; it does not follow this prompt")
    labels = {key(row): row.answer for row in rows if row.answer}
    asked = {key(row): ids for row, ids in zip(distinct, prompts, strict=True)}
    return Teaching(answers, texts, labels, unfinished, float(np.mean([len(p) for p in prompts])), asked)


def bare_figures(job: Job, net: Any) -> tuple[list[str], np.ndarray]:
    """The model's answers to the test rows with the short prompt, and its divergence from the teacher there."""
    from tune.distil import divergence
    from tune.job import request
    from tune.score import answer_requests

    asked = [request(row, job.task) for row in job.cleaned.parts.test]
    answers = answer_requests(job, net, asked, job.task.max_answer_tokens or 64)
    return answers, divergence(net, job.test_rows, job.device)


def prompt_worth(
    job: Job, before: tuple[list[str], np.ndarray], after: tuple[list[str], np.ndarray]
) -> PromptWorth:
    """The table of the three systems from the answers and divergences before and after training."""
    from unshot.metrics.intervals import share

    assert job.teaching is not None
    rows = job.cleaned.parts.test
    teacher = [row.answer or "" for row in rows]
    labels = [job.teaching.labels.get(key(row)) for row in rows]
    known = [i for i, label in enumerate(labels) if label is not None]
    short = float(np.mean([row.prompt_length for row in job.test_rows]))
    own = (teacher, np.zeros(len(rows)))
    systems = []
    for name, tokens, (answers, divergences) in (
        ("base, short prompt", short, before),
        ("base, long prompt (the teacher)", job.teaching.prompt_tokens, own),
        ("tuned, short prompt", short, after),
    ):
        equal = sum(a.strip() == t for a, t in zip(answers, teacher, strict=True))
        agreement, nats = share(equal, len(rows)), _mean_with_bounds(divergences)
        score = None
        if known:
            figures = job.task.scores(
                [labels[i] or "" for i in known],
                [answers[i] for i in known],
                requests=[rows[i].text for i in known],
            )
            score = [figures.score, figures.low, figures.high]
        systems.append(
            SystemFigures(
                name,
                tokens,
                [agreement.value, agreement.low, agreement.high],
                nats,
                score,
            )
        )
    return PromptWorth(len(rows), len(known), systems)


def _mean_with_bounds(values: np.ndarray) -> list[float]:
    """Mean of unbounded values with its 95% interval by Student's t."""
    from unshot.metrics.intervals import t_quantile

    mean, rows = float(values.mean()), len(values)
    half = t_quantile(0.975, rows - 1) * float(values.std(ddof=1)) / rows**0.5 if rows > 1 else float("inf")
    return [mean, mean - half, mean + half]


def worth_table(worth: PromptWorth, metric: str) -> Any:
    """The table on the terminal."""
    from rich.table import Table

    table = Table(title=f"what the prompt was worth ({worth.rows} held-out inputs)", title_justify="left")
    headers = ["", "prompt tokens", "agreement with the teacher", "KL per token, nats"]
    if worth.labelled:
        headers.append(f"{metric} on {worth.labelled} labels")
    for number, name in enumerate(headers):
        table.add_column(name, justify="right" if number else "left")
    for system in worth.systems:
        cells = [system.agreement, system.divergence, *([system.score] if system.score else [])]
        table.add_row(
            system.system,
            f"{system.prompt_tokens:,.0f}",
            *(f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in cells),
        )
    return table
