"""Request logs as people have them: each known form becomes `Call`s, a request with its answer, time and model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unshot.data.files import Place, Problem, raw_rows
from unshot.data.formats import Columns, read_row
from unshot.data.log_formats import LOG_FORMATS, Call, answer_of, chat, loads, seconds, text_of
from unshot.data.messages import Row
from unshot.errors import InputError


@dataclass
class LogSummary:
    """What a reading met: calls by form, and rows that were not used, by reason."""

    formats: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    first_unknown: str | None = None
    failed: int = 0
    without_answer: int = 0

    def skip(self, reason: str, place: object) -> None:
        """Count a row that is not used."""
        self.unknown[reason] += 1
        self.first_unknown = self.first_unknown or f"{place}: {reason}"


def read_calls(
    paths: Sequence[Path], summary: LogSummary, *, mapping: Mapping[str, str], columns: Columns | None = None
) -> Iterator[Call]:
    """The answered calls of all files. Rows of no known form are counted in `summary`, never dropped in silence.

    `mapping` names the fields of another form: `messages` or `input`, `answer`, `time`, `model`, each as a dotted path.
    Raises `InputError` where a file cannot be read.
    """
    waiting: dict[str, Call] = {}
    answers: dict[str, Call] = {}
    for path in paths:
        for place, row in _rows(path):
            if isinstance(row, Problem):
                summary.skip(str(row), place)
                continue
            try:
                name, calls = calls_of(place, row, mapping, columns)
            except Problem as problem:
                summary.skip(str(problem), place)
                continue
            summary.formats[name] += len(calls)
            for call in calls:
                if call.id is not None and not call.messages:
                    _join(answers, call)
                elif call.id is not None and call.answer is None and not call.failed:
                    _join(waiting, call)
                elif call.failed:
                    summary.failed += 1
                else:
                    summary.without_answer += call.answer is None
                    yield call
    yield from _joined(waiting, answers, summary)


def _join(calls: dict[str, Call], call: Call) -> None:
    """Keep one half of a call; messages of stored completions come one by one."""
    assert call.id is not None
    known = calls.get(call.id)
    if known is None:
        calls[call.id] = call
    else:
        known.messages += call.messages


def _joined(waiting: dict[str, Call], answers: dict[str, Call], summary: LogSummary) -> Iterator[Call]:
    for key, call in waiting.items():
        answer = answers.pop(key, None)
        if answer is None:
            summary.without_answer += 1
            yield call
        elif answer.failed:
            summary.failed += 1
        else:
            call.answer, call.output_tokens = answer.answer, answer.output_tokens
            call.time, call.model = answer.time or call.time, call.model or answer.model
            summary.without_answer += call.answer is None
            yield call
    if answers:
        summary.unknown["an answer whose request is in no file (give the requests' file too)"] += len(answers)


def _rows(path: Path) -> Iterator[tuple[Place, object]]:
    """Rows of a log file; of a directory of the gateway those of its request files."""
    if path.is_dir() and any(path.glob("requests-*.jsonl")):
        path = path / "requests-*.jsonl"
    yield from raw_rows(path)


def calls_of(
    place: Place, row: object, mapping: Mapping[str, str], columns: Columns | None
) -> tuple[str, list[Call]]:
    """The form of a row and its calls. Raises `Problem` for a row of no known form."""
    if not isinstance(row, dict):
        raise Problem(f"expected an object, found {type(row).__name__}")
    if mapping:
        return "fields of --map", [_mapped(row, mapping)]
    for form in LOG_FORMATS:
        try:
            if form.matches(row):
                return form.name, form.parse(row)
        except Problem:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError):
            # Logs are other programs' records: a field of another shape costs its row.
            raise Problem(f"a row like {form.name} whose fields have another shape") from None
    try:
        found = read_row(place, row, columns or Columns(), answers=False)
    except Problem:
        raise Problem("of no known form (name its fields with --map)") from None
    time = next(
        (t for key in ("time", "timestamp", "created_at", "created") if (t := seconds(row.get(key)))), None
    )
    example = found.example
    return "rows of inputs", [Call(list(example.messages), example.answer, time, text_of(row.get("model")))]


def _at(row: object, path: str) -> object:
    """The value at a dotted path; numbers are places in lists."""
    for part in path.split("."):
        if isinstance(row, str):
            row = loads(row)
        if isinstance(row, dict):
            row = row.get(part)
        elif isinstance(row, list) and part.lstrip("-").isdigit() and -len(row) <= int(part) < len(row):
            row = row[int(part)]
        else:
            return None
    return row


def _mapped(row: Row, mapping: Mapping[str, str]) -> Call:
    found = {name: _at(row, path) for name, path in mapping.items()}
    source = found.get("messages", found.get("input"))
    if source is None:
        path = mapping.get("messages", mapping.get("input"))
        raise Problem(f"has no `{path}`")
    messages = chat(source)
    if system := text_of(found.get("system")):
        messages.insert(0, {"role": "system", "content": system})
    answer = answer_of(found.get("answer"))
    return Call(messages, answer, seconds(found.get("time")), text_of(found.get("model")))


def parse_mapping(pairs: Sequence[str]) -> dict[str, str]:
    """`--map messages=payload.messages` and the like; `InputError` for a name that means nothing."""
    known = ("messages", "input", "system", "answer", "time", "model")
    found = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if name not in known or not equals or not path:
            raise InputError(
                f"--map {pair}: give NAME=FIELD with a name of {', '.join(known)}; FIELD may be a.b.0.c"
            )
        found[name] = path
    if found and not {"messages", "input"} & found.keys():
        raise InputError("--map: name the request's text too, as messages=FIELD or input=FIELD")
    return found
