"""The long prompt inside rows from logs is found and taken out; what is a row's own stays."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from unshot.data.example import Example, Message
from unshot.data.old_prompt import take_out_prompt
from unshot.data.prompts import Prompt
from unshot.data.rows import read_examples
from unshot.errors import InputError

SYSTEM = "You classify customer messages. " + "Follow every rule of the handbook closely. " * 30
SHOTS = [(f"example question number {i}", f"class{i % 3}") for i in range(6)]
INSTRUCTION = "Classify the message."


def turns(*pairs: tuple[str, str]) -> list[Message]:
    return [
        m for q, a in pairs for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})
    ]  # type: ignore[misc]


def shot(question: str, answer: str) -> Example:
    return Example(({"role": "user", "content": question},), answer, 1)


PROMPT = Prompt(SYSTEM, tuple(shot(*pair) for pair in SHOTS))


def row(number: int, before: list[Message]) -> Example:
    return Example((*before, {"role": "user", "content": f"input {number} of its own"}), "class1", number)


def logged(number: int) -> Example:
    return row(number, [{"role": "system", "content": SYSTEM}, *turns(*SHOTS)])


def test_the_case_s_prompt_is_taken_out_in_any_of_its_forms() -> None:
    spaced = [{"role": "system", "content": f"{SYSTEM}\n"}, *turns(*SHOTS[::-1][:2])]
    rows = [logged(1), row(2, spaced), row(3, turns(*SHOTS)), row(4, [])]  # type: ignore[arg-type]
    found, report = take_out_prompt(rows, PROMPT)
    assert [r.messages for r in found] == [(r.messages[-1],) for r in rows]
    assert (report.changed, report.shared, report.systems) == (3, False, {})
    words = len(SYSTEM.split()) * 2 + sum(
        len((q + " " + a).split()) for q, a in [*SHOTS, *SHOTS, *SHOTS[-2:]]
    )
    assert (
        f"in 3 of 4 rows is replaced by the instruction: {words:,} words less"
        in report.lines(instruction="x")[0]
    )
    kept, unchanged = take_out_prompt(rows, PROMPT, keep=True)
    assert kept == rows and not unchanged.changed and unchanged.systems.total() == 2


def test_a_text_with_slots_is_recognised_by_what_stands_round_them() -> None:
    template = "Rules:\n1. Be short.\n\nTitle: {{title}}\nText: {{text}}\n\nAnswer with a class."
    prompt = Prompt(template=template)
    text = prompt.messages("", {"title": "A (b)", "text": "two\nlines"})[-1]["content"]
    rows = [Example(({"role": "user", "content": text},), "x", 1), shot("quite another text", "y")]
    found, report = take_out_prompt(rows, prompt)
    assert found[0].text == "A (b)\n\ntwo\nlines" and found[1] == rows[1] and report.changed == 1
    assert prompt.request(found[0])[-1]["content"] == text
    plain = Prompt(template="Say what this is about.")
    rows = [Example(({"role": "user", "content": "Say what this  is about.\n\nthe text"},), "x", 1)]
    assert take_out_prompt(rows, plain)[0][0].text == "the text"


def test_what_stood_in_the_slots_of_a_system_prompt_stays_with_the_row() -> None:
    """A passage that was looked up for the request is no part of the prompt that moves."""
    prompt = Prompt("Answer from the passages.\n\n{{passages}}\n\nToday is {{day}}.")
    values = {"passages": "One passage.\nAnother one.", "day": "Monday"}
    user: Message = {"role": "user", "content": "Which one?"}
    asked = prompt.request(Example((user,), None, 1, values))
    rows = [Example(tuple(asked), "the first", n) for n in range(3)]
    found, report = take_out_prompt(rows, prompt)
    assert found[0].messages == (user,) and found[0].extra == values
    assert prompt.request(found[0]) == asked
    assert Prompt("{{passages}}").request(found[0])[0]["content"] == values["passages"]
    (taken,) = report.removed
    assert "passage." not in taken and taken.split() == [
        "Answer",
        "from",
        "the",
        "passages.",
        "Today",
        "is",
        ".",
    ]


def test_a_slot_without_a_column_is_said_or_refused(tmp_path: Path) -> None:
    """It was filled with the whole text, or sent as it stands, without a word."""
    title = Prompt(template="Title: {{title}}\nStars: {{stars}}\nText: {{text}}")
    user: Message = {"role": "user", "content": "slow"}
    asked = title.request(Example((user,), None, 1, {"title": "Kettle", "stars": 2}))
    assert asked[-1]["content"] == "Title: Kettle\nStars: 2\nText: slow"
    with pytest.raises(
        InputError, match=r"rows\.jsonl, line 3: no column for the prompt's slots title, stars, text"
    ):
        title.request(Example((user,), None, 3, where="rows.jsonl, line 3"))
    dated = Prompt("Today is {{day}}. Write {{name}} for the name.")
    rows = [Example((user,), "x", n, {"day": "Monday"} if n else {}) for n in range(3)]
    assert dated.unfilled(rows) == [
        "`{{day}}` is sent as it stands: no column `day` (1 rows)",
        "`{{name}}` is sent as it stands: no column `name` (3 rows)",
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    done = run(
        "tune", data, "--base", "smollm2-135m", "--instruction", "Today is {{day}}.", "--dry-run", "--json"
    )
    assert "`{{day}}` is sent as it stands: no column `day` (1 rows)" in " ".join(done.stderr.split())


def test_what_all_rows_begin_with_is_the_prompt_without_a_case() -> None:
    rows = [logged(i) for i in range(5)]
    found, report = take_out_prompt(rows, None)
    assert report.shared and report.changed == 5 and all(len(r.messages) == 1 for r in found)
    # A document in the system turn is an input, not a prompt.
    documents = [row(i, [{"role": "system", "content": f"Document {i}"}]) for i in range(5)]
    found, report = take_out_prompt(documents, None)
    assert found == documents and "a mixture of system prompts: 5 different" in report.lines()[0]
    assert Prompt(INSTRUCTION).request(documents[0]) == list(documents[0].messages)


def run(*arguments: str | Path) -> Result:
    from unshot.cli import cli

    return CliRunner().invoke(cli, [str(a) for a in arguments])


def write(path: Path, rows: list[Example]) -> Path:
    path.write_text("".join(json.dumps(r.row()) + "\n" for r in rows), encoding="utf-8")
    return path


def tokens(*arguments: str | Path) -> tuple[int, str]:
    done = run("tune", *arguments, "--dry-run", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)["train_tokens"], done.stderr


def test_tune_trains_on_the_instruction_and_not_on_the_old_prompt(tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--base", tiny_model, "--instruction", INSTRUCTION)
    bare = [row(i, []) for i in range(60)]
    wanted, _ = tokens(write(tmp_path / "bare.jsonl", bare), *flags)
    logs = write(tmp_path / "logs.jsonl", [logged(i) for i in range(60)])
    found, said = tokens(logs, *flags)
    assert found == wanted and "in 60 of 60 rows is replaced by the instruction" in said
    assert re.search(r"instruction: [\d,]+ tokens less", said)
    kept, said = tokens(logs, *flags, "--keep-system")
    assert kept > 10 * wanted and "60 of 60 rows have the same system prompt" in said
    # With the prompt in the case, rows of which only some carry it.
    few = tmp_path / "few.jsonl"
    write(few, [shot(*pair) for pair in SHOTS])
    case = tmp_path / "case.toml"
    case.write_text(f'[task]\nsystem = """{SYSTEM}"""\nexamples = "few.jsonl"\n', encoding="utf-8")
    half = write(tmp_path / "half.jsonl", [logged(i) if i % 2 else bare[i] for i in range(60)])
    found, said = tokens(half, *flags, "--case", case)
    assert found == wanted and "in 30 of 60 rows" in said


def test_check_says_what_tune_will_take_out_and_shows_a_row(tiny_model: Path, tmp_path: Path) -> None:
    logs = write(tmp_path / "logs.jsonl", [logged(i) for i in range(60)])
    result = json.loads(
        run("data", "check", logs, "--instruction", INSTRUCTION, "--base", tiny_model, "--json").stdout
    )
    assert result["prompts"]["changed"] == 60 and result["reading"]["format"] == "JSONL, messages"
    example = result["reading"]["example"]
    assert INSTRUCTION in example and "input 0 of its own" in example and "<|im_start|>" in example
    assert "handbook" not in example and result["length"]["prompt"]["max"] < 60
    plain = json.loads(run("data", "check", logs, "--json").stdout)
    assert "60 of 60 rows have the same system prompt" in " ".join(plain["warnings"])


def inputs(pairs: list[tuple[list[dict[str, Any]], str]], path: Path) -> Path:
    rows = [{"messages": [*messages, {"role": "assistant", "content": answer}]} for messages, answer in pairs]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("place", ["system", "turn", "column"])
def test_one_question_about_sixty_documents_is_sixty_inputs(tmp_path: Path, place: str) -> None:
    import random

    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnop", k=7)) for _ in range(900)]
    documents = [" ".join(chance.sample(words, 30)) for _ in range(60)]
    question = "What does the document say about the term of the contract?"
    path = tmp_path / "d.jsonl"
    if place == "column":
        rows = [
            {"context": d, "question": question, "answer": f"answer {i}"} for i, d in enumerate(documents)
        ]
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    else:
        before = {
            "system": lambda d: [{"role": "system", "content": d}],
            "turn": lambda d: [{"role": "user", "content": d}, {"role": "assistant", "content": "Go on."}],
        }[place]
        asked = {"role": "user", "content": question}
        inputs([([*before(d), asked], f"answer {i}") for i, d in enumerate(documents)], path)
    result = json.loads(run("data", "check", path, "--json").stdout)
    assert result["duplicates"]["exact_rows"] == result["duplicates"]["near_rows"] == 0
    assert result["contradictions"]["total"] == 0
    assert len({e.identity for e in read_examples(path)}) == 60
    done = run("data", "split", path, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["rows"]["test"] == 6, done.output


def test_few_shot_turns_without_a_system_prompt_are_taken_out() -> None:
    found, report = take_out_prompt([row(i, turns(*SHOTS)) for i in range(5)], None)
    assert report.shared and all(len(r.messages) == 1 for r in found)


def test_a_long_prompt_that_cannot_be_taken_out_is_said() -> None:
    long = " ".join(f"word{i}" for i in range(40))
    texts = [Example(({"role": "user", "content": f"{long} {i}"},), "yes", i) for i in range(12)]
    assert "all 12 inputs begin with the same 40 words" in take_out_prompt(texts, None)[1].lines()[0]
    mixed = [row(i, turns(*(SHOTS if i % 2 else SHOTS[::-1]))) for i in range(24)]
    assert "recur in up to 24 of 24 rows" in take_out_prompt(mixed, None)[1].lines()[0]
    # A conversation's own turns are none.
    own = [row(i, turns((f"question {i}", "yes"))) for i in range(24)]
    assert not take_out_prompt(own, None)[1].lines()
