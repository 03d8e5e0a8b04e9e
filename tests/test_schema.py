"""Records: what does not fit is one line with the key, its value and what is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unshot.case import Case
from unshot.contracts.gates import Gate
from unshot.contracts.record import Record, RecordError
from unshot.contracts.registry import Event, State, Version
from unshot.contracts.request_log import Feedback

EVENT = {"by": "ann", "action": "add", "subject": "v1"}


@pytest.mark.parametrize(
    ("kind", "text", "line"),
    [
        (Gate, '{"passed": true, "detail": ""}', "`name` is missing"),
        (
            Gate,
            '{"name": "speed", "passed": true, "detail": ""}',
            "`name` is \"speed\"; accepted: 'quality', 'forgetting', 'robustness', 'review', 'parity', 'claim'",
        ),
        (
            Gate,
            '{"name": "claim", "passed": 3, "detail": ""}',
            "`passed` is 3; expected true or false or nothing, got a whole number",
        ),
        (Gate, "[1]", "it is [1]; expected a table, got a list"),
        (Gate, '{"name": ', "not valid JSON (input data was truncated)"),
        (
            Feedback,
            '{"id": "a", "time": 1, "correctt": true}',
            "unknown key `correctt`; did you mean correct",
        ),
        (
            State,
            json.dumps({"history": [EVENT, {"by": 7}]}),
            "`history.1.by` is 7; expected a text",
        ),
        (State, '{"aliases": {"king": 1}}', "invalid enum value 'king' at key in $.aliases"),
        (
            State,
            '{"versions": {"1": {"number": "x"}}}',
            "expected a whole number, got a text at $.versions[...].number",
        ),
    ],
)
def test_a_misfit_says_what_and_where(kind: type[Record], text: str, line: str) -> None:
    with pytest.raises(RecordError) as caught:
        kind.from_json(text)
    assert str(caught.value).startswith(line)


def test_a_record_comes_back_from_its_json_and_from_plain_values(tmp_path: Path) -> None:
    version: dict[str, Any] = {"number": 3, "by": "ann", "source": "x", "digest": "d", "files": {"a.gguf": 7}}
    gates = {"tune": [Gate(name="quality", passed=None, detail="small")]}
    state = State(versions={3: Version(**version, gates=gates)}, history=[Event(**EVENT)])
    assert (
        State.from_json(state.to_json())
        == State.from_json(state.to_json(indent=1))
        == State.of(state.plain())
        == state
    )
    case = Case.of({"task": {"data": str(tmp_path)}, "traffic": {"rate": 3}})
    assert case.task.data == tmp_path and case.traffic.rate == 3.0
    assert case.plain()["task"]["data"] == str(tmp_path)
    assert Case.of(case.plain()) == case


def test_two_records_share_no_list() -> None:
    first, second = Case.of({}), Case.of({})
    first.task.fails.append("facts")
    first.candidate.gpu.append("l4")
    assert second.task.fails == [] and second.candidate.gpu == ["h100-sxm"]
