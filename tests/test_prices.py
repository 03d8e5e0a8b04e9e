"""API prices: sources, overrides, cache rules, batch and fine-tuning."""

from __future__ import annotations

import contextlib
import math
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.prices import Overrides, api_price, cheaper, fine_tuned, hit_rate, request_cost
from unshot.catalog.tables import table
from unshot.errors import InputError
from unshot.prices import parse_prices

NOW = datetime(2026, 11, 24, tzinfo=UTC)


def test_prices_are_genai_prices_own() -> None:
    from genai_prices import Usage, calc_price

    for model, provider in (
        ("gpt-4o", "openai"),
        ("claude-sonnet-4-5", "anthropic"),
        ("gemini-2.5-pro", "google"),
    ):
        for tokens in (1_000, 150_000):
            price = api_price(f"{provider}/{model}", input_tokens=tokens, when=NOW)
            usage = Usage(input_tokens=tokens, output_tokens=1_000, cache_read_tokens=0)
            theirs = calc_price(usage, model, provider_id=provider, genai_request_timestamp=NOW)
            ours = request_cost(price, input_tokens=tokens, output_tokens=1_000).total
            assert ours == pytest.approx(float(theirs.total_price), rel=1e-9)


def test_tiers_follow_the_size_of_the_request() -> None:
    small = api_price("gemini-2.5-pro", input_tokens=100_000, when=NOW)
    large = api_price("gemini-2.5-pro", input_tokens=300_000, when=NOW)
    assert large.input == 2 * small.input


def test_cached_requests_cost_what_genai_prices_says() -> None:
    from genai_prices import Usage, calc_price

    price = api_price("gpt-4o", when=NOW)
    ours = request_cost(price, input_tokens=2_000, output_tokens=50, prefix=1_280, hit=1.0).total
    usage = Usage(input_tokens=2_000, cache_read_tokens=1_280, output_tokens=50)
    theirs = calc_price(usage, "gpt-4o", provider_id="openai", genai_request_timestamp=NOW)
    assert ours == pytest.approx(float(theirs.total_price), rel=1e-9)


def test_a_write_surcharge_can_make_rare_caching_dearer() -> None:
    price = api_price("claude-sonnet-4-5", when=NOW)
    assert price.write == 1.25 * price.input and price.write_long == 2 * price.input
    plain = request_cost(price, input_tokens=4_000, output_tokens=10).total
    rare = request_cost(price, input_tokens=4_000, output_tokens=10, prefix=3_900, hit=0.0).total
    often = request_cost(price, input_tokens=4_000, output_tokens=10, prefix=3_900, hit=0.99).total
    assert often < plain < rare
    assert rare - plain == pytest.approx(3_900 * 0.25 * price.input / 1e6)


@pytest.mark.parametrize(
    ("model", "prefix", "held"),
    [
        ("gpt-4o", 1_023, 0),
        ("gpt-4o", 1_024, 1_024),
        ("gpt-4o", 1_200, 1_152),
        ("claude-sonnet-4-5", 1_200, 1_200),
        ("claude-haiku-4-5", 1_200, 0),
        ("claude-haiku-4-5", 4_100, 4_100),
        ("gemini-2.5-pro", 1_500, 0),
    ],
)
def test_cache_minimum_and_steps(model: str, prefix: int, held: int) -> None:
    rule = api_price(model, when=NOW).rule
    assert rule is not None and rule.cacheable(prefix) == held


def test_hit_rate_against_a_simulated_cache() -> None:
    import numpy as np

    generator = np.random.default_rng(1)
    for rate in (0.001, 0.005, 0.02):
        gaps = generator.exponential(1 / rate, 200_000)
        assert hit_rate(rate, 300) == pytest.approx(float(np.mean(gaps < 300)), abs=0.004)
    assert hit_rate(100, 300) == pytest.approx(1.0)


def test_batch_halves_and_is_refused_where_unknown() -> None:
    price = api_price("gpt-4o", when=NOW)
    full = request_cost(price, input_tokens=1_000, output_tokens=100).total
    assert request_cost(price, input_tokens=1_000, output_tokens=100, batch=True).total == pytest.approx(
        full / 2
    )
    nobody = api_price("mine", overrides=Overrides(["mine:input=1,output=2"]), when=NOW)
    with pytest.raises(InputError, match="batch"):
        request_cost(nobody, input_tokens=1, output_tokens=1, batch=True)


def test_fine_tuned_prices_and_the_users_own() -> None:
    base = api_price("gpt-4o-mini", when=NOW)
    tuned = fine_tuned("gpt-4o-mini", base)
    assert tuned is not None and tuned.training and tuned.input > base.input
    assert fine_tuned("claude-sonnet-4-5", base) is None
    mine = fine_tuned("x", base, Overrides(["ft-x:input=1,output=2,training=3"]))
    assert mine is not None and (mine.input, mine.training) == (1, 3)


def test_overrides_scale_the_published_discounts(tmp_path: Path) -> None:
    mine = api_price("gpt-4o", overrides=Overrides(["input=2,output=8"]), when=NOW)
    assert (mine.input, mine.output, mine.cached) == (2, 8, 1.0)
    assert "your price" in mine.describe()
    file = tmp_path / "prices.toml"
    file.write_text('["gpt-4o"]\ninput = 1.0\ncached = 0.9\noutput = 3.0\n', encoding="utf-8")
    from_file = api_price("gpt-4o", overrides=Overrides([str(file)]), when=NOW)
    assert (from_file.input, from_file.cached) == (1.0, 0.9) and "prices.toml" in from_file.source
    # A price given for the baseline is not the cheaper model's.
    other = api_price("gpt-4o-mini", overrides=Overrides(["input=2,output=8"]), baseline=False, when=NOW)
    assert other.input == 0.15


@pytest.mark.parametrize(
    "bad", ["input=-1,output=2", "input=nan,output=1", "inptu=1,output=2", "input=x,output=1"]
)
def test_bad_prices_are_refused(bad: str) -> None:
    with pytest.raises(InputError):
        Overrides([bad])


def test_unknown_models_name_the_nearest() -> None:
    with pytest.raises(InputError, match="gpt-4o") as caught:
        api_price("gpt-4o-minni", when=NOW)
    assert "--price" in str(caught.value)


def test_every_catalog_figure_has_its_source_and_date() -> None:
    for name, facts in table("api")["provider"].items():
        assert facts["cache_source"] and facts["cache_date"], name
        assert "batch_discount" not in facts or (facts["batch_source"] and facts["batch_date"]), name
        assert facts["latency_source"], name
    for name, facts in table("api")["finetune"].items():
        assert facts["source"] and facts["date"], name
        assert api_price(name, when=NOW).input < facts["input"], name
    for name, other in table("api")["cheaper"].items():
        assert api_price(other, when=NOW).input < api_price(name, when=NOW).input
        assert cheaper(name) == other


def test_a_price_is_dated() -> None:
    price = api_price("gpt-4o")
    assert price.source.startswith("genai-prices ") and price.date >= "2026-10-01"
    assert math.isfinite(price.input)


SAME = [
    "input=2.5,output=10,cached=1.25", "gpt-4o:input=2.5,output=10,cached=1.25", "2.5,10,1.25", "2.5:10:1.25",
    " input = 2.5 , output = 10, cached = 1.25", "{toml}", "{json}",
]  # fmt: skip


@pytest.mark.parametrize("text", SAME)
def test_a_price_has_one_meaning_in_all_its_forms(tmp_path: Path, text: str) -> None:
    toml, other = tmp_path / "prices.toml", tmp_path / "prices.json"
    toml.write_text('["gpt-4o"]\ninput = 2.5\noutput = 10\ncached = 1.25\n["other"]\ninput = 1\noutput = 1\n')
    other.write_text('{"gpt-4o": {"input": 2.5, "output": 10, "cached": 1.25}}')
    price = parse_prices(text.format(toml=toml, json=other)).of("gpt-4o")
    assert (price.input, price.output, price.cached) == (2.5, 10, 1.25)
    assert price.of(1_000_000, 100_000, 400_000) == pytest.approx(0.6 * 2.5 + 0.4 * 1.25 + 1)
    assert price.of(1_000_000, 0, None) == 2.5


def test_no_discount_is_given_where_none_was_named() -> None:
    price = parse_prices("2,8").of()
    assert price.cached is None and price.of(1_000_000, 0, 1_000_000) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("input=2.5", "no `output` price"),
        ("a:input=1,output=1", ""),
        ("input=1,output=2,write=3", "write is not counted here"),
    ],
)
def test_one_api_price_is_whole_or_refused(text: str, words: str) -> None:
    if not words:
        assert parse_prices(text).of("b").input == 1  # the only price there is
        return
    with pytest.raises(InputError, match=words):
        parse_prices(text).of()


def test_every_command_takes_a_price_in_the_same_forms() -> None:
    from tests.test_flags import COMMANDS
    from unshot.options import PRICE

    found = {
        (path, name)
        for path, command in COMMANDS
        for parameter in command.params
        for name in parameter.opts
        if parameter.type is PRICE
    }
    assert found >= {
        ("unshot plan", "--price"), ("unshot bench", "--baseline-price"), ("unshot bench", "--candidate-price"),
        ("unshot bench", "--baseline-token-price"), ("unshot deploy serve", "--baseline-price"),
        ("unshot deploy serve", "--candidate-price"),
    }  # fmt: skip


@given(st.text(max_size=40))
@settings(deadline=None)
def test_any_text_is_a_price_or_refused(text: str) -> None:
    with contextlib.suppress(InputError):
        for row in parse_prices(text).by_model.values():
            assert all(math.isfinite(v) and v >= 0 for v in row.values())
