"""The same row, prompt and template give the same token ids in every room, or the same refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.traffic import open_tokenizer
from export.source import Model
from planner.usage import request as plan_request
from tests.chat_templates import TEMPLATES
from tests.planner_files import model_folder
from tune.data.command import Counter
from tune.job import encode_rows
from tune.job import request as tune_request
from tune.prove import prove_template
from unshot.case import Case, TaskSettings, TuneSettings
from unshot.console import Output
from unshot.contracts.manifest import BaseModel
from unshot.contracts.task import Task
from unshot.data.prompts import Prompt
from unshot.data.rows import Example
from unshot.engines.address import parse_url
from unshot.engines.openai import CHAT, Api
from unshot.errors import InputError
from unshot.models import Source
from unshot.text.chat import Chat, load_tokenizer, run_template
from unshot.text.tokenizers import counter_for

INSTRUCTION = "Name the clause."
TOOL = {
    "type": "function",
    "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}},
}
ROWS = [
    Example(({"role": "user", "content": "party pays interest and late fees"},), "payment", 1),
    Example(({"role": "user", "content": "  Pourquoi ? 日本 🙂\n"},), "other", 2),
    Example(
        (
            {"role": "user", "content": "end this agreement?"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntermination"},
            {"role": "user", "content": "and with notice?"},
        ),
        "the supplier",
        3,
    ),
    Example(({"role": "user", "content": "look it up"},), "found", 4, tools=(TOOL,)),
]


def outcome(ask: Callable[[], list[int]]) -> list[int] | str:
    """Token ids, or the refusal without where it was met."""
    try:
        return ask()
    except InputError as error:
        return str(error)[str(error).find("the chat template") :]


def rooms(folder: Path, row: Example) -> dict[str, list[int] | str]:
    """The ids of a row's prompt in each room, by the way that the room itself takes."""
    prompt, task = Prompt(system=INSTRUCTION), Task(instruction=INSTRUCTION)
    source = Source(folder.name, folder)

    def chat() -> Chat:
        return Chat(load_tokenizer(folder))

    def exported() -> list[int]:
        model = Model(folder.name, source, BaseModel(name="base"), None, None, chat(), task, [row])
        return model.chat.prompt_ids(model.requests()[0])

    def checked() -> list[int]:
        case = Case(task=TaskSettings(instruction=INSTRUCTION))
        counter = Counter(str(folder), case, Output(verbosity=-1))
        found = counter.rows([row])[0]
        if isinstance(found, str):
            raise InputError(found)
        ids = counter.chat.prompt_ids(prompt.request(row))
        assert len(ids) == found[0]
        return ids

    def tuned() -> list[int]:
        (item,) = encode_rows([row], task, chat(), 4096)
        return item.ids[: item.prompt_length]

    def planned() -> list[int]:
        counter: Any = counter_for(str(folder), api=False)
        ids: list[int] = counter.prompt_ids(plan_request(prompt, row))
        assert counter.prompts([plan_request(prompt, row)] * 9) == [len(ids)] * 9
        return ids

    ways: dict[str, Callable[[], list[int]]] = {
        "plan": planned,
        "data check": checked,
        "tune": tuned,
        "eval": lambda: Chat(load_tokenizer(folder, run_template(folder / "run"))).prompt_ids(
            tune_request(row, task)
        ),
        "export gate": exported,
        "bench": lambda: open_tokenizer(str(folder)).prompt_ids(prompt.request(row)),
    }
    return {name: outcome(ask) for name, ask in ways.items()}


# Templates that no assistant's answer can be told from: there is nothing to train, so that tune refuses them.
UNTUNABLE = {"none-or-defined", "filters", "namespace", "recursive", "refuses", "type-error", "undefined"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_room_gives_the_same_ids(tmp_path: Path, name: str) -> None:
    folder = model_folder(tmp_path / "model", template=TEMPLATES[name])
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    for row in ROWS:
        found = rooms(folder, row)
        if name in UNTUNABLE:
            # Counting needs a prompt alone.
            found = {k: v for k, v in found.items() if k in ("plan", "bench")}
        assert len(set(map(str, found.values()))) == 1, found
        if name not in UNTUNABLE:
            ids = found["tune"]
            assert isinstance(ids, str) or len(ids) > 5


def test_the_gateway_sends_the_messages_that_tune_trained_on() -> None:
    """It renders nothing itself: what it sends is what the template of the served file gets."""
    from deploy.serve.target import Target

    target = Target.__new__(Target)
    object.__setattr__(target, "prompt", Prompt(system=INSTRUCTION))
    for row in ROWS[:3]:  # function definitions reach it in a field of their own
        sent = json.loads(target.encoded([dict(m) for m in row.messages]))
        assert sent == tune_request(row, Task(instruction=INSTRUCTION))


def test_function_definitions_are_what_transformers_renders_and_servers_get(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = tune_request(ROWS[3], Task(instruction=INSTRUCTION))
    plain = [{k: v for k, v in m.items() if k != "tools"} for m in messages]
    source = TEMPLATES["qwen2.5"]
    folder = model_folder(tmp_path / "model", template=source)
    chat = Chat(load_tokenizer(folder))
    theirs, _ = render_jinja_template(
        conversations=[plain], tools=[TOOL], chat_template=source, add_generation_prompt=True
    )
    assert chat.render(messages) == theirs[0] and "look_up" in theirs[0]
    (item,) = encode_rows(ROWS[3:], Task(instruction=INSTRUCTION), chat, 4096, every=True)
    assert item.ids[: item.prompt_length] == chat.prompt_ids(messages)
    api = Api(parse_url("http://localhost:1/v1"), "m", CHAT)
    body = json.loads(api.body(messages, 8))
    assert (body["messages"], body["tools"]) == (plain, [TOOL])
    assert prove_template(chat, Source("m", folder), ROWS[3:], [messages]) == []
    deaf = Chat(load_tokenizer(model_folder(tmp_path / "deaf", template=TEMPLATES["phi4"])))
    assert "leaves out the rows' function definitions" in " ".join(
        prove_template(deaf, Source("m", folder), ROWS[3:], [messages])
    )


def test_another_template_counts_in_plan_and_check_as_in_tune(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", template=TEMPLATES["phi4"])
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    other = tmp_path / "other.jinja"
    other.write_text(TEMPLATES["zephyr"], encoding="utf-8")
    task = Task(instruction=INSTRUCTION)
    (item,) = encode_rows(ROWS[:1], task, Chat(load_tokenizer(folder, str(other))), 4096)
    case = Case(task=TaskSettings(instruction=INSTRUCTION), tune=TuneSettings(chat_template=str(other)))
    ((checked, _),) = Counter(str(folder), case, Output(verbosity=-1)).rows(ROWS[:1])
    planned = counter_for(str(folder), api=False, template=str(other)).prompt(tune_request(ROWS[0], task))
    assert checked == planned == item.prompt_length
