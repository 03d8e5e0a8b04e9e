"""API prices: sources, overrides, cache rules, batch and fine-tuning."""

from __future__ import annotations

import contextlib
import math
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.overrides import Overrides
from planner.price_data import look_up, reasons, retirement, siblings
from planner.prices import api_price, fine_tuned, hit_rate, request_cost
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
        ("gemini-2.5-flash", 2_047, 0),
        ("gemini-2.5-flash", 2_048, 2_048),
        ("gemini-3.8-flash", 4_000, 0),
        ("gemini-3.8-flash", 4_096, 4_096),
        ("claude-opus-5", 600, 600),
        ("claude-opus-4-7", 2_000, 0),
        ("google/claude-haiku-4-5", 4_000, 0),
        ("google/claude-sonnet-4-5", 1_200, 1_200),
        ("aws/global.anthropic.claude-opus-5", 600, 600),
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
    tuned = fine_tuned(base)
    assert tuned is not None and tuned.training and tuned.input > base.input
    assert fine_tuned(api_price("claude-sonnet-4-5", when=NOW)) is None
    own = Overrides(["ft-claude-sonnet-4-5:input=1,output=2,training=3"])
    mine = fine_tuned(api_price("claude-sonnet-4-5", when=NOW), own)
    assert mine is not None and (mine.input, mine.training) == (1, 3)


def test_requests_of_several_sizes_are_each_priced_at_their_tier() -> None:
    """Nine of 100,000 tokens at $1.25 and one of 300,000 at $2.50: (900 x 1.25 + 300 x 2.50) / 1,200 = 1.5625."""
    mixed = [(100_000.0, 10.0)] * 9 + [(300_000.0, 20.0)]
    price = api_price("gemini-2.5-pro", input_tokens=120_000, samples=mixed, when=NOW)
    assert price.input == pytest.approx(1.5625)
    assert price.output == pytest.approx((9 * 10 * 10 + 20 * 15) / 110)
    assert "10.0% of the requests are above 200,000 tokens" in " ".join(price.notes)
    assert api_price("gemini-2.5-pro", samples=mixed[:9], when=NOW).notes == ()


def test_a_fine_tuned_model_that_the_price_data_lacks_has_the_catalogs_price() -> None:
    """gpt-4.1, fine-tuned: $3 in, $0.75 cached, $12 out."""
    price = api_price("ft:gpt-4.1-2025-04-14:acme::abc", when=NOW)
    assert (price.input, price.cached, price.output) == (3.0, 0.75, 12.0)
    assert price.rule is not None and price.rule.minimum == 1024
    with pytest.raises(InputError, match="unknown API model"):
        api_price("ft:gpt-9:acme::abc", when=NOW)


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
    for name, facts in table("api")["family"].items():
        assert "minimum" not in facts or (facts["source"] and facts["date"]), name
    for name, facts in table("api")["provider"].items():
        assert "batch_discount" not in facts or (facts["batch_source"] and facts["batch_date"]), name
        assert facts["latency_source"], name
    for row in table("api")["retirement"]:
        assert row["source"] and row["successor"]
        assert row["read"] >= "2026-11-26" or "not read again" in row["source"]
    for name, facts in table("api")["finetune"].items():
        assert facts["source"] and facts["date"], name
        assert api_price(name, when=NOW).input < facts["input"], name


def test_a_cached_price_without_a_rule_is_not_ignored() -> None:
    """mistral-large-4: 2,000 static of 2,100 input tokens at $0.70, $0.07 cached, and an answer of 20 at $2.10."""
    price = api_price("mistral-large-4", when=NOW)
    assert price.rule is not None and price.rule.assumed and price.rule.minimum == 1024
    assert api_price("grok-4.3", when=NOW).rule is not None
    held = 2_000 // 128 * 128
    cost = request_cost(price, input_tokens=2_100, output_tokens=20, prefix=2_000, hit=1.0).total
    assert cost == pytest.approx(((2_100 - held) * 0.70 + held * 0.07 + 20 * 2.10) / 1e6)
    mine = api_price("mine", overrides=Overrides(["mine:input=2.5,cached=0.25,output=10"]), when=NOW)
    assert mine.rule is not None and mine.rule.assumed


def test_the_user_sets_the_caching_rule() -> None:
    text = "mistral-large-4:cache_min=512,cache_step=1,cache_ttl=3600,write_factor=1.25"
    price = api_price("mistral-large-4", overrides=Overrides([text]), when=NOW)
    assert price.rule is not None and not price.rule.assumed
    assert (price.rule.minimum, price.rule.step, price.rule.ttl) == (512, 1, 3600)
    assert price.write == pytest.approx(1.25 * 0.70)
    for bad in ("cache_min=1.5", "cache_step=0"):
        with pytest.raises(InputError, match="cache_"):
            Overrides([f"mistral-large-4:{bad}"])


def test_caching_rules_follow_the_family_not_the_reseller() -> None:
    own, sold = api_price("claude-sonnet-4-5", when=NOW), api_price("google/claude-sonnet-4-5", when=NOW)
    assert own.rule is not None and own.rule == sold.rule and sold.write_long == 2 * sold.input
    # From GPT-5.6 on an entry lives 30 minutes, and writing it costs a quarter more.
    new, old = api_price("gpt-6-luna", when=NOW), api_price("gpt-4.1", when=NOW)
    assert new.rule is not None and new.rule.ttl == 1800 and new.write == pytest.approx(1.25 * new.input)
    assert old.rule is not None and old.rule.ttl == 300 and old.write is None


@pytest.mark.parametrize(
    ("model", "date", "successor"),
    [
        ("gpt-4o", "2027-01-14", "gpt-6-luna"),
        ("gpt-4o-2024-08-06", "2027-01-14", "gpt-6-luna"),
        ("gpt-4.1-mini", "2027-01-14", "gpt-6-luna"),
        ("gpt-5", "2026-12-11", "gpt-6.1-sol"),
        ("gpt-5-nano", "2026-12-11", "gpt-6-luna"),
        ("o3", "2026-12-11", "gpt-6.1-sol"),
        ("gpt-4.1-nano", "2026-10-23", "gpt-5.6-luna"),
        ("o4-mini", "2026-10-23", "gpt-5.6-terra"),
        ("gpt-4", "2026-10-23", "gpt-5.6-sol"),
    ],
)
def test_models_end_when_their_provider_says(model: str, date: str, successor: str) -> None:
    found = look_up(model, NOW)
    end = retirement(found)
    assert end is not None and (end.date, end.successor) == (date, successor)


def test_cheaper_siblings_come_from_the_price_data() -> None:
    names = [s.id for s in siblings(look_up("openai/gpt-4o", NOW), NOW)]
    assert len(names) > 1 and "gpt-6-luna" in names
    assert not {"gpt-4", "gpt-4.1-nano", "gpt-4o-mini", "gpt-oss-20b"} & set(names)
    dated = [s.id for s in siblings(look_up("gpt-4o-2024-08-06", NOW), NOW)]
    assert dated == names
    claude = [s.id for s in siblings(look_up("claude-sonnet-4-5", NOW), NOW)]
    assert "claude-haiku-5-5" in claude and all(name.startswith("claude") for name in claude)
    assert siblings(look_up("mistral-large-4", NOW), NOW)
    assert siblings(look_up("openai/gpt-6-luna", NOW), NOW) == []


def test_who_reasons_is_known() -> None:
    assert reasons("gpt-6-luna") and reasons("o3") and reasons("gemini-2.5-flash")
    assert not reasons("gpt-4o") and not reasons("claude-sonnet-4-5") and not reasons("my-model")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("gpt-4o:input=2.5e-6", "input=2.5"),
        ("gpt-4o:output=1e-5", "output=10"),
        ("mine:input=2e-6,output=8e-6", "input=2"),
    ],
)
def test_dollars_per_token_are_refused_with_a_guess(text: str, meant: str) -> None:
    with pytest.raises(InputError, match="per token") as caught:
        api_price(text.partition(":")[0], overrides=Overrides([text]), when=NOW)
    assert f"did you mean {meant}?" in str(caught.value)


def test_a_price_for_a_model_that_is_not_asked_for_is_refused() -> None:
    prices = Overrides(["gpt-4o-mni:input=1,output=2"])
    api_price("gpt-4o", overrides=prices, when=NOW)
    with pytest.raises(InputError, match=r"'gpt-4o-mni'.*did you mean gpt-4o"):
        prices.check_used(["gpt-4o", "gpt-6-luna"])


def test_a_price_is_dated() -> None:
    price = api_price("gpt-4o")
    assert price.source.startswith("genai-prices ") and price.date >= "2026-10-01"
    # The date is the price's own: since when it holds, not that of the newest price of all.
    assert api_price("mistral-large-4", when=NOW).date == "2026-10-29"
    assert "not dated" in api_price("mistral-nemo", when=NOW).describe()
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
        ("input=1,output=2,write=3", "write is not counted here"),
    ],
)
def test_one_api_price_is_whole_or_refused(text: str, words: str) -> None:
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
