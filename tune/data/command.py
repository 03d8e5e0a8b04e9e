"""`unshot data check`, `split`, `import`, `label` and `review`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unshot.errors import InputError
from unshot.flags import case_flags
from unshot.options import (
    PATH,
    POSITIVE,
    PRICE,
    SECONDS,
    TEXT,
    Number,
    common,
    out_options,
    row_options,
    whole,
)

if TYPE_CHECKING:
    from unshot.case import Case
    from unshot.console import Output
    from unshot.data.rows import Example, RowOptions


@click.group()
def data() -> None:
    """Check a data set before training, split it, make one from request logs, have inputs labelled."""


@data.command()
@click.argument("path", metavar="DATA", type=PATH)
@out_options("Directory for the full lists.", required=False)
@click.option("--redact", is_flag=True, help="Write redacted.jsonl to --out, personal data replaced.")
@click.option("--phone-region", default="US", show_default=True, help="Country of national phone numbers.")
@click.option("--base", help="Count tokens with this model's tokenizer, against its context.")
@click.option("--max-length", type=whole(16), help="Longest row, tokens; default: as tune has it.")
@click.option("--similar", type=Number(ge=0.3, le=1), help="Near-duplicates from here on; default 0.7.")
@click.option("--annotator", default="annotator", show_default=True, help="Column with who labelled the row.")
@case_flags(
    "--instruction", "--labels", "--answer-field", "--metric", "--embedder", "--chat-template", "--loss-on"
)
@row_options
@common
def check(
    path: Path,
    final: Path | None,
    overwrite: bool,
    base: str | None,
    max_length: int | None,
    phone_region: str,
    similar: float | None,
    case: Case,
    out: Output,
    **settings: Any,
) -> None:
    """Look for what spoils training: malformed rows, contradictions, duplicates, personal data.

    Exit code 1 where rows are malformed or fewer than 50 are usable.
    """
    from tune.data.check import check_file
    from unshot.contracts.manifest import Manifest, describe_data, staged
    from unshot.data.files import write_text
    from unshot.data.personal import check_region

    if settings["redact"] and final is None:
        raise InputError("--redact writes a file; give --out DIR")
    if max_length and not base:
        raise InputError("--max-length counts tokens; give --base too")
    settings["out"] = out
    settings |= {
        "region": check_region(phone_region),
        "field": case.task.answer_field,
        "labels": case.task.labels,
        "embedder": case.tune.embedder,
    }
    if similar is not None:
        settings["threshold"] = similar
    long, instruction = case.long_prompt(), case.task.instruction
    settings |= {"prompt": long if long.given else None, "instruction": instruction, "task": case.task}
    if base:
        counter = Counter(base, case, out)
        settings |= {"count": counter.rows, "length": counter.text, "render": counter.chat.render}
        limits = (case.tune.max_length, counter.context or case.tune.max_length)
        settings |= {"context": max_length or min(limits), "strict_length": not max_length}
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(staged(final, overwrite=overwrite)) if final else None
        with out.progress() as progress:
            bar = progress.add_task("rows", total=None, note="")
            result = check_file(
                path, folder=work, progress=lambda n: progress.update(bar, completed=n), **settings
            )
        if work:
            write_text(work / "report.json", result.to_json(indent=2) + "\n")
            manifest = Manifest("data-check", inputs=[describe_data(path)])
            manifest.result = {"rows": result.rows, "ready": result.ready}
            manifest.finish(work)
    from tune.data.tables import check_tables

    out.result(result.plain(), *check_tables(result))
    if not result.ready:
        click.get_current_context().exit(1)


@data.command()
@click.argument("path", metavar="DATA", type=PATH)
@out_options()
@case_flags(
    "--instruction", "--labels", "--answer-field", "--embedder", "--group-by", "--time", "--shares", "--validation",
    "--test", seed="tune.seed",
)  # fmt: skip
@row_options
@common
def split(
    path: Path,
    final: Path,
    case: Case,
    out: Output,
    **settings: Any,
) -> None:
    """Split DATA into train, validation and test, without near-duplicates across them."""
    from tune.data.split import split_file
    from tune.data.tables import split_tables
    from tune.data.variety import WARN

    long = case.long_prompt()
    settings["embedder"] = case.tune.embedder
    settings["prompt"] = long if long.given else None
    settings |= {"settings": case.split, "task": case.task, "seed": case.tune.seed}
    result = split_file(path, final, out=out, **settings)
    if result["rows"]["test"] < result["before"]["test"] / 2:
        out.warn(
            f"{result['before']['test'] - result['rows']['test']} of {result['before']['test']} test rows were too "
            "similar to training rows; the rest is a small test"
        )
    if result["template_share"] > WARN:
        out.warn(
            f"{result['template_share']:.0%} of the prompts' words are one template; `unshot tune --augment-format` "
            "varies it"
        )
    out.result(result, *split_tables(result))


@data.command("import")
@click.argument("logs", nargs=-1, required=True, type=PATH)
@out_options()
@click.option(
    "--map",
    "pairs",
    multiple=True,
    metavar="NAME=FIELD",
    help="Where another form has messages (or input), system, answer, time, model; FIELD may be a.b.0.c.",
)
@row_options
@common
def import_(
    logs: tuple[Path, ...],
    final: Path,
    overwrite: bool,
    pairs: tuple[str, ...],
    rows_as: RowOptions,
    out: Output,
) -> None:
    """Find the prompt in request LOGS, and write it with its inputs, traffic and a case file for `unshot plan`.

    Reads OpenAI pairs, batch files and stored completions, LiteLLM, Langfuse, LangSmith, Helicone, OpenTelemetry GenAI
    spans, the gateway's log, and plain rows of inputs. The texts are written as they are: see `data check --redact`.
    """
    from tune.data.collect import import_logs
    from tune.data.tables import import_tables
    from unshot.data.logs import parse_mapping

    result = import_logs(
        logs, final, out, mapping=parse_mapping(pairs), columns=rows_as.columns, overwrite=overwrite
    )
    out.result(result, *import_tables(result))


class Counter:
    """Tokens of rows and texts with a model's tokenizer and chat template, and the model's context."""

    def __init__(self, base: str, case: Case, out: Output) -> None:
        from unshot.data.prompts import Prompt
        from unshot.models import resolve
        from unshot.text.chat import Chat, load_tokenizer

        source = resolve(base, out, need_weights=False)
        self.chat = Chat(load_tokenizer(source.path, case.tune.chat_template))
        for note in self.chat.tokenizer.repairs:
            out.warn(f"chat template: {note}")
        self.context: int | None = source.config().get("max_position_embeddings")
        self._prompt, self._every = Prompt(system=case.task.instruction), case.tune.loss_on == "all"

    def rows(self, rows: Sequence[Example]) -> list[tuple[int, int] | str]:
        """Tokens of each row's request (instruction and template included) and of its answer with its end.

        A row that `tune` would refuse to encode is what is wrong with it.
        """
        found: list[tuple[int, int] | str] = []
        for row in rows:
            try:
                item = self.chat.encode(self._prompt.request(row), row.answer or "", every=self._every)
            except InputError as error:
                found.append(str(error))
                continue
            found.append((item.prompt_length, item.answer_length))
        return found

    def text(self, text: str) -> int:
        """Tokens of a text by itself."""
        return len(self.chat.tokenizer.ids(text))


@data.command()
@click.argument("path", metavar="INPUTS", type=PATH)
@click.option(
    "--teacher", type=TEXT, required=True, metavar="SPEC", help="http://HOST/v1, or a model file: gguf:PATH."
)
@click.option("--teacher-model", metavar="NAME", help="The model's name at the server.")
@click.option("--key-env", metavar="NAME", help="Environment variable that holds the server's key.")
@click.option("--price", type=PRICE, help="The teacher's token prices, $ per million: input=2.5,output=10.")
@click.option("--budget", type=POSITIVE, help="Stop before this many dollars are spent; needs --price.")
@click.option("--votes", type=whole(1, 99), default=1, show_default=True, help="Sampled answers per input.")
@click.option("--max-tokens", type=whole(1), default=256, show_default=True, help="Longest answer, tokens.")
@click.option("--workers", type=whole(1, 256), default=8, show_default=True, help="Requests at a time.")
@click.option(
    "--timeout", type=SECONDS, default=120.0, show_default=True, help="Seconds until a try is given up."
)
@click.option("--logprobs", is_flag=True, help="Ask for log-probabilities: how sure the teacher is.")
@click.option(
    "--variations",
    type=whole(1),
    help="New inputs that the teacher writes, marked synthetic, never tested on.",
)
@click.option("--test", type=PATH, help="Rows that no new input may be like, beside INPUTS.")
@click.option("--write-batch", type=PATH, help="Write an OpenAI batch input file and ask nothing.")
@click.option("--read-batch", type=PATH, help="Take the answers of a batch output file; ask only the rest.")
@out_options()
@case_flags("--prompt", "--system", "--labels", "--answer-field")
@row_options
@common
def label(path: Path, final: Path, case: Case, rows_as: RowOptions, out: Output, **asked: Any) -> None:
    """Let a teacher with the long prompt answer INPUTS; its answers are rows for `unshot tune`.

    The same command goes on after an interruption, without asking again what was answered. Exit code 1 if the budget
    ends first.
    """
    from tune.data.label import LabelSettings, forecast_lines, label_file, questions
    from tune.data.ledger import write_batch
    from tune.data.teacher import ServerTeacher, open_teacher
    from tune.data.variations import PER_REQUEST, Ask
    from unshot.contracts.task import read_schema
    from unshot.data.load import load_rows

    price = asked["price"].of(asked["teacher_model"]) if asked["price"] else None
    if asked["budget"] is not None and price is None:
        raise InputError("--budget is in dollars; give the teacher's --price too")
    teacher = open_teacher(
        asked["teacher"], asked["teacher_model"], asked["key_env"], price=price, logprobs=asked["logprobs"],
        timeout=asked["timeout"],
    )  # fmt: skip
    schema = case.task.answer_schema
    settings = LabelSettings(
        votes=asked["votes"],
        max_tokens=asked["max_tokens"],
        concurrency=asked["workers"],
        budget=asked["budget"],
        labels=case.task.labels,
        answer_field=case.task.answer_field,
        schema=read_schema(schema) if schema else None,
    )
    prompt = case.long_prompt()
    if asked["variations"] and asked["write_batch"]:
        raise InputError("--variations needs answers before it can label; leave --write-batch out")
    if asked["test"] is not None and not asked["variations"]:
        raise InputError("--test keeps new inputs apart from a test; give --variations too")
    try:
        if settings.votes > 1 and not teacher.concurrent:
            raise InputError(
                f"--votes {settings.votes}: {teacher.name} answers greedily, every vote would be the same"
            )
        rows = load_rows(path, rows_as, out, prompt=prompt if prompt.given else None, answers=False)
        if asked["write_batch"] is not None:
            if not isinstance(teacher, ServerTeacher):
                raise InputError("--write-batch is for a server; give --teacher http://HOST/v1")
            bodies = ((q.key(teacher.name), teacher.body(q)) for _, q in questions(rows, prompt, settings))
            count = write_batch(asked["write_batch"], bodies)
            out.result({"requests": count, "path": str(asked["write_batch"])}, f"{count} requests written")
            return
        for line in forecast_lines(rows, prompt, settings, asked["teacher_model"], price):
            out.log(line)
        variations = None
        if asked["variations"]:
            apart = load_rows(asked["test"], rows_as, None, answers=False) if asked["test"] else []
            variations = Ask(asked["variations"], [row.text for row in apart])
            out.log(
                f"and {-(-variations.count // PER_REQUEST)} more for new inputs, which are then labelled too"
            )
        report = label_file(
            path,
            rows,
            prompt,
            teacher,
            settings,
            final,
            out,
            overwrite=asked["overwrite"],
            answered=asked["read_batch"],
            variations=variations,
        )
    finally:
        teacher.close()
    left = ", ".join(f"{count} {reason}" for reason, count in report.left_out.items())
    spent = "unknown dollars" if report.usage.dollars is None else f"${report.usage.dollars:.4f}"
    out.result(
        report.plain(),
        f"{report.labelled} of {report.inputs} inputs labelled by {report.teacher}"
        + (f"; left out: {left}" if left else ""),
        f"{report.usage.requests} requests, {report.usage.prompt_tokens:,} input tokens "
        f"({report.usage.cached_tokens:,} cached), {report.usage.output_tokens:,} output tokens, {spent}"
        + (
            f"; {report.usage.without_usage} answers came without usage" if report.usage.without_usage else ""
        ),
        f"rows: {final / 'labelled.jsonl'}. A teacher wrote them: scores on them are agreement with it, not accuracy.",
    )


@data.command()
@click.argument("path", metavar="LABELLED", type=PATH)
@click.option("--sheet", type=PATH, help="Draw a blinded sheet for people: FILE.csv or FILE.html.")
@click.option(
    "--rows", "queue", type=whole(0), default=100, show_default=True, help="Doubtful rows of the sheet."
)
@click.option(
    "--random",
    "sample",
    type=whole(1),
    default=50,
    show_default=True,
    help="Random rows of it, for the error rate.",
)
@click.option(
    "--from-review",
    type=PATH,
    multiple=True,
    metavar="SHEET",
    help="Read a filled sheet back (several: reviewers).",
)
@click.option("--seed", type=whole(0), default=0, show_default=True, help="Seed of the random rows.")
@click.option("--out", "final", type=PATH, help="With --from-review: directory for the corrected rows.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@case_flags("--instruction", "--labels", "--answer-field", "--embedder")
@row_options
@common
def review(
    path: Path,
    sheet: Path | None,
    queue: int,
    sample: int,
    from_review: tuple[Path, ...],
    seed: int,
    final: Path | None,
    overwrite: bool,
    case: Case,
    rows_as: RowOptions,
    out: Output,
) -> None:
    """Choose rows of LABELLED (of `data label`) for people to judge; read back, correct and drop rows.

    The random rows tell the teacher's error rate. The others are the doubtful ones: likely wrong labels (needs
    cleanlab), split votes, rows between two classes, of rare classes, far from all others.
    """
    from collections import Counter as Count

    from tune.data.review import draw_labels, labelled_file, read_labels
    from tune.data.select import has_cleanlab
    from tune.data.tables import review_tables
    from tune.evaluate.review import SHEETS, write_sheet
    from unshot.contracts.task import derive_task
    from unshot.data.load import load_rows
    from unshot.engines.embedder import OFF, find_embedder, open_embedder

    if (sheet is None) == (not from_review):
        raise InputError("give --sheet FILE to draw a sheet, or --from-review SHEET to read one")
    file = labelled_file(path)
    rows = load_rows(file, rows_as, out)
    task = derive_task(case.task, rows, out.log, embedder=case.tune.embedder)
    if sheet is None:
        if final is None:
            raise InputError("--from-review writes the corrected rows; give --out DIRECTORY")
        report = read_labels(file, rows, task, from_review, final, out, overwrite=overwrite)
        out.result(report.plain(), *review_tables(report, final))
        return
    if sheet.suffix.lower() not in SHEETS:
        raise InputError(f"{sheet}: a review sheet is a .csv or an .html file")
    if sheet.exists() and not overwrite:
        raise InputError(f"{sheet}: already there; choose another name or pass --overwrite")
    if task.labels and queue and not has_cleanlab():
        out.warn(
            "likely wrong labels are not looked for: that needs cleanlab; run `pip install 'unshot[review]'`"
        )
    folder = find_embedder(case.tune.embedder)
    vectors = open_embedder(str(folder) if folder else OFF)([row.text for row in rows])
    drawn, chosen = draw_labels(file, rows, task, vectors, queue=queue, sample=sample, seed=seed)
    write_sheet(sheet, drawn, case.task.instruction)
    counts = Count(pick.why for pick in chosen)
    name = drawn[0]["id"].rsplit("-", 1)[0]
    out.result(
        {"sheet": str(sheet), "review": name, "rows": len(drawn), "why": dict(counts)},
        f"{len(drawn)} of {len(rows)} rows to judge: {', '.join(f'{n} {why}' for why, n in counts.items())}",
        f"fill in {sheet}, then: unshot data review {path} --from-review FILLED.csv --out DIRECTORY",
    )
