"""Rows as a stage uses them: read, the old prompt taken out, and everything that a user must know of it said."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from unshot.console import Output
from unshot.data.example import Example, Message
from unshot.data.files import column_names
from unshot.data.old_prompt import PromptsInRows, take_out_prompt
from unshot.data.prompts import Prompt
from unshot.data.rows import Columns, RowOptions, Summary, read_rows

# Characters of an example row that are shown from its beginning and its end.
SHOWN = 600


def load_rows(
    path: Path,
    options: RowOptions | None,
    out: Output | None,
    *,
    prompt: Prompt | None = None,
    instruction: str | None = None,
    answers: bool = True,
    used: Collection[str | None] = (),
    count: Callable[[str], int] | None = None,
) -> list[Example]:
    """The rows of a file without the old `prompt`, which `instruction` replaces; what was met is said to `out`.

    `used` are columns that the caller reads itself; `count` gives a text's tokens. Raises `InputError`.
    """
    options = options or RowOptions()
    rows, summary = read_rows(path, options.columns, answers=answers)
    replaces = prompt is not None or instruction is not None
    rows, prompts = take_out_prompt(rows, prompt, keep=options.keep_system or not replaces)
    if out:
        asked = [prompt or Prompt(), Prompt(instruction)]
        used = [*used, *(name for one in asked for name in one.columns)]
        announce(summary, prompts, out, used=used, instruction=instruction, count=count)
        for line in dict.fromkeys(line for one in asked for line in one.unfilled(rows)):
            out.warn(f"{summary.path}: {line}")
    return rows


def load_inputs(
    path: Path, prompt: Prompt, options: RowOptions | None = None, *, instruction: str | None = None
) -> tuple[list[Example], list[str]]:
    """Inputs that `prompt` (or `instruction`) is put round, themselves without it, and what a user must know of the
    reading.

    Where the prompt is a text with slots, the column of the last slot that the file has is the input.
    """
    options = options or RowOptions()
    columns = options.columns
    names = column_names(path)
    if columns.output is not None and columns.output not in names:  # inputs need no answers
        columns = replace(columns, output=None)
    if prompt.template is not None and columns == Columns():
        column = next((s for s in reversed(prompt.slots) if s in names), None)
        columns = Columns(input=(column,)) if column else columns
    rows, summary = read_rows(path, columns, answers=False)
    rows, prompts = take_out_prompt(rows, prompt, keep=options.keep_system)
    asked = [prompt, Prompt(instruction)]
    used = [name for one in asked for name in one.columns]
    said = [f"{len(rows)} rows of {path}, {summary.format()}", *summary.lines(used), *prompts.lines()]
    said += dict.fromkeys(line for one in asked for line in one.unfilled(rows))
    if carrying := sum(bool(row.tools) for row in rows):
        said.append(
            f"{carrying} rows carry function definitions: a chat template's own form of them is counted, a provider's "
            "is not known and not counted"
        )
    return rows, said


def announce(
    summary: Summary,
    prompts: PromptsInRows,
    out: Output,
    *,
    used: Collection[str | None] = (),
    instruction: str | None = None,
    count: Callable[[str], int] | None = None,
) -> None:
    """Log the form of the rows; warn of fields that nothing uses and of prompts inside the rows."""
    out.log(f"{summary.path}: {summary.rows} rows, {summary.format()}")
    for line in summary.lines({name for name in used if name}):
        out.warn(f"{summary.path}: {line}")
    for line in prompts.lines(count, instruction=instruction):
        out.warn(f"{summary.path}: {line}")


def shown(
    row: Example, prompt: Prompt | None = None, render: Callable[[Sequence[Message]], str] | None = None
) -> str:
    """A row as the model sees it: through the chat template where `render` is given, else turn by turn.

    A long text is cut in its middle, which is said.
    """
    messages = (prompt or Prompt()).request(row)
    if render is not None:
        text = render(messages) + (row.answer or "")
    else:
        turns = [f"{m['role']}: {m['content']}" for m in messages]
        text = "\n".join(turns + ([f"assistant: {row.answer}"] if row.answer is not None else []))
    if len(text) <= 2 * SHOWN + 40:
        return text
    return f"{text[:SHOWN]}\n[... {len(text) - 2 * SHOWN:,} characters ...]\n{text[-SHOWN:]}"
