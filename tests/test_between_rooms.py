"""What one room reads of a user's file, prompt or setting, the next one reads alike: no model is loaded here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from unshot.case_file import load_case
from unshot.data.load import load_inputs
from unshot.data.prompts import load_prompt
from unshot.data.rows import Columns, RowOptions, read_rows
from unshot.errors import InputError

PLAN = (
    "--approximate",
    "--baseline",
    "gpt-5.4",
    "--model",
    "llama-3.1-8b",
    "--gpu",
    "h100-sxm",
    "--rate",
    "5",
)


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def rows(count: int = 60) -> list[dict[str, str]]:
    """Labelled rows that are not like one another."""
    words = [
        "fee",
        "refund",
        "notice",
        "breach",
        "penalty",
        "supplier",
        "liability",
        "term",
        "clause",
        "invoice",
        "late",
        "customer",
    ]
    return [
        {
            "prompt": f"{words[i % 12]} {words[i // 5 % 12]} {i * 7919 % 997} {words[i // 3 % 12]}",
            "completion": c,
        }
        for i in range(count)
        for c in [("low", "high")[i % 2]]
    ]


COLUMNS = Columns(input=("title", "body"), output="topic", system="rules")


def test_rows_that_unshot_wrote_are_read_beside_named_columns_and_that_is_said(tmp_path: Path) -> None:
    own = jsonl(
        tmp_path / "test.jsonl",
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}]}],
    )
    found, summary = read_rows(own, COLUMNS)
    assert (found[0].text, found[0].answer) == ("a", "x")
    assert "columns" in " ".join(summary.lines())
    other = jsonl(tmp_path / "other.jsonl", [{"prompt": "a", "completion": "x"}])
    with pytest.raises(InputError, match="no column `title`"):
        read_rows(other, COLUMNS)


def test_one_case_with_columns_goes_through_split_check_and_tune(tmp_path: Path, unshot: Run) -> None:
    lines = [f"T{i},{r['prompt']},{r['completion']}" for i, r in enumerate(rows())]
    text(tmp_path / "data.csv", "title,body,topic\n" + "\n".join(lines) + "\n")
    case = text(
        tmp_path / "unshot.toml",
        '[rows]\ninput_column = ["title", "body"]\noutput_column = "topic"\n',
    )
    done = unshot("data", "split", "data.csv", "--case", case, "--out", "split", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("train", "test"):
        checked = unshot("data", "check", f"split/{part}.jsonl", "--case", case, "--json", cwd=tmp_path)
        assert json.loads(checked.stdout)["malformed"] == [], checked.stdout


@pytest.mark.parametrize("name", ["few.jsonl", "few.ndjson", "few.jsonl.gz", "few.NDJSON"])
def test_rows_are_examples_whatever_their_file_is_called(name: str, tmp_path: Path) -> None:
    import gzip

    content = "".join(json.dumps(r) + "\n" for r in rows(3)).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    prompt = load_prompt(tmp_path / name)
    assert prompt.template is None
    assert [e.answer for e in prompt.examples] == ["low", "high", "low"]


def test_examples_stand_in_the_prompt_in_the_form_of_the_inputs(tmp_path: Path) -> None:
    text(tmp_path / "data.csv", "title,text,topic,label\nT,body of it,low,9\nU,another body,high,9\n")
    text(tmp_path / "few.csv", "title,text,topic,label\nX,example body,low,9\n")
    text(
        tmp_path / "unshot.toml",
        '[task]\nexamples = "few.csv"\ndata = "data.csv"\n[rows]\n'
        'input_template = "Title: {{title}}\\nText: {{text}}"\noutput_column = "topic"\n',
    )
    case = load_case(tmp_path / "unshot.toml")
    assert case.task.data
    inputs, _ = load_inputs(case.task.data, case.long_prompt(), case.rows_as())
    assert [m["content"] for m in case.long_prompt().request(inputs[0])] == [
        "Title: X\nText: example body",
        "low",
        "Title: T\nText: body of it",
    ]
    jsonl(tmp_path / "few.csv.jsonl", [{"prompt": "shown as it is", "completion": "low"}])
    other = load_prompt(tmp_path / "few.csv.jsonl", columns=case.rows_as().columns)
    assert other.examples[0].text == "shown as it is"


def test_a_slot_is_a_column_of_any_name_in_prompts_as_in_templates(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "data.jsonl", [{"text": "hello", "customer name": "ACME", "label": "low"}])
    prompt = load_prompt(
        text(tmp_path / "long.txt", 'For {{ customer name }}: {{text}} as {{"risk": "low"}}')
    )
    inputs, _ = load_inputs(data, prompt)
    assert prompt.request(inputs[0])[-1]["content"] == 'For ACME: hello as {{"risk": "low"}}'


def test_input_columns_on_the_flag_stand_over_the_template_of_the_case(tmp_path: Path) -> None:
    data = text(tmp_path / "data.csv", "title,body,topic\nT,B,low\n")
    case = load_case(
        text(
            tmp_path / "unshot.toml", '[rows]\ninput_template = "Title: {{title}}"\noutput_column = "topic"\n'
        )
    )
    case.take_rows(RowOptions(Columns(input=("body",))))
    assert read_rows(data, case.rows_as().columns)[0][0].text == "B"
    both = Columns(input=("body",), template="Title: {{title}}", output="topic")
    found, summary = read_rows(data, both)
    assert found[0].text == "Title: T"
    assert summary.unused == {"body": 1}


def test_a_split_directory_is_data_for_every_stage(tmp_path: Path, unshot: Run) -> None:
    jsonl(tmp_path / "data.jsonl", rows())
    jsonl(tmp_path / "few.jsonl", rows(2))
    assert unshot("data", "split", "data.jsonl", "--out", "split", cwd=tmp_path).returncode == 0
    checked = unshot("data", "check", "split", "--json", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout
    assert json.loads(checked.stdout)["rows"] == 60
    text(
        tmp_path / "unshot.toml",
        '[task]\nexamples = "few.jsonl"\ninstruction = "Classify."\ndata = "split"\n',
    )
    planned = unshot("plan", *PLAN, "--json", cwd=tmp_path)
    assert planned.returncode == 0, planned.stdout
    assert "60 rows of split" in planned.stdout


@pytest.mark.parametrize("name", ["data.xlsx", "data.ods", "data.jsonl"])
def test_a_workbook_is_called_one(name: str, tmp_path: Path, unshot: Run) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04\x14\x00\x06\x00\xff\xfe\n\n")
    done = unshot("data", "check", name, cwd=tmp_path)
    assert done.returncode == 2
    assert "CSV" in done.stderr
    assert "not UTF-8" not in done.stderr


def test_an_unfilled_slot_of_the_instruction_is_said_beside_a_long_prompt(
    tmp_path: Path, unshot: Run
) -> None:
    jsonl(tmp_path / "data.jsonl", rows())
    jsonl(tmp_path / "few.jsonl", rows(2))
    text(
        tmp_path / "unshot.toml",
        '[task]\nexamples = "few.jsonl"\ninstruction = "Classify for {{client}}."\ndata = "data.jsonl"\n',
    )
    planned = unshot("plan", *PLAN, "--json", cwd=tmp_path)
    assert "{{client}}` is sent as it stands" in planned.stdout
    filled = jsonl(tmp_path / "data.jsonl", [{**row, "client": "ACME"} for row in rows()])
    planned = unshot("plan", *PLAN, "--inputs", filled, "--json", cwd=tmp_path)
    assert "as it stands" not in planned.stdout
    assert "not used" not in planned.stdout


def schema_case(folder: Path, schema: dict[str, Any], answer: str) -> Path:
    jsonl(folder / "data.jsonl", [{**row, "completion": answer} for row in rows()])
    text(folder / "answer.schema.json", json.dumps(schema))
    return text(folder / "unshot.toml", '[task]\ndata = "data.jsonl"\nanswer_schema = "answer.schema.json"\n')


@pytest.mark.parametrize("answer", ['["low"]', '"low"', "7", '```json\n["low"]\n```'])
def test_an_answer_fits_a_schema_of_any_type_in_every_room(answer: str, tmp_path: Path, unshot: Run) -> None:
    from deploy.serve.check import Checker
    from tune.data.label import LabelSettings

    schema: dict[str, Any] = {"anyOf": [{"type": "array", "maxItems": 1}, {"type": ["string", "number"]}]}
    schema_case(tmp_path, schema, answer)
    checked = unshot("data", "check", "data.jsonl", "--json", cwd=tmp_path)
    assert json.loads(checked.stdout)["malformed"] == []
    assert Checker(None, schema).check(answer) == (True, None)
    assert LabelSettings(schema=schema).fault(answer) is None
    schema_case(tmp_path, schema, '["low", "high"]')
    checked = unshot("data", "check", "data.jsonl", "--json", cwd=tmp_path)
    assert "does not fit" in json.loads(checked.stdout)["malformed"][0]["problem"]
    assert Checker(None, schema).check('["low", "high"]') == (False, None)
    assert LabelSettings(schema=schema).fault('["low", "high"]') is not None


@pytest.mark.parametrize("target", ["#/$defs/nope", "http://127.0.0.1:9/answer.json", "other.schema.json"])
def test_a_schema_that_refers_to_nothing_is_refused_by_every_stage(
    target: str, tmp_path: Path, unshot: Run
) -> None:
    schema_case(tmp_path, {"type": "object", "properties": {"a": {"$ref": target}}}, '{"a": "x"}')
    checked = unshot("data", "check", "data.jsonl", cwd=tmp_path)
    assert checked.returncode == 1
    served = unshot("deploy", "serve", "--baseline", "http://127.0.0.1:9/v1", "--port", "1", cwd=tmp_path)
    assert served.returncode == 2
    for said in (checked.stdout, served.stderr):
        assert "answer.schema.json" in said
        assert target in said


def test_a_version_is_held_to_the_schema_that_it_was_tuned_by() -> None:
    from deploy.serve.check import Checker
    from unshot.contracts.task import Task

    task = Task(answer_schema={"type": "object", "required": ["risk"]})
    assert Checker(task).active
    assert Checker(task).check('{"risk": 1}') == (True, None)
    assert Checker(task).check("{}") == (False, None)
    assert Checker(task).with_schema({"type": "object", "required": ["why"]}).check('{"risk": 1}') == (
        False,
        None,
    )


SPLITS: dict[str, tuple[str, Any, str]] = {
    "labels in two spellings": (
        'labels = ["low", "high"]',
        lambda i, c: c.upper() if i % 3 else c,
        "",
    ),
    "one JSON field": ("", lambda i, c: json.dumps({"risk": c}), ""),
    "a named JSON field": ('answer_field = "risk"', lambda i, c: json.dumps({"risk": c, "why": f"{i}"}), ""),
    "JSON of several fields": ("", lambda i, c: json.dumps({"risk": c, "why": f"{i}"}), ""),
    "free text": ("", lambda i, c: f"{c} because of {i}", ""),
    "a seed": ("", lambda i, c: c, "[tune]\nseed = 7\n"),
    "a test file": ("", lambda i, c: c, '[split]\ntest = "test.jsonl"\n'),
    "by group": ("", lambda i, c: c, '[split]\ngroup_by = "who"\nshares = "60/20/20"\n'),
}


@pytest.mark.parametrize("name", SPLITS)
def test_the_parts_of_data_split_are_those_of_tune(name: str, tmp_path: Path, unshot: Run) -> None:
    from tune.data.split import NAMES, Splitting, load_parts
    from tune.run import separate_split
    from unshot.console import Output
    from unshot.contracts.task import derive_task
    from unshot.data.load import load_rows

    keys, answer, more = SPLITS[name]
    old = {"role": "system", "content": "The old prompt."}
    written = [
        {
            "messages": [
                old,
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": answer(i, row["completion"])},
            ],
            "who": f"c{i % 9}",
        }
        for i, row in enumerate(rows(100))
    ]
    jsonl(tmp_path / "data.jsonl", written[:80])
    jsonl(tmp_path / "test.jsonl", written[80:])
    path = text(tmp_path / "unshot.toml", f'[task]\ninstruction = "Classify."\n{keys}\n{more}')
    done = unshot("data", "split", "data.jsonl", "--out", "split", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    case, quiet = load_case(path), Output(verbosity=-1)

    def read(file: Path) -> list[Any]:
        return load_rows(file, case.rows_as(), None, instruction=case.task.instruction)

    loaded = load_parts(tmp_path / "data.jsonl", Splitting.of(case.split), read)
    cleaned = separate_split(loaded, derive_task(case.task, loaded.all), case.tune, quiet)
    for part in NAMES:
        there = [row.text for row in read_rows(tmp_path / "split" / f"{part}.jsonl")[0]]
        assert there == [row.text for row in getattr(cleaned.parts, part)], part
    # The same case goes on with the directory, whose parts are made.
    again = load_parts(tmp_path / "split", Splitting.of(case.split), read)
    assert len(again.rows) == len(cleaned.parts.train)


def test_data_check_counts_the_classes_that_tune_tells_apart(tmp_path: Path, unshot: Run) -> None:
    labels = ["caf\u00e9", "cafe\u0301", "LOW", "low"]
    jsonl(tmp_path / "data.jsonl", [{**row, "completion": labels[i % 4]} for i, row in enumerate(rows())])
    text(tmp_path / "unshot.toml", '[task]\nlabels = ["low", "caf\u00e9"]\n')
    checked = unshot("data", "check", "data.jsonl", "--json", cwd=tmp_path)
    assert json.loads(checked.stdout)["labels"]["counts"] == {"caf\u00e9": 30, "low": 30}


def test_a_pipeline_goes_on_only_while_every_file_of_its_case_is_the_same(tmp_path: Path) -> None:
    from unshot.pipeline import Pipeline

    jsonl(tmp_path / "data-1.jsonl", rows())
    jsonl(tmp_path / "test.jsonl", rows(5))
    jsonl(tmp_path / "general.jsonl", rows(5))
    text(tmp_path / "own.jinja", "{{ messages }}")
    path = text(
        tmp_path / "unshot.toml",
        '[task]\ndata = "data-*.jsonl"\n[split]\ntest = "test.jsonl"\n[tune]\ngeneral = "general.jsonl"\n'
        'chat_template = "./own.jinja"\n',
    )

    def digest() -> str:
        return Pipeline(path, load_case(path), tmp_path / "out").digest()

    for name in ("data-1.jsonl", "test.jsonl", "general.jsonl", "own.jinja"):
        before = digest()
        assert digest() == before
        text(tmp_path / name, (tmp_path / name).read_text() + "\n")
        assert digest() != before, name


def test_the_price_of_another_model_is_nobody_s(tmp_path: Path, unshot: Run) -> None:
    from unshot.prices import parse_prices

    given = parse_prices("gpt-5:input=2,output=8")
    assert given.of(None).output == given.of("gpt-5").output == 8
    with pytest.raises(InputError, match="no price of gpt-4o; it has gpt-5"):
        given.of("gpt-4o")


def test_every_path_of_a_case_is_relative_to_the_case(tmp_path: Path) -> None:
    path = text(
        tmp_path / "deep" / "unshot.toml",
        '[task]\njudge = "gguf:models/judge.gguf"\n[baseline]\nmodel = "./base"\n[candidate]\nmodel = "./base"\n',
    )
    case = load_case(path)
    assert case.task.judge == f"gguf:{tmp_path}/deep/models/judge.gguf"
    assert case.baseline.model == case.candidate.model == f"{tmp_path}/deep/base"
    text(path, '[task]\njudge = "http://localhost:8000/v1"\n[baseline]\nmodel = "llama-3.1-8b"\n')
    assert load_case(path).task.judge == "http://localhost:8000/v1"
    assert load_case(path).baseline.model == "llama-3.1-8b"
