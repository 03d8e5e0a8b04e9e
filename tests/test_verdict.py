"""The verdict follows the article's order, and says what would change it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from planner.verdict import Absent, Economics, Rival, judge_case
from unshot.case import TaskSettings
from unshot.contracts.plan import Verdict
from unshot.errors import InputError

PAYS = Economics(
    rate=10,
    keep="api, cached",
    keep_monthly=10_000,
    tuned="8b tuned",
    tuned_monthly=2_000,
    once=3_000,
    break_even=2.0,
    payback_months=1.5,
    horizon_months=12,
    cheaper=0.93,
)
COSTS = replace(PAYS, keep_monthly=1_000, break_even=20.0, payback_months=None)


def ask(shots: int = 10, economics: Economics | None = PAYS, **task: object) -> tuple[str, str, str, str]:
    found = judge_case(TaskSettings.of(task), shots=shots, economics=economics)
    return found.answer, found.headline, " ".join(found.reasons), " ".join(found.would_change)


def test_missing_facts_ask_for_retrieval_even_where_tuning_pays() -> None:
    answer, headline, reasons, change = ask(fails=["facts"], examples_at_hand=500)
    assert answer == "keep the prompt" and "retrieval" in headline
    assert "for tuning:" in reasons and "passages" in change


def test_the_order_is_prompt_retrieval_tools_tuning() -> None:
    headline = ask(fails=["tools", "facts"])[1]
    assert "retrieval" in headline
    assert "calling" in ask(fails=["tools"])[1]
    assert "prompt first" in ask(shots=0, fails=["format"])[1]


def test_few_examples_come_first() -> None:
    answer, headline, reasons, change = ask(fails=["format"], examples_at_hand=12)
    assert answer == "keep the prompt" and "examples" in headline and "12" in reasons and "100" in change


def test_a_met_target_ends_it_unless_cost_or_latency_hurt() -> None:
    assert ask(current=0.95, target=0.92)[0] == "keep the prompt"
    assert ask(current=0.95, target=0.92, fails=["cost"])[0] == "tune"


@pytest.mark.parametrize(
    ("fail", "word"), [("format", "format"), ("jargon", "language"), ("reasoning", "reasoning")]
)
def test_what_tuning_is_for_though_it_costs_more(fail: str, word: str) -> None:
    """1,000 a month more and 3,000 once over 12 months: 1,250 a month for the reason that is named."""
    answer, headline, *_ = ask(economics=COSTS, fails=[fail], examples_at_hand=300, current=0.8, target=0.9)
    assert answer == "not for money" and word in headline and "$1,250 a month more" in headline


def test_cost_alone_follows_the_break_even() -> None:
    """8,000 a month saved for 12 months, 3,000 once: 93,000."""
    found = judge_case(TaskSettings(), shots=10, economics=PAYS)
    assert found.answer == "tune" and "$93k saved over 12 months" in found.headline
    for part in ("from 2/s on", "now 10/s", "93% of the draws", "Would change it"):
        assert part in found.summary
    answer, _, reasons, change = ask(economics=COSTS)
    assert answer == "keep the prompt" and "caching" in reasons and "20" in change
    late = replace(PAYS, payback_months=30.0)
    assert "too late" in ask(economics=late)[1]


def test_a_cheaper_way_without_tuning_comes_first() -> None:
    other = replace(PAYS, untuned=(Rival("mini, long prompt", 500.0),))
    answer, headline, *_ = ask(economics=other)
    assert answer == "try first" and headline == "Try mini, long prompt first"
    # A failure that tuning mends is not mended by a cheaper model with the same prompt.
    answer, headline, reasons, _ = ask(economics=other, fails=["format"], examples_at_hand=300)
    assert answer == "tune" and "mini" in reasons


def test_a_sibling_whose_reasoning_is_not_counted_may_change_it() -> None:
    other = replace(PAYS, untuned=(Rival("8b", 1_500.0),), uncounted=(Rival("luna", 700.0),))
    found = judge_case(TaskSettings(), shots=10, economics=other)
    assert "Try 8b first" in found.headline and "luna at $700 a month without any" in found.would_change[0]


def test_reasoning_that_is_not_counted_may_make_the_prompt_the_dearer_one() -> None:
    cheap = replace(COSTS, keep_counted=False)
    assert "the reasoning tokens of api, cached" in ask(economics=cheap)[3]
    found = judge_case(TaskSettings(), shots=10, economics=cheap)
    assert "Would change it: the reasoning tokens of api, cached" in found.summary
    assert "reasoning" not in ask(economics=replace(PAYS, keep_counted=False))[3]


def test_never_breaking_even_is_said() -> None:
    never = replace(COSTS, break_even=None)
    assert "at no rate" in ask(economics=never)[3]


def test_questions_not_answered_are_listed() -> None:
    found = judge_case(TaskSettings(), shots=5, economics=PAYS)
    assert len(found.unknown) == 4
    full = TaskSettings(fails=["cost"], current=0.8, target=0.9, examples_at_hand=100)
    assert judge_case(full, shots=5, economics=PAYS).unknown == []


def test_an_unknown_failure_names_the_accepted_ones() -> None:
    with pytest.raises(InputError, match="format"):
        ask(fails=["formatt"])


def test_a_model_that_fits_nowhere_is_said() -> None:
    found = judge_case(TaskSettings(), shots=5, economics=None, unfit="70b needs 140 GB; t4 has 16 GB")
    assert (
        found.answer == "keep the prompt"
        and "cannot serve" in found.headline
        and "140 GB" in found.reasons[0]
    )


MISSING = Absent(
    "8b, long prompt",
    "TTFT is 300 ms on an idle server; the target is 100 ms",
    True,
    "1b tuned",
    900.0,
    9_000.0,
)


def test_a_prompt_that_misses_the_slo_today_is_not_kept() -> None:
    """No saving can be stated against an option that cannot serve; what can is named with its price."""

    def given(absent: Absent, **task: object) -> Verdict:
        return judge_case(TaskSettings.of(task), shots=10, economics=None, absent=absent)

    found = given(MISSING)
    assert found.answer == "tune" and found.headline == "Tune: 8b, long prompt misses the SLO"
    for part in ("300 ms", "1b tuned at $900 a month and $9,000 once", "looser SLO"):
        assert part in found.summary
    other = replace(MISSING, untuned=(Rival("1b, long prompt", 500.0),))
    found = given(other)
    assert found.answer == "try first" and "1b, long prompt" in found.headline and "$500" in found.summary
    assert given(other, fails=["format"], examples_at_hand=300).answer == "tune"
    assert given(MISSING, fails=["facts"]).answer == "keep the prompt"


def test_an_option_that_cannot_be_what_runs_today_gives_no_verdict() -> None:
    impossible = replace(MISSING, why="llama.cpp has no int8 kernels for CPU", slow=False)
    found = judge_case(TaskSettings(), shots=10, economics=None, absent=impossible)
    assert found.answer == "keep the prompt" and found.headline.startswith("No comparison")
    assert "no int8 kernels" in found.summary and "[baseline]" in found.summary
