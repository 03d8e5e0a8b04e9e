"""The one row reader: what `data check` refuses, every stage refuses with the same words; nothing is lost unsaid."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT
from tests.data_samples import SAMPLES, Sample, inserted, read
from unshot.data.files import Place, Problem
from unshot.data.formats import read_row
from unshot.data.logs import calls_of
from unshot.data.rows import Columns, Example, Fault, Summary, read_examples, scan
from unshot.errors import InputError

PROPERTY = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60
)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def run(*arguments: str | Path) -> Result:
    from unshot.cli import cli

    return CliRunner().invoke(cli, [str(a) for a in arguments])


def problems(path: Path, columns: Columns | None = None) -> list[tuple[int, str]]:
    return [(item.line, item.problem) for item in scan(path, columns) if isinstance(item, Fault)]


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
FAULTY: list[tuple[str, Any, str]] = [
    ("two user turns", {"messages": [USER, USER, ANSWER]}, "both have role 'user'"),
    ("two answers", {"messages": [USER, ANSWER, ANSWER]}, "both have role 'assistant'"),
    ("late system", {"messages": [USER, {"role": "system", "content": "s"}, ANSWER]}, "only the first may"),
    ("answer first", {"messages": [ANSWER, USER, ANSWER]}, "no question"),
    ("no user", {"messages": [{"role": "system", "content": "s"}, ANSWER]}, "no question"),
    ("empty user", {"messages": [{"role": "user", "content": " "}, ANSWER]}, "user message is empty"),
    ("no answer", {"prompt": "a"}, "no answer"),
    ("blank answer", {"prompt": "a", "completion": "  "}, "no answer"),
    ("null answer", {"prompt": "a", "completion": None}, "missing value"),
    ("NaN answer", {"text": "a", "label": math.nan}, "NaN, a missing value"),
    ("pandas' NaN", {"text": "a", "label": "nan"}, "NaN, a missing value"),
    ("NaN input", {"text": math.nan, "label": "b"}, "`text` is empty or not text"),
    ("cut JSON", {"prompt": "a", "completion": '{"risk": "hi'}, "breaks off"),
    ("lone surrogate", {"prompt": "a \ud800", "completion": "b"}, "lone surrogate"),
    ("lost character", {"prompt": "a \ufffd", "completion": "b"}, "U+FFFD"),
    ("not an object", [1], "expected an object"),
    ("weight 0", {"messages": [USER, {**ANSWER, "weight": 0}]}, "weight 0"),
    ("row weight 0", {"prompt": "a", "completion": "b", "weight": 0}, "weight 0"),
    ("image part", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
                                 ANSWER]}, "image (`image_url`)"),
    ("audio part", {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
                                 ANSWER]}, "audio (`input_audio`)"),
    ("images beside", {"prompt": "a", "completion": "b", "images": ["x.png"]}, "an image (`images`)"),
    ("OpenAI preference", {"input": {"messages": [USER]}, "preferred_output": [ANSWER],
                           "non_preferred_output": [ANSWER]}, "`preferred_output`, `non_preferred_output`"),
    ("TRL preference", {"prompt": "a", "chosen": "b", "rejected": "c"}, "`chosen`, `rejected`"),
    ("KTO", {"prompt": "a", "completion": "b", "label": True}, "preference row"),
    ("tool call as answer", {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}]}, "tool call (`f`)"),
    ("NaN as the last turn", {"messages": [USER, {**ANSWER, "content": "NaN"}]}, "NaN, a missing value"),
    ("NaN input as text", {"prompt": "nan", "completion": "b"}, "`prompt` is empty or not text"),
    ("weight 0 of a CSV", {"prompt": "a", "completion": "b", "weight": "0"}, "weight 0"),
    ("not to be trained on", {"messages": [USER, {**ANSWER, "train": False}]}, "weight 0"),
    ("KTO conversation", {"messages": [USER, ANSWER], "label": False}, "preference row"),
    ("KTO tag", {"conversations": [{"from": "human", "value": "a"}], "kto_tag": True}, "preference row"),
    ("no known field", {"utterance_x": "a", "completion": "b"}, "--input-column"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "part"), [pytest.param(r, p, id=name) for name, r, p in FAULTY])
def test_what_check_refuses_every_stage_refuses_with_the_same_words(
    tmp_path: Path, row: Any, part: str, tiny_config: Path
) -> None:
    good = [{"prompt": f"question {i}", "completion": "b"} for i in range(12)]
    path = write(tmp_path / "d.jsonl", [*good, row])
    found = problems(path)
    assert len(found) == 1 and found[0][0] == 13 and part in found[0][1], found
    check = run("data", "check", path, "--json")
    assert check.exit_code == 1
    listed = json.loads(check.stdout)["malformed"]
    assert [(m["line"], m["problem"]) for m in listed] == found
    words = f"{path}, line 13: {found[0][1]}"
    for command in (
        ("data", "split", path, "--out", tmp_path / "split"),
        ("tune", path, "--base", tiny_config, "--dry-run"),
    ):
        done = run(*command)
        assert str(done.exception) == words, done.output


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that is asked for only after the rows are read."""
    return tmp_path_factory.mktemp("base")


def test_a_long_csv_field_is_read_by_every_stage(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["prompt", "completion"])
        for i in range(60):
            writer.writerow([f"document {i} " + "x" * (140_000 if i == 7 else 10), f"label{i % 2}"])
    assert len(read_examples(path)[7].text) > 140_000
    assert json.loads(run("data", "check", path, "--json").stdout)["ready"]
    done = run("data", "split", path, "--out", tmp_path / "split")
    assert done.exit_code == 0, done.output


def test_a_quote_that_is_never_closed_swallows_no_rows_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('prompt,completion\none,a\n"two,b\nthree,c\nfour,d\n', encoding="utf-8")
    assert [line for line, _ in problems(path)] == [3]
    path.write_text("prompt,prompt\none,a\n", encoding="utf-8")
    with pytest.raises(InputError, match="several columns are named `prompt`"):
        read_examples(path)
    path.write_text("prompt;completion\none;a\n", encoding="utf-8")
    with pytest.raises(InputError, match="separated by ';'"):
        read_examples(path)


TEXT = st.text(min_size=1).filter(
    lambda t: t.strip() and "\ufffd" not in t and t.strip() not in ("nan", "NaN")
)
PLAIN = TEXT.filter(lambda t: not t.strip().startswith("{") and t.strip() not in ("<NA>", "NaT"))


@PROPERTY
@given(rows=st.lists(st.tuples(TEXT, PLAIN), min_size=1, max_size=6), mark=st.booleans(), end=st.sampled_from(["\n", "\r\n", "\r"]))  # fmt: skip  # noqa: E501
def test_csv_is_what_the_csv_module_reads(
    tmp_path: Path, rows: list[tuple[str, str]], mark: bool, end: str
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(
        text, lineterminator=end, quoting=csv.QUOTE_ALL if end != "\r\n" else csv.QUOTE_MINIMAL
    )
    writer.writerow(["text", "label"])
    writer.writerows(rows)
    path = tmp_path / "d.csv"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.getvalue().encode())
    oracle = list(csv.DictReader(io.StringIO(text.getvalue(), newline="")))
    assert [(e.text, e.answer) for e in read_examples(path)] == [(r["text"], r["label"]) for r in oracle]
    assert [(r["text"], r["label"]) for r in oracle] == rows


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@PROPERTY
@given(values=st.lists(JSON, min_size=1, max_size=5), ascii_only=st.booleans())
def test_every_json_value_is_a_row_or_a_fault_of_its_line(
    tmp_path: Path, values: list[Any], ascii_only: bool
) -> None:
    rows = [
        {"prompt": "a", "completion": v} if isinstance(v, str | int | float | dict | None.__class__) else v
        for v in values
    ]
    path = tmp_path / "d.jsonl"
    lines = [json.dumps(r, ensure_ascii=ascii_only).encode(errors="surrogatepass") for r in rows]
    path.write_bytes(b"\n".join(lines))
    for line, item in enumerate(scan(path), start=1):
        assert item.line == line
        if isinstance(item, Example):
            value = rows[line - 1]["completion"]
            assert item.answer == (value if isinstance(value, str) else item.answer)
            if isinstance(value, dict):
                assert json.loads(item.answer or "") == value
            assert item.answer and item.answer.encode()


@pytest.mark.parametrize(
    ("content", "line", "part"),
    [
        (b'{"prompt": "a", "completion": "b"}\n' + b"[" * 100_000 + b"\n", 2, "not valid JSON"),
        (b'{"prompt": "a", "completion": ' + b'{"a":' * 3000 + b"1" + b"}" * 3001 + b"\n", 1, ""),
        (b'{"prompt": "a\x00", "completion": "b"}\n', 1, "not valid JSON"),
        (b'{"prompt": "caf\xe9", "completion": "b"}\n', 1, "not UTF-8"),
        (b'{"prompt": "a", "completion": Infinity}\n', 1, "not a value"),
        ('{"prompt": "a\u2028b\x0bc", "completion": "b"'.encode() + b"\n", 1, "not valid JSON"),
    ],
)
def test_rare_bytes_cost_their_row_and_not_the_file(
    tmp_path: Path, content: bytes, line: int, part: str
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content + b'{"prompt": "last", "completion": "b"}\n')
    found = list(scan(path))
    faults = [i for i in found if isinstance(i, Fault)]
    assert [f.line for f in faults] == [line] and part in faults[0].problem
    assert isinstance(found[-1], Example) and found[-1].text == "last"


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    text = "a\u2028b\u0085c\x1cd"
    path.write_text(
        json.dumps({"prompt": text, "completion": "b"}, ensure_ascii=False) + "\r\n", encoding="utf-8"
    )
    assert [e.text for e in read_examples(path)] == [text]


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    whole = gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 5000)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="to its end"):
        read_examples(path)


def test_fields_that_nothing_uses_are_named_with_their_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"a {i}", "completion": "b", "id": i, "note": None if i else "x"} for i in range(4)]
    summary = Summary(tmp_path / "d.jsonl")
    list(scan(write(tmp_path / "d.jsonl", rows), summary=summary))
    assert summary.unused_fields() == {"id": 4, "note": 1}
    assert summary.lines({"note"}) == ["not used: `id` (4 rows)"]


@pytest.mark.parametrize("sample", [pytest.param(s, id=s.name) for s in SAMPLES])
def test_a_sample_of_each_form_is_read_as_the_table_says(sample: Sample, tmp_path: Path) -> None:
    found = read(sample, tmp_path)
    assert len(found.rows) == sample.rows and found.example == sample.example
    assert found.summary.format() == sample.form
    assert tuple(found.summary.unused) == sample.named
    assert found.faults.keys() == sample.refused.keys()
    for line, part in sample.refused.items():
        assert part in found.faults[line]


def test_the_docs_hold_the_table_of_samples() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert inserted(page) == page, "run `python -m tests.data_samples docs/data.md`"
    assert len(SAMPLES) >= 25


@pytest.mark.parametrize(
    ("answer", "flags", "part"),
    [
        ("c", ("--labels", "a,b"), "not one of the labels"),
        ("no object", ("--answer-field", "risk"), "not a JSON object with a text `risk`"),
        ("a<|im_end|>", (), "end-of-turn token"),
        ("long " * 300, ("--case", "{case}"), ""),
    ],
)
def test_what_the_case_refuses_check_and_tune_refuse_alike(
    tmp_path: Path, tiny_model: Path, answer: str, flags: tuple[str, ...], part: str
) -> None:
    good = '{"risk": "a"}' if "--answer-field" in flags else "a"
    rows = [{"prompt": f"question {i}", "completion": good} for i in range(60)]
    path = write(tmp_path / "d.jsonl", [*rows, {"prompt": "last", "completion": answer}])
    (tmp_path / "case.toml").write_text("[tune]\nmax_length = 64\n", encoding="utf-8")
    flags = tuple(flag.replace("{case}", str(tmp_path / "case.toml")) for flag in flags)
    check = run("data", "check", path, "--base", tiny_model, "--json", *flags)
    result = json.loads(check.stdout)
    assert check.exit_code == 1 and not result["ready"], result["warnings"]
    done = run("tune", path, "--base", tiny_model, "--dry-run", *flags)
    assert str(done.exception).startswith(f"{path}, line 61: ")
    if part:
        assert [m["line"] for m in result["malformed"]] == [61] and part in result["malformed"][0]["problem"]
        assert str(done.exception) == f"{path}, line 61: {result['malformed'][0]['problem']}"
    else:
        assert [m["line"] for m in result["length"]["too_long"]["listed"]] == [61]


KEYS = st.sampled_from(
    [
        "messages",
        "role",
        "content",
        "prompt",
        "completion",
        "input",
        "output",
        "label",
        "text",
        "question",
        "answers",
        "context",
        "instruction",
        "history",
        "system",
        "conversations",
        "from",
        "value",
        "weight",
        "tools",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "request",
        "response",
        "choices",
        "message",
        "custom_id",
        "body",
        "object",
        "id",
        "traceId",
        "run_type",
        "inputs",
        "outputs",
        "generations",
        "request_body",
        "attributes",
        "events",
        "resourceSpans",
        "scopeSpans",
        "spans",
        "startTime",
        "call_type",
        "arm",
        "assigned",
        "version",
        "parts",
    ]
)
SHAPES = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.sampled_from(["user", "assistant", "llm", "{}", "[", "a", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=10,
)


@settings(deadline=None, max_examples=150)
@given(row=st.dictionaries(KEYS, SHAPES, max_size=5))
def test_a_row_of_any_shape_is_read_or_refused(row: dict[str, Any]) -> None:
    for columns in (Columns(), Columns(input=("text", "prompt")), Columns(template="say {{text}}")):
        for reading in (
            lambda columns=columns: read_row(Place(Path("d"), 1), row, columns),
            lambda columns=columns: calls_of(Place(Path("d"), 1), row, {}, columns),
        ):
            with contextlib.suppress(Problem):
                reading()


def test_a_fault_in_one_of_several_files_names_its_file(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"prompt": f"question {i}", "completion": "b"} for i in range(60)])
    write(tmp_path / "b.jsonl", [{"prompt": "x"}])
    done = run("data", "check", tmp_path / "?.jsonl", "--json")
    (fault,) = json.loads(done.stdout)["malformed"]
    assert fault["where"] == f"{tmp_path / 'b.jsonl'}, line 1"


@pytest.mark.parametrize(
    ("row", "asked", "answer"),
    [
        ({"messages": json.dumps([USER, ANSWER])}, ["a"], "b"),
        ({"conversations": json.dumps([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}])}, ["a"], "b"),
        ({"instruction": "Square.", "input": 5, "output": 25}, ["Square.\n\n5"], "25"),
        ({"instruction": "Say.", "question": "Why?", "answer": "b"}, ["Say.\n\nWhy?"], "b"),
        ({"instruction": "Say.", "text": "a", "label": 1}, ["Say.\n\na"], "1"),
        ({"instruction": "Say.", "text": "rendered", "output": "b"}, ["Say."], "b"),
        ({"system_prompt": "s", "question": "a", "response": "b"}, ["s", "a"], "b"),
        ({"system": [{"type": "text", "text": "s"}], "messages": [USER, ANSWER]}, ["s", "a"], "b"),
        ({"messages": [{"role": "system", "content": ""}, USER, ANSWER]}, ["a"], "b"),
        ({"messages": [USER, ANSWER, USER, {**ANSWER, "train": False}]}, ["a"], "b"),
    ],
)  # fmt: skip
def test_what_a_row_says_reaches_the_model(row: dict[str, Any], asked: list[str], answer: str) -> None:
    found = read_row(Place(Path("d.jsonl"), 1), row, Columns()).example
    assert ([m["content"] for m in found.messages], found.answer) == (asked, answer)


def test_a_key_that_stands_twice_costs_its_row(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "prompt": "b", "completion": "c"}\n', encoding="utf-8")
    assert problems(tmp_path / "d.jsonl") == [(1, "the key `prompt` stands twice; keep one of them")]


def test_a_class_number_that_means_no_label_is_no_class(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet

    table = arrow.table({"text": ["a", "b"], "label": [1, -1]})
    features = {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}
    named = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(named, tmp_path / "d.parquet")
    first, second = scan(tmp_path / "d.parquet")
    assert isinstance(first, Example) and first.answer == "yes"
    assert isinstance(second, Fault) and "missing value" in second.problem
