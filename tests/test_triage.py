"""The verdict follows the article's order, and says what would change it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from planner.triage import Economics, triage
from unshot.case import TaskSettings
from unshot.errors import InputError

PAYS = Economics(
    rate=10,
    keep="api, cached",
    keep_monthly=10_000,
    tuned="8b tuned",
    tuned_monthly=2_000,
    break_even=2.0,
    payback_months=1.5,
    horizon_months=12,
)
COSTS = replace(PAYS, keep_monthly=1_000, break_even=20.0, payback_months=None)


def ask(shots: int = 10, economics: Economics | None = PAYS, **task: object) -> tuple[str, str, str, str]:
    found = triage(TaskSettings.of(task), shots=shots, economics=economics)
    return found.answer, found.headline, " ".join(found.reasons), " ".join(found.would_change)


def test_missing_facts_ask_for_retrieval_even_where_tuning_pays() -> None:
    answer, headline, reasons, change = ask(fails=["facts"], examples_at_hand=500)
    assert answer == "not yet" and "retrieval" in headline
    assert "for it:" in reasons and "passages" in change


def test_the_order_is_prompt_retrieval_tools_tuning() -> None:
    headline = ask(fails=["tools", "facts"])[1]
    assert "retrieval" in headline
    assert "calling" in ask(fails=["tools"])[1]
    assert "prompt first" in ask(shots=0, fails=["format"])[1]


def test_few_examples_come_first() -> None:
    answer, headline, reasons, change = ask(fails=["format"], examples_at_hand=12)
    assert answer == "not yet" and "examples" in headline and "12" in reasons and "100" in change


def test_a_met_target_ends_it_unless_cost_or_latency_hurt() -> None:
    assert ask(current=0.95, target=0.92)[0] == "not yet"
    assert ask(current=0.95, target=0.92, fails=["cost"])[0] == "yes"


@pytest.mark.parametrize(
    ("fail", "word"), [("format", "format"), ("jargon", "language"), ("reasoning", "reasoning")]
)
def test_what_tuning_is_for(fail: str, word: str) -> None:
    answer, headline, *_ = ask(economics=COSTS, fails=[fail], examples_at_hand=300, current=0.8, target=0.9)
    assert answer == "yes" and word in headline


def test_cost_alone_follows_the_break_even() -> None:
    answer, headline, _, change = ask()
    assert answer == "yes" and "cost" in headline and "2" in change
    answer, headline, reasons, change = ask(economics=COSTS)
    assert answer == "not yet" and "caching" in reasons and "20" in change
    late = replace(PAYS, payback_months=30.0)
    assert "pay back" in ask(economics=late)[1]


def test_a_cheaper_way_without_tuning_is_in_the_headline() -> None:
    other = replace(PAYS, untuned=(("mini, long prompt", 500.0),))
    assert "unless mini, long prompt answers as well: $500" in ask(economics=other)[1]
    # A failure that tuning mends does not need the caveat there, but the figure stays in the reasons.
    headline, reasons = ask(economics=other, fails=["format"], examples_at_hand=300)[1:3]
    assert "unless" not in headline and "mini" in reasons


def test_never_breaking_even_is_said() -> None:
    never = replace(COSTS, break_even=None)
    assert "at no rate" in ask(economics=never)[3]


def test_questions_not_answered_are_listed() -> None:
    found = triage(TaskSettings(), shots=5, economics=PAYS)
    assert len(found.unknown) == 4
    full = TaskSettings(fails=["cost"], current=0.8, target=0.9, examples_at_hand=100)
    assert triage(full, shots=5, economics=PAYS).unknown == ()


def test_an_unknown_failure_names_the_accepted_ones() -> None:
    with pytest.raises(InputError, match="format"):
        ask(fails=["formatt"])


def test_a_model_that_fits_nowhere_is_said() -> None:
    found = triage(TaskSettings(), shots=5, economics=None, unfit="70b needs 140 GB; t4 has 16 GB")
    assert found.answer == "not yet" and "does not run" in found.headline and "140 GB" in found.reasons[0]
