"""Data files as the ecosystem has them, each with what the reader makes of it.

`python -m tests.data_samples docs/data.md` writes the table in the docs; a test holds both to the reader.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unshot.data.load import shown
from unshot.data.rows import Columns, Example, Fault, Summary, scan
from unshot.text.template import Template

CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
START, END = "<!-- samples: begin -->", "<!-- samples: end -->"
Write = Callable[[Path], Path]


@dataclass(frozen=True)
class Sample:
    """A file (or files) and what is expected of it: rows read, lines refused and why, fields named, the first row."""

    name: str
    write: Write
    rows: int
    example: str
    form: str
    named: tuple[str, ...] = ()
    refused: dict[int, str] = field(default_factory=dict)
    columns: Columns = field(default_factory=Columns)

    @property
    def flags(self) -> str:
        """The options of the command line that go with it."""
        found = [f"--input-column {name}" for name in self.columns.input]
        found += [f"--input-template '{self.columns.template}'"] if self.columns.template else []
        found += [f"--output-column {self.columns.output}"] if self.columns.output else []
        return " ".join(found)


def jsonl(*rows: Any, name: str = "d.jsonl") -> Write:
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def text(name: str, content: str) -> Write:
    def write(folder: Path) -> Path:
        (folder / name).write_text(content, encoding="utf-8", newline="")
        return folder / name

    return write


def table(*rows: Sequence[str], name: str = "d.csv") -> Write:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter="\t" if name.endswith(".tsv") else ",").writerows(rows)
    return text(name, out.getvalue())


def pattern(folder: Path) -> Path:
    for number in range(2):
        row = json.dumps({"prompt": f"question {number}", "completion": "yes"})
        with gzip.open(folder / f"part-{number}.jsonl.gz", "wt", encoding="utf-8") as handle:
            handle.write(row + "\n")
    return folder / "part-*.jsonl.gz"


def parquet(folder: Path) -> Path:
    """As `datasets` writes it: the label is a number, its names stand in the schema."""
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.table({"text": ["late again", "thanks"], "label": [1, 0], "idx": [0, 1]})
    kinds = {"label": {"_type": "ClassLabel", "names": ["praise", "complaint"]}}
    meta = {"huggingface": json.dumps({"info": {"features": kinds}})}
    pyarrow.parquet.write_table(rows.replace_schema_metadata(meta), folder / "d.parquet")
    return folder / "d.parquet"


def saved(folder: Path) -> Path:
    """A directory as `Dataset.save_to_disk` writes it."""
    import pyarrow
    import pyarrow.ipc

    rows = pyarrow.table({"prompt": ["a", "b"], "completion": ["x", None]})
    with pyarrow.ipc.new_stream(folder / "data-00000-of-00001.arrow", rows.schema) as stream:
        stream.write_table(rows)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (folder / "dataset_info.json").write_text("{}", encoding="utf-8")
    return folder


def zst(folder: Path) -> Path:
    import pyarrow

    path = folder / "d.jsonl.zst"
    with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(json.dumps({"prompt": "a", "completion": "x"}).encode() + b"\n")
    return path


def feather(folder: Path) -> Path:
    import pyarrow
    import pyarrow.ipc

    rows = pyarrow.table({"question": ["a"], "answer": ["x"]})
    with pyarrow.ipc.new_file(folder / "d.arrow", rows.schema) as file:
        file.write_table(rows)
    return folder / "d.arrow"


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": content}


CALL = {"id": "c1", "type": "function", "function": {"name": "order", "arguments": '{"id": 7}'}}
TOOL = {"type": "function", "function": {"name": "order", "parameters": {"type": "object"}}}
PIXEL = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}

SAMPLES = [
    Sample("prompt and completion", jsonl({"prompt": "a", "completion": "x", "id": 7}), 1, "<|user|>a<|assistant|>x",
           "JSONL, prompt and completion", ("id",)),
    Sample("TRL, conversational", jsonl({"prompt": [system("s"), user("a")], "completion": [assistant("x")]}), 1,
           "<|system|>s<|user|>a<|assistant|>x", "JSONL, conversational prompt and completion"),
    Sample("messages, several turns", jsonl({"messages": [system("s"), user("a"), assistant("b"), user("c"),
                                                         assistant("x")]}), 1,
           "<|system|>s<|user|>a<|assistant|>b<|user|>c<|assistant|>x", "JSONL, messages"),
    Sample("messages, content as parts", jsonl({"messages": [user([{"type": "text", "text": "a"},
                                                                  {"type": "text", "text": "b"}]),
                                                            assistant([{"type": "text", "text": "x"}])]}), 1,
           "<|user|>a\nb<|assistant|>x", "JSONL, messages"),
    Sample("messages, developer and name", jsonl({"messages": [system("s", "developer"), user("a", name="Ann"),
                                                               assistant("x", refusal="no")]}), 1,
           "<|system|>s<|user|>a<|assistant|>x", "JSONL, messages", ("messages.refusal",)),
    Sample("OpenAI, tool calls in between", jsonl({"messages": [user("a"), assistant(None, tool_calls=[CALL]),
                                                               {"role": "tool", "tool_call_id": "c1", "content": "t"},
                                                               assistant("x")], "tools": [TOOL],
                                                  "parallel_tool_calls": False}), 1,
           "<|user|>a<|assistant|><|tool|>t<|assistant|>x", "JSONL, messages", ("parallel_tool_calls",)),
    Sample("OpenAI, tool call as the answer", jsonl({"messages": [user("a"), assistant(None, tool_calls=[CALL])],
                                                    "tools": [TOOL]}), 0, "",
           "JSONL, no row that can be read", refused={1: "tool call (`order`)"}),
    Sample("OpenAI, weights", jsonl({"messages": [user("a"), assistant("b", weight=0), user("c"),
                                                 assistant("x", weight=1)]},
                                   {"messages": [user("a"), assistant("y"), user("c"), assistant("z", weight=0)]},
                                   {"messages": [user("a"), assistant("x", weight=0)]}), 2,
           "<|user|>a<|assistant|>b<|user|>c<|assistant|>x", "JSONL, messages", refused={3: "weight 0"}),
    Sample("OpenAI, preference", jsonl({"input": {"messages": [user("a")]}, "preferred_output": [assistant("x")],
                                       "non_preferred_output": [assistant("y")]}), 0, "",
           "JSONL, no row that can be read", refused={1: "`preferred_output`, `non_preferred_output`"}),
    Sample("TRL, preference", jsonl({"prompt": "a", "chosen": "x", "rejected": "y"}), 0, "",
           "JSONL, no row that can be read", refused={1: "`chosen`, `rejected`"}),
    Sample("Alpaca", jsonl({"instruction": "Sum up.", "input": "a", "output": "x"},
                           {"instruction": "Say hi.", "input": "", "output": "y", "text": "### Instruction: ..."}), 2,
           "<|user|>Sum up.\n\na<|assistant|>x", "JSONL, Alpaca (instruction, input, output)", ("text",)),
    Sample("LLaMA-Factory", jsonl({"instruction": "b", "input": "", "output": "x", "system": "s",
                                   "history": [["a", "y"]]}), 1,
           "<|system|>s<|user|>a<|assistant|>y<|user|>b<|assistant|>x",
           "JSONL, Alpaca (instruction, input, output)"),
    Sample("Dolly", jsonl({"instruction": "a", "context": "c", "response": "x", "category": "qa"}), 1,
           "<|user|>a\n\nc<|assistant|>x", "JSONL, Alpaca (instruction, input, output)", ("category",)),
    Sample("SQuAD", jsonl({"id": "1", "title": "t", "context": "c", "question": "q",
                           "answers": {"text": ["x", "y"], "answer_start": [0, 1]}},
                          {"id": "2", "title": "t", "context": "c", "question": "r",
                           "answers": {"text": [], "answer_start": []}}), 1,
           "<|user|>c\n\nq<|assistant|>x", "JSONL, context and question", ("id", "title"),
           refused={2: "`answers` is empty"}),
    Sample("ShareGPT", jsonl({"id": "1", "conversations": [{"from": "system", "value": "s"},
                                                           {"from": "human", "value": "a"},
                                                           {"from": "gpt", "value": "x"}]}), 1,
           "<|system|>s<|user|>a<|assistant|>x", "JSONL, ShareGPT", ("id",)),
    Sample("ShareGPT with tools", jsonl({"system": "s", "tools": json.dumps([TOOL]), "conversations": [
        {"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "order", "arguments": {}}'},
        {"from": "observation", "value": "t"}, {"from": "gpt", "value": "x"}]}), 1,
           "<|system|>s<|user|>a<|assistant|><|tool|>t<|assistant|>x", "JSONL, ShareGPT", ()),
    Sample("text and label, a label missing", table(("text", "label"), ("a", "x"), ("b", ""), ("c", "nan")), 1,
           "<|user|>a<|assistant|>x", "CSV, columns `text` and `label`",
           refused={3: "no answer", 4: "NaN, a missing value"}),
    Sample("TSV, quotes and newlines", table(("text", "category"), ('a "b"\nc', "x"), name="d.tsv"), 1,
           '<|user|>a "b"\nc<|assistant|>x', "TSV, columns `text` and `category`"),
    Sample("several columns", table(("title", "body", "topic", "day"), ("a", "b", "x", "Monday")), 1,
           "<|user|>a\n\nb<|assistant|>x", "CSV, columns `title`, `body` and `topic`", ("day",),
           columns=Columns(input=("title", "body"), output="topic")),
    Sample("columns in a template", table(("age", "note", "risk"), ("61", "smokes", "high")), 1,
           "<|user|>Age 61. smokes<|assistant|>high", "CSV, columns `age`, `note` and `risk`",
           columns=Columns(template="Age {{age}}. {{note}}", output="risk")),
    Sample("a system column", table(("system", "prompt", "completion"), ("s", "a", "x"), ("", "b", "y")), 2,
           "<|system|>s<|user|>a<|assistant|>x", "CSV, prompt and completion"),
    Sample("answer as an object", jsonl({"prompt": "a", "completion": {"risk": "low"}},
                                        {"prompt": "b", "completion": '{"risk": "hi'}), 1,
           '<|user|>a<|assistant|>{"risk": "low"}', "JSONL, prompt and completion", refused={2: "breaks off"}),
    Sample("JSON list", text("d.json", json.dumps([{"question": "a", "answer": "x"}])), 1, "<|user|>a<|assistant|>x",
           "JSON, columns `question` and `answer`"),
    Sample("JSON object round a list", text("d.json", json.dumps({"data": [{"query": "a", "response": "x"}]})), 1,
           "<|user|>a<|assistant|>x", "JSON, columns `query` and `response`"),
    Sample("JSON Lines named .json", text("d.json", '{"prompt": "a", "completion": "x"}\n' * 2), 2,
           "<|user|>a<|assistant|>x", "JSON, prompt and completion"),
    Sample("Parquet with class names", parquet, 2, "<|user|>late again<|assistant|>complaint",
           "Parquet, columns `text` and `label`",
           ("idx",)),
    Sample("Arrow file", feather, 1, "<|user|>a<|assistant|>x", "Arrow, columns `question` and `answer`"),
    Sample("`datasets` directory", saved, 1, "<|user|>a<|assistant|>x", "Arrow, prompt and completion",
           refused={2: "null, a missing value"}),
    Sample("pattern of .gz files", pattern, 2, "<|user|>question 0<|assistant|>yes", "JSONL, prompt and completion"),
    Sample("compressed as .zst", zst, 1, "<|user|>a<|assistant|>x", "JSONL, prompt and completion"),
    Sample("images", jsonl({"messages": [user([{"type": "text", "text": "a"}, PIXEL]), assistant("x")]},
                           {"image": "a.png", "conversations": [{"from": "human", "value": "<image>a"},
                                                                {"from": "gpt", "value": "x"}]}), 0, "",
           "JSONL, no row that can be read", refused={1: "image (`image_url`)", 2: "image (`image`)"}),
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What the reader made of a sample."""

    summary: Summary
    rows: list[Example]
    faults: dict[int, str]
    example: str


def read(sample: Sample, folder: Path) -> Outcome:
    """Write the sample's file and read it; the first row is rendered with a plain chat template."""
    path = sample.write(folder)
    summary = Summary(path)
    items = list(scan(path, sample.columns, summary=summary))
    rows = [item for item in items if isinstance(item, Example)]
    faults = {item.line: item.problem for item in items if isinstance(item, Fault)}
    render = Template(CHATML, {}, "chatml").render
    return Outcome(summary, rows, faults, shown(rows[0], None, render) if rows else "")


def markdown() -> str:
    """The table for the docs."""
    lines = [
        "| Sample | Read as | Rows in | Rows used | Named, not used | Refused | First row, rendered |",
        "| --- | --- | ---: | ---: | --- | --- | --- |",
    ]
    for sample in SAMPLES:
        with tempfile.TemporaryDirectory() as folder:
            found = read(sample, Path(folder))
        name = f"{sample.name} (`{sample.flags}`)" if sample.flags else sample.name
        refused = "; ".join(f"{line}: {why}" for line, why in found.faults.items())
        cells = [
            name, found.summary.format(), str(found.summary.rows), str(len(found.rows)),
            ", ".join(f"`{n}`" for n in found.summary.unused), refused,
            f"`{json.dumps(found.example, ensure_ascii=False)[1:-1]}`" if found.example else "",
        ]  # fmt: skip
        escaped = (cell.replace("|", "\\|") for cell in cells)
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines)


def inserted(document: str) -> str:
    """The docs page with the table between its marks."""
    before, _, rest = document.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{markdown()}\n{END}{after}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(inserted(target.read_text(encoding="utf-8")), encoding="utf-8")
