"""`unshot data import`: every log form gives the same prompt, inputs and case, and plans without an edit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tune.data.collect import Traffic, import_logs
from unshot.case_file import load_case
from unshot.console import Output
from unshot.data.files import Problem
from unshot.data.log_formats import LOG_FORMATS
from unshot.data.logs import parse_mapping
from unshot.data.rows import read_examples
from unshot.data.static_part import draw_template
from unshot.errors import InputError

SYSTEM = "You sort messages of a bank's customers.\n" + "\n".join(
    f"{i}. Rule number {i}: answer with the class alone, never with a sentence." for i in range(12)
)
SHOTS = [("Where is my card?", "card"), ("My transfer failed.", "transfer"), ("Close my account!", "account")]
WORDS = ["".join(random.Random(7 + i).choices("abcdefghijklmnop", k=6)) for i in range(500)]
START = 1_767_225_600  # 2026-01-01


def asked(number: int) -> str:
    return f"{' '.join(random.Random(number).sample(WORDS, 5)).capitalize()}{'?.!'[number % 3]}"


def talk(number: int, system: str = SYSTEM) -> list[dict[str, Any]]:
    shots = [m for q, a in SHOTS for m in (turn("user", q), turn("assistant", a))]
    return [turn("system", system), *shots, turn("user", asked(number))]


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def label(number: int) -> str:
    return ("card", "transfer", "account")[number % 3]


def completion(number: int) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{number}", "object": "chat.completion", "created": START + number * 60,
        "model": "gpt-4o-2024-08-06",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": label(number), "refusal": None},
                     "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 300, "completion_tokens": 2, "total_tokens": 302},
    }  # fmt: skip


def body(number: int) -> dict[str, Any]:
    return {"model": "gpt-4o", "messages": talk(number), "temperature": 0}


def iso(number: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(START + number * 60, UTC).isoformat().replace("+00:00", "Z")


def attribute(key: str, value: Any) -> dict[str, Any]:
    kind = {"str": "stringValue", "int": "intValue"}[type(value).__name__]
    return {"key": key, "value": {kind: str(value) if kind == "intValue" else value}}


def parts(message: dict[str, Any]) -> dict[str, Any]:
    return {"role": message["role"], "parts": [{"type": "text", "content": message["content"]}]}


def otel(number: int) -> dict[str, Any]:
    system, *rest = talk(number)
    span = {
        "name": "chat gpt-4o", "startTimeUnixNano": str((START + number * 60) * 10**9), "attributes": [
            attribute("gen_ai.operation.name", "chat"), attribute("gen_ai.request.model", "gpt-4o"),
            attribute("gen_ai.system_instructions", json.dumps([{"type": "text", "content": system["content"]}])),
            attribute("gen_ai.input.messages", json.dumps([parts(m) for m in rest])),
            attribute("gen_ai.output.messages", json.dumps([parts(turn("assistant", label(number)))])),
            attribute("gen_ai.usage.output_tokens", 2)],
    }  # fmt: skip
    other = {"name": "GET /", "startTimeUnixNano": "1", "attributes": [attribute("http.method", "GET")]}
    return {"resourceSpans": [{"scopeSpans": [{"spans": [other, span]}]}]}


def llmetry(number: int) -> dict[str, Any]:
    facts: dict[str, Any] = {"gen_ai.request.model": "gpt-4o", "gen_ai.completion.0.content": label(number)}
    for i, message in enumerate(talk(number)):
        facts |= {
            f"gen_ai.prompt.{i}.role": message["role"],
            f"gen_ai.prompt.{i}.content": message["content"],
        }
    return {"name": "openai.chat", "start_time": iso(number), "attributes": facts}


def langchain(message: dict[str, Any]) -> dict[str, Any]:
    kind = {"system": "SystemMessage", "user": "HumanMessage", "assistant": "AIMessage"}[message["role"]]
    return {"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", kind],
            "kwargs": {"content": message["content"]}}  # fmt: skip


Log = Callable[[int], Any]
LOGS: dict[str, tuple[str, Log]] = {
    "pairs": ("requests and responses", lambda n: {"request": body(n), "response": completion(n)}),
    "flat pairs": ("requests and responses", lambda n: {**body(n), "response": label(n), "timestamp": iso(n)}),
    "stored": ("OpenAI stored completions", lambda n: {**completion(n), "messages": talk(n)}),
    "litellm": ("LiteLLM log", lambda n: {
        "id": f"r{n}", "call_type": "acompletion", "status": "success", "startTime": START + n * 60 + 0.25,
        "endTime": START + n * 60 + 1.0, "model": "openai/gpt-4o", "completion_tokens": 2, "messages": talk(n),
        "response": completion(n)}),
    "langfuse": ("Langfuse observations", lambda n: {
        "id": f"o{n}", "traceId": f"t{n}", "type": "GENERATION", "name": "sort", "startTime": iso(n), "model": "gpt-4o",
        "input": {"messages": talk(n)}, "output": {"role": "assistant", "content": label(n)},
        "usageDetails": {"input": 300, "output": 2}}),
    "langsmith": ("LangSmith runs", lambda n: {
        "id": f"u{n}", "run_type": "llm", "name": "ChatOpenAI", "start_time": iso(n), "error": None,
        "inputs": {"messages": [[langchain(m) for m in talk(n)]]}, "completion_tokens": 2,
        "outputs": {"generations": [[{"text": label(n), "message": langchain(turn("assistant", label(n)))}]]},
        "extra": {"invocation_params": {"model": "gpt-4o"}}}),
    "helicone": ("Helicone export", lambda n: {
        "request_id": f"h{n}", "request_created_at": iso(n), "request_body": body(n), "response_status": 200,
        "response_body": completion(n), "completion_tokens": 2}),
    "otel": ("OpenTelemetry GenAI spans", otel),
    "openllmetry": ("OpenTelemetry GenAI spans", llmetry),
    "gateway": ("the gateway's log", lambda n: {
        "id": f"g{n}", "time": START + n * 60, "arm": "baseline", "version": "api", "unit": "x", "assigned": "baseline",
        "messages": talk(n), "answer": label(n), "completion_tokens": 2, "format": 2}),
}  # fmt: skip


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def run(*arguments: str | Path) -> Result:
    from unshot.cli import cli

    return CliRunner().invoke(cli, [str(a) for a in arguments])


def the_prompt_is_found(folder: Path, count: int, *, model: bool = True) -> None:
    import tomllib

    case = tomllib.loads((folder / "unshot.toml").read_text(encoding="utf-8"))
    assert case["task"]["system"] == SYSTEM
    shots = read_examples(folder / "prompt.jsonl")
    assert [(e.text, e.answer) for e in shots] == SHOTS
    rows = read_examples(folder / "inputs.jsonl")
    assert sorted(e.identity for e in rows) == sorted(asked(n) for n in range(count))
    assert {e.identity: e.answer for e in rows} == {asked(n): label(n) for n in range(count)}
    assert case["baseline"]["api"].startswith("gpt-4o") if model else "baseline" in case


@pytest.mark.parametrize("name", LOGS)
def test_each_form_gives_the_same_prompt_and_plans_without_an_edit(name: str, tmp_path: Path) -> None:
    form, make = LOGS[name]
    log = write(tmp_path / "log.jsonl", [*(make(n) for n in range(40)), {"something": "else"}])
    done = run("data", "import", log, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads(done.stdout)
    assert result["formats"] == {form: 40} and result["requests"] == 40
    assert sum(result["unknown"].values()) == 1 and "line 41" in result["first_unknown"]
    (version,) = result["versions"]
    assert version["messages"] == 7 and version["template"] is None
    the_prompt_is_found(tmp_path / "out", 40, model=name != "gateway")
    assert version["traffic"]["rate"] == pytest.approx(1 / 60, rel=1e-3)
    if name in ("pairs", "otel"):
        plan = run("plan", "--case", tmp_path / "out" / "unshot.toml", "--approximate", "--json")
        assert plan.exit_code == 0, (plan.output, plan.exception)


def test_batch_files_and_stored_messages_are_joined(tmp_path: Path) -> None:
    requests = write(tmp_path / "in.jsonl", [
        {"custom_id": f"c{n}", "method": "POST", "url": "/v1/chat/completions", "body": body(n)} for n in range(30)
    ])  # fmt: skip
    answers = [
        {"id": f"b{n}", "custom_id": f"c{n}", "error": None,
         "response": {"status_code": 200, "request_id": "r", "body": completion(n)}} for n in range(30)
    ]  # fmt: skip
    answers[3]["response"] = {"status_code": 500, "body": {"error": {"message": "overloaded"}}}
    result = import_logs(
        [requests, write(tmp_path / "o.jsonl", answers[::-1])],
        tmp_path / "out",
        Output(verbosity=-1),
        mapping={},
    )
    assert (result["requests"], result["failed"], result["unknown"]) == (29, 1, {})
    assert result["formats"] == {"OpenAI batch, requests": 30, "OpenAI batch, answers": 30}
    messages = [
        {"id": f"chatcmpl-{n}-{i}", **m, "name": None, "content_parts": None}
        for n in range(30) for i, m in enumerate(talk(n))
    ]  # fmt: skip
    files = [
        write(tmp_path / "m.jsonl", messages),
        write(tmp_path / "s.jsonl", [completion(n) for n in range(30)]),
    ]
    result = import_logs(files, tmp_path / "stored", Output(verbosity=-1), mapping={})
    assert result["requests"] == 30 and not result["unknown"]
    the_prompt_is_found(tmp_path / "stored", 30)


def test_versions_of_a_prompt_are_kept_apart(tmp_path: Path) -> None:
    """A rule added to the system prompt, and to a text with a slot, is another version; a rare one too."""
    newer = SYSTEM + "\n13. A rule that was added later."
    rows = [{"request": {**body(n), "messages": talk(n, SYSTEM if n < 60 else newer)}, "response": completion(n)} for n in range(100)]  # fmt: skip  # noqa: E501
    result = import_logs(
        [write(tmp_path / "a.jsonl", rows)], tmp_path / "a", Output(verbosity=-1), mapping={}
    )
    assert [v["requests"] for v in result["versions"]] == [60, 40]
    assert (tmp_path / "a" / "version-2" / "unshot.toml").is_file()

    old = "Sort the message of a bank's customer into one class.\n\nBe brief and careful.\n\n"
    old += "Message: {}\n\nAnswer with the class alone."
    new = old.replace("\n\nMessage", "\n\nNever explain what you choose.\n\nMessage")
    texts = [(old if n < 60 else new).format(asked(n)) for n in range(100)]
    rows = [
        {"messages": [turn("user", t)], "response": label(n), "model": "gpt-4o"} for n, t in enumerate(texts)
    ]
    result = import_logs(
        [write(tmp_path / "b.jsonl", rows)], tmp_path / "b", Output(verbosity=-1), mapping={}
    )
    assert [(v["requests"], v["template"]) for v in result["versions"]] == [
        (60, old.format("{{text}}")), (40, new.format("{{text}}"))
    ]  # fmt: skip
    assert (tmp_path / "b" / "prompt.txt").read_text(encoding="utf-8") == old.format("{{text}}")
    assert {e.text for e in read_examples(tmp_path / "b" / "inputs.jsonl")} == {asked(n) for n in range(60)}


def test_a_template_with_several_slots_is_found_token_by_token() -> None:
    template = "You are given a review.\nTitle: {}\nStars: {} of 5\n\nReview:\n{}\n\nIs it positive? Answer yes or no."
    texts = [template.format(asked(n), n % 5 + 1, f"{asked(n + 1000)} {asked(n + 2000)}") for n in range(50)]
    found = draw_template(texts)
    assert found and found.text() == template.format("{{slot_1}}", "{{slot_2}}", "{{slot_3}}")
    assert found.values(texts[4]) == [asked(4), "5", f"{asked(1004)} {asked(2004)}"]
    assert draw_template([asked(n) for n in range(50)]) is None


def test_other_forms_are_mapped_and_plain_rows_are_inputs(tmp_path: Path) -> None:
    rows = [{"payload": {"chat": talk(n)}, "result": [{"out": label(n)}], "at": iso(n)} for n in range(30)]
    log = write(tmp_path / "l.jsonl", rows)
    none = run("data", "import", log, "--out", tmp_path / "x")
    assert isinstance(none.exception, InputError) and "no request that can be read" in str(none.exception)
    flags = [f"--map={pair}" for pair in ("messages=payload.chat", "answer=result.0.out", "time=at")]
    done = run("data", "import", log, "--out", tmp_path / "out", *flags, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    the_prompt_is_found(tmp_path / "out", 30, model=False)
    with pytest.raises(InputError, match="NAME=FIELD"):
        parse_mapping(["role=x"])
    csv = tmp_path / "in.csv"
    csv.write_text("question,day\n" + "".join(f'"{asked(n)}",1\n' for n in range(20)), encoding="utf-8")
    result = import_logs([csv], tmp_path / "plain", Output(verbosity=-1), mapping={})
    assert result["formats"] == {"rows of inputs": 20} and result["versions"][0]["static_tokens"] == 0
    assert len(read_examples(tmp_path / "plain" / "inputs.jsonl", answers=False)) == 20


def test_traffic_says_only_what_the_times_tell() -> None:
    chance = random.Random(0)
    times, now = [], float(START)
    while now < START + 3 * 86400:
        busy = 3.0 if 9 <= (now % 86400) // 3600 < 17 else 0.5
        now += chance.expovariate(busy / 30)
        times.append(now)
    found = Traffic.of(times)
    assert found.rate == pytest.approx(len(times) / (3 * 86400), rel=0.01)
    assert found.arrival_cv == pytest.approx(1.0, abs=0.08)
    mean = (8 * 3.0 + 16 * 0.5) / 24
    assert found.peak_factor == pytest.approx(3.0 / mean, rel=0.15)
    assert Traffic.of([]) == Traffic() and Traffic.of([5.0]) == Traffic()
    short = Traffic.of(times[:200])
    assert short.peak_factor is None
    assert Traffic.of([float(int(t) // 2) for t in range(2000)]).arrival_cv is None


def test_every_form_of_a_log_has_a_sample() -> None:
    named = {form for form, _ in LOGS.values()}
    joined = {"OpenAI batch, requests", "OpenAI batch, answers", "OpenAI stored completions, messages"}
    assert named | joined == {form.name for form in LOG_FORMATS}


def imported(folder: Path, rows: list[Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The versions found in rows, and the first version's inputs."""
    log = write(folder / "log.jsonl", [{"response": label(n), **row} for n, row in enumerate(rows)])
    result = import_logs([log], folder / "out", Output(verbosity=-1), mapping={}, overwrite=True)
    lines = (folder / "out" / "inputs.jsonl").read_text(encoding="utf-8").splitlines()
    return result["versions"], [json.loads(line) for line in lines]


def test_a_date_in_the_system_prompt_is_a_slot_and_no_version(tmp_path: Path) -> None:
    dated = "Today is 2026-01-{:02d}.\n" + SYSTEM
    rows = [{"messages": [turn("system", dated.format(n % 28 + 1)), *talk(n)[1:]]} for n in range(80)]
    (version,), inputs = imported(tmp_path, rows)
    assert version["messages"] == 7 and inputs[4]["system_1"] == "05"
    import tomllib

    case = load_case(tmp_path / "out" / "unshot.toml")
    text = tomllib.loads((tmp_path / "out" / "unshot.toml").read_text(encoding="utf-8"))["task"]["system"]
    assert text == "Today is 2026-01-{{system_1}}.\n" + SYSTEM
    assert case.task.instruction == "Today is 2026-01-{{system_1}}."
    # The prompt round an input is the request as it was.
    for number, example in enumerate(read_examples(tmp_path / "out" / "inputs.jsonl")):
        assert case.long_prompt().request(example) == rows[number]["messages"]


@pytest.mark.parametrize(
    ("text", "template"),
    [
        ("Message: {}\nPlease sort it now.", "Message: {{text}}\nPlease sort it now."),
        ("{}\n\nSort the message above. Answer with the class alone.", None),
        ('Sort this message: "{}" and answer in one word.', None),
        ("Sort this message.\n<text>{}</text>\nOne word.", None),
        ("Classify.\n\nText: my card\nClass: card\n\nText: {}\nClass:", None),
    ],
)
def test_the_text_round_an_input_is_found_exactly(tmp_path: Path, text: str, template: str | None) -> None:
    rows = [{"messages": [turn("user", text.format(asked(n)))]} for n in range(80)]
    (version,), inputs = imported(tmp_path, rows)
    assert version["template"] == (template or text.format("{{text}}"))
    assert [row["messages"][0]["content"] for row in inputs] == [asked(n) for n in range(80)]
    rows = [{"messages": [turn("system", SYSTEM), *row["messages"]]} for row in rows]
    (version,), inputs = imported(tmp_path, rows)
    assert version["messages"] == 1 and version["template"] == (template or text.format("{{text}}"))


@pytest.mark.parametrize(("shots", "pool", "ordered"), [(4, 40, False), (2, 6, True), (1, 30, False)])
def test_examples_chosen_for_each_request_are_no_part_of_its_input(
    tmp_path: Path, shots: int, pool: int, ordered: bool
) -> None:
    """Few-shot by retrieval: 3 pairs in 100 requests are not the input's, and no version each."""
    pairs = [(turn("user", asked(n)), turn("assistant", label(n))) for n in range(pool)]

    def ask(n: int) -> list[dict[str, Any]]:
        chosen = random.Random(n).sample(range(pool), shots)
        some = sorted(chosen) if ordered else chosen
        return [turn("system", SYSTEM), *(m for i in some for m in pairs[i]), turn("user", asked(n + 100))]

    (version,), inputs = imported(tmp_path, [{"messages": ask(n)} for n in range(200)])
    assert version["requests"] == 200 and version["messages"] == 1
    assert f"usually {shots} of {pool} seen" in version["notes"][0]
    assert [row["messages"] for row in inputs[:5]] == [
        [turn("user", asked(n + 100)), turn("assistant", label(n))] for n in range(5)
    ]
    prompt = load_case(tmp_path / "out" / "unshot.toml").long_prompt().static()
    assert len(prompt) == 1 + 2 * shots and prompt[1] in [question for question, _ in pairs]


def test_passages_in_the_system_prompt_stay_with_the_input(tmp_path: Path) -> None:
    """Retrieval: what differs from request to request is no prompt to be moved, for the tuned model either."""
    system = f"{SYSTEM}\n\nPassages:\n{{}}\n\nAnswer from the passages alone."
    asks = [
        [turn("system", system.format(f"{asked(n + 200)}\n{asked(n + 300)}")), turn("user", asked(n))]
        for n in range(80)
    ]
    (version,), inputs = imported(tmp_path, [{"messages": ask} for ask in asks])
    assert version["messages"] == 1 and inputs[3]["messages"][0] == turn("user", asked(3))
    case = load_case(tmp_path / "out" / "unshot.toml")
    for number, row in enumerate(read_examples(tmp_path / "out" / "inputs.jsonl")):
        assert case.long_prompt().request(row) == asks[number]
        short = case.short_prompt().request(row)
        assert asked(number + 200) in short[0]["content"] and "Rule number" not in short[0]["content"]


def test_questions_asked_alike_are_one_version(tmp_path: Path) -> None:
    def ask(n: int) -> str:
        return (
            f"What is the status of {('order', 'return', 'claim')[n % 3]} number {n}?" if n % 4 else asked(n)
        )

    versions, inputs = imported(
        tmp_path, [{"messages": [turn("system", SYSTEM), turn("user", ask(n))]} for n in range(200)]
    )
    assert [v["requests"] for v in versions] == [200] and inputs[5]["messages"][0]["content"] == ask(5)


def test_conversations_and_tasks_side_by_side(tmp_path: Path) -> None:
    def chat(n: int) -> list[dict[str, Any]]:
        turns = [(turn("user", asked(n * 10 + i)), turn("assistant", asked(n * 7 + i))) for i in range(n % 4)]
        return [turn("system", SYSTEM), *(m for pair in turns for m in pair), turn("user", asked(n))]

    (version,), inputs = imported(tmp_path, [{"messages": chat(n)} for n in range(80)])
    assert version["messages"] == 1 and inputs[3]["messages"][:-1] == chat(3)[1:]
    other = "Translate to French, word for word, and nothing else."
    rows = [
        {"messages": [turn("system", SYSTEM if n % 3 else other), turn("user", asked(n))]} for n in range(90)
    ]
    versions, _ = imported(tmp_path, rows)
    assert [v["requests"] for v in versions] == [60, 30]


@pytest.mark.parametrize(
    ("request_", "response", "answer"),
    [
        ({"system": "Be brief."}, {"content": [{"type": "text", "text": "low"}], "stop_reason": "end_turn"}, "low"),
        (
            {"system": [{"type": "text", "text": "Be brief."}]},
            {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "low"}]},
            "low",
        ),
        ({"system": "Be brief."}, {"content": [{"type": "text", "text": "lo"}], "stop_reason": "max_tokens"}, None),
        (
            {"instructions": "Be brief."},
            {"output": [{"type": "reasoning", "summary": []},
                        {"type": "message", "content": [{"type": "output_text", "text": "low"}]}]},
            "low",
        ),
        (
            {"instructions": "Be brief."},
            {"status": "incomplete", "output": [{"type": "message", "content": [{"type": "text", "text": "l"}]}]},
            None,
        ),
        ({"instructions": "Be brief."}, {"output": [{"type": "function_call", "name": "f"}]}, None),
        ({"system": "Be brief."}, {"choices": [{"message": {"content": "lo"}, "finish_reason": "length"}]}, None),
        ({"system": "Be brief."}, {"choices": [None]}, None),
    ],
)  # fmt: skip
def test_other_apis_bring_their_prompt_and_a_cut_answer_is_none(
    request_: dict[str, Any], response: dict[str, Any], answer: str | None
) -> None:
    row = {"request": {**request_, "messages": [{"role": "user", "content": "clause"}]}, "response": response}
    form = next(form for form in LOG_FORMATS if form.matches(row))
    (call,) = form.parse(row)
    assert [m["content"] for m in call.messages] == ["Be brief.", "clause"] and call.answer == answer


def test_a_prompt_that_is_no_text_and_a_text_that_the_log_cut_are_not_taken() -> None:
    odd = {"request": {"system": {"a": 1}, "messages": [{"role": "user", "content": "x"}]}, "response": {}}
    cut = {"arm": "baseline", "assigned": "baseline", "version": "v1", "input": "x" * 9, "cut": True}
    for row in (odd, cut):
        with pytest.raises(Problem):
            next(form for form in LOG_FORMATS if form.matches(row)).parse(row)
