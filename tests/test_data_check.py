"""`unshot data check`: planted faults are found, and what is not there is not."""

from __future__ import annotations

import csv
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import SHARED, Run
from tune import near
from tune.data import check as checking
from tune.data.agreement import agreement, cohen_kappa, fleiss_kappa, krippendorff_alpha
from tune.data.balance import alike_labels
from tune.data.variety import template_share
from unshot.data import personal as pii


def check_file(path: Path, **settings: Any) -> dict[str, Any]:
    """The report as it is written."""
    return checking.check_file(path, **settings).plain()


BANKING = SHARED / "banking77" / "train.csv"


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return path


def noisy(text: str, chance: random.Random) -> str:
    """A light edit: case and punctuation, a swapped pair of letters, a greeting, or a word more."""
    kind = chance.randrange(4)
    if kind == 0:
        return text.upper().rstrip("?.") + " !"
    if kind == 1:
        at = chance.randrange(1, len(text) - 2)
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return f"Hi, {text}" if kind == 2 else f"{text} please"


@pytest.fixture(scope="module")
def banking() -> list[dict[str, str]]:
    """5,000 real rows of at least 30 characters."""
    if not BANKING.exists():
        pytest.skip("shared/data/banking77 is not here")
    with BANKING.open(encoding="utf-8") as handle:
        rows = [
            {"prompt": r["text"], "completion": r["category"]}
            for r in csv.DictReader(handle)
            if len(r["text"]) >= 30 and "\n" not in r["text"]
        ]
    random.Random(0).shuffle(rows)
    return rows[:5000]


@pytest.mark.slow
def test_planted_faults_among_5000_real_rows(banking: list[dict[str, str]], tmp_path: Path) -> None:
    """Must show 5 of the tuning stage: recall is of the planted; precision counts what the clean rows lack."""
    chance = random.Random(7)
    rows: list[Any] = [dict(r) for r in banking]
    labels = sorted({r["completion"] for r in rows})
    picked = chance.sample(range(len(rows)), 120)
    planted: dict[str, set[int]] = {"contradiction": set(), "email": set(), "malformed": set()}
    for i in picked[:40]:
        other = chance.choice([x for x in labels if x != rows[i]["completion"]])
        rows.append({"prompt": noisy(banking[i]["prompt"], chance), "completion": other})
        planted["contradiction"].add(len(rows))
    for k, i in enumerate(picked[40:60]):
        rows[i]["prompt"] += f" Write to {chance.choice(['jo', 'a.b', 'x_y+z'])}{k}@mail{k}.example.co.uk."
        planted["email"].add(i + 1)
    broken = ['{"prompt": "cut', '["a", "list"]', '{"prompt": "", "completion": "x"}', '{"prompt": "no answer"}',
              '{"messages": [{"role": "bot", "content": "a"}, {"role": "assistant", "content": "b"}]}']  # fmt: skip
    for text in broken:
        rows.append(text)
        planted["malformed"].add(len(rows))
    clean = check_file(jsonl(tmp_path / "clean.jsonl", list(banking)))
    found = check_file(jsonl(tmp_path / "planted.jsonl", rows))

    assert {m["line"] for m in found["malformed"]} == planted["malformed"] and not clean["malformed"]
    assert {p["line"] for p in found["personal_data"]["listed"]} == planted["email"]
    assert found["personal_data"]["kinds"] == {"email": 20} and clean["personal_data"]["total"] == 0

    def pairs(result: dict[str, Any]) -> set[tuple[int, ...]]:
        return {tuple(c["lines"]) for c in result["contradictions"]["listed"]}

    new = pairs(found) - pairs(clean)
    caught = {line for pair in new for line in pair} & planted["contradiction"]
    recall = len(caught) / 40
    precision = sum(bool(set(pair) & planted["contradiction"]) for pair in new) / len(new)
    print(f"contradictions: recall {recall:.3f}, precision {precision:.3f}; {len(pairs(clean))} real ones")
    assert recall >= 0.95 and precision >= 0.95


@pytest.mark.slow
def test_planted_near_duplicates_do_not_cross_the_split(banking: list[dict[str, str]]) -> None:
    from tune.contamination import separate
    from tune.split import Split
    from unshot.data.rows import Example

    def example(text: str, label: str, line: int) -> Example:
        return Example(({"role": "user", "content": text},), label, line)

    chance = random.Random(3)
    rows = [example(r["prompt"], r["completion"], i + 1) for i, r in enumerate(banking)]
    train, validation, test = rows[:4000], rows[4000:4500], rows[4500:]
    copies = [
        example(noisy(r.text, chance), r.answer or "", 10_000 + i)
        for i, r in enumerate(chance.sample(train, 60))
    ]
    before = separate(Split(train, validation, test), stratum=lambda e: e.answer)
    after = separate(Split(train, validation, [*test, *copies]), stratum=lambda e: e.answer)
    moved = {m.line for m in after.moved}
    recall = len(moved & {c.line for c in copies}) / 60
    extra = moved - {m.line for m in before.moved}
    precision = len(extra & {c.line for c in copies}) / len(extra)
    print(f"across the split: recall {recall:.3f}, precision {precision:.3f}; {len(before.moved)} real ones")
    assert recall >= 0.95 and precision >= 0.95
    pairs = near.similar_pairs([e.text for part in vars(after.parts).values() for e in part])
    sizes = np.cumsum([len(after.parts.train), len(after.parts.validation)])
    crossing = np.searchsorted(sizes, pairs.first, "right") != np.searchsorted(sizes, pairs.second, "right")
    assert not crossing.any()
    assert len(after.parts.test) >= 500


def test_the_sketches_are_datasketch_s() -> None:
    from datasketch import MinHash

    texts = ["how do I top up my card", "a", "wo ist meine Karte \u00e4\u00f6\u00fc \U0001f600 geblieben"]
    hashes = [near._hashes(near.plain(t)) for t in texts]
    values = near.signatures(hashes)
    for own, row in zip(hashes, values, strict=True):
        sketch = MinHash(num_perm=64, seed=1, scheme="affine32", hashfunc=int)
        sketch.update_batch(own)
        assert np.array_equal(row, sketch.hashvalues)


def test_a_common_template_makes_no_duplicates() -> None:
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnop", k=6)) for _ in range(400)]
    wrapped = [
        "You are a careful clerk. Read the clause below and say how risky it is. Clause: "
        + " ".join(chance.sample(words, 5))
        for _ in range(60)
    ]
    assert len(near.similar_pairs(wrapped)) == 0
    assert template_share(wrapped) > 0.7
    assert len(near.similar_pairs([*wrapped, wrapped[3].upper() + "!"])) == 1
    assert template_share([w.split("Clause: ")[1] for w in wrapped]) < 0.1


def test_personal_data_is_told_by_its_checks_not_by_digits_alone() -> None:
    cases = {
        "write to Jo.Doe+x@mail.example.co.uk, please": ["email"],
        "call +49 30 901820 or (212) 555-0123": ["phone", "phone"],
        "IBAN DE89 3704 0044 0532 0130 00 IS mine": ["iban"],
        "card 4111 1111 1111 1111 was declined": ["card"],
        "order 4111 1111 1111 1112, invoice 20260131, 1,234,567.89 dollars": [],
        "DE88 3704 0044 0532 0130 00 has a wrong check digit": [],
        "a@b, user@localhost and 3 @ 5": [],
    }
    for text, kinds in cases.items():
        assert [f.kind for f in pii.find(text)] == kinds, text
    text = "IBAN DE89 3704 0044 0532 0130 00 IS mine, jo@x.org"
    assert pii.redact(text, pii.find(text)) == "IBAN [IBAN] IS mine, [EMAIL]"


def test_agreement_equals_published_examples_and_scikit_learn() -> None:
    from sklearn.metrics import cohen_kappa_score

    chance = random.Random(0)
    first, second = ([chance.choice("abc") for _ in range(50)] for _ in range(2))
    assert cohen_kappa(first, second) == pytest.approx(cohen_kappa_score(first, second), abs=1e-9)
    # Fleiss 1971, as worked through on Wikipedia, "Fleiss' kappa".
    table = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
             [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]  # fmt: skip
    assert fleiss_kappa(np.array(table)) == pytest.approx(0.210, abs=5e-4)
    # Krippendorff 2011, example C: nominal data, four observers, missing values; alpha 0.743.
    data = [
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    ]
    units = list(zip(*(line.split() for line in data), strict=True))
    counts = np.array([[unit.count(str(v)) for v in range(1, 6)] for unit in units])
    assert krippendorff_alpha(counts) == pytest.approx(0.743, abs=5e-4)
    assert agreement({0: {"x": "a"}}) is None


def test_the_annotators_report_puts_the_most_disputed_rows_first(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"question {w}", "completion": label, "annotator": who}
        for w, labels in (("apple", "xxx"), ("river", "xyx"), ("stone", "xyz"), ("cloud", "yyy"))
        for who, label in zip("ABC", labels, strict=True)
    ]
    result = check_file(jsonl(tmp_path / "a.jsonl", rows))["agreement"]
    assert [s["text"] for s in result["settle_first"]["listed"]] == ["question stone", "question river"]
    assert result["settle_first"]["listed"][0]["lines"] == [7, 8, 9]
    assert result["cohen_kappa"] is None and result["fleiss_ratings"] == 3
    two = check_file(jsonl(tmp_path / "b.jsonl", [r for r in rows if r["annotator"] != "C"]))["agreement"]
    assert two["cohen_kappa"] == pytest.approx(cohen_kappa(list("xxxy"), list("xyyy")))


def test_every_malformed_row_is_listed_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(
        b'prompt,completion\nfine one,a\na, stray comma,b\ncaf\xe9,a\n,b\n"two\nlines",a\nlast,\n'
    )
    result = check_file(path)
    assert [m["line"] for m in result["malformed"]] == [3, 4, 5, 8]
    assert result["well_formed"] == 2
    rows = ['{"prompt": "a", "completion": "{\\"risk\\": \\"hi"}', '{"messages": [{"role": "user", "content": "a"}]}',
            '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "s"}, '
            '{"role": "assistant", "content": "b"}]}', "\ufeff{}", '{"prompt": "ok", "completion": "b"}']  # fmt: skip
    result = check_file(jsonl(tmp_path / "d.jsonl", rows))
    assert [m["line"] for m in result["malformed"]] == [1, 2, 3, 4]
    assert (
        "breaks off" in result["malformed"][0]["problem"] and "'system'" in result["malformed"][2]["problem"]
    )


def test_the_command_writes_full_lists_and_a_redacted_copy(
    unshot: Run, embedded_model: Path, small_data: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in small_data.read_text().splitlines()]
    rows[4]["prompt"] += " Contact jo@example.org."
    data = jsonl(tmp_path / "d.jsonl", rows)
    done = unshot(
        "data", "check", data, "--out", tmp_path / "out", "--redact", "--base", "smollm2-135m",
        "--max-length", "40", "--json", "-q",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["length"]["unit"] == "tokens" and result["length"]["too_long"]["total"] > 0
    redacted = (tmp_path / "out" / "redacted.jsonl").read_text().splitlines()
    assert len(redacted) == 60 and "[EMAIL]" in redacted[4] and "jo@example.org" not in "".join(redacted)
    assert "jo@example" not in (tmp_path / "out" / "personal.jsonl").read_text()
    few = unshot("data", "check", jsonl(tmp_path / "few.jsonl", [*rows[:20], "{"]))
    assert few.returncode == 1 and "Traceback" not in few.stderr
    assert "not ready" in few.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("data", "check", "none.jsonl"), "no such file"),
        (("data", "check", "unshot/demo/data.jsonl", "--redact"), "--out"),
        (("data", "split", "unshot/demo/data.jsonl", "--out", "{tmp}/x", "--shares", "80/30"), "--shares"),
        (("data", "split", "unshot/demo/data.jsonl", "--out", "{tmp}/x", "--group-by", "riks"), "riks"),
    ],
)
def test_bad_usage_is_one_line(unshot: Run, tmp_path: Path, arguments: tuple[str, ...], part: str) -> None:
    done = unshot(*(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("labels", "pairs"),
    [
        (("cancel", "cancell", "refund"), [("cancel", "cancell")]),
        (("Refund", "refund", "other"), [("Refund", "refund")]),
        (("card lost", "card_lost", "caf\u00e9"), [("card lost", "card_lost")]),
        (("caf\u00e9", "cafe\u0301"), [("cafe\u0301", "caf\u00e9")]),
        (("recieve", "receive", "level 1", "level 2", "yes", "no", "low", "slow"), [("receive", "recieve")]),
        (("+", "-", "positive", "negative"), []),
        (("1", "1.0", "2"), [("1", "1.0")]),
    ],
)  # fmt: skip
def test_labels_that_may_be_one_are_reported(
    tmp_path: Path, labels: tuple[str, ...], pairs: list[tuple[str, str]]
) -> None:
    assert [tuple(sorted(p)) for p in alike_labels(labels)] == [tuple(sorted(p)) for p in pairs]
    rows = [
        {"prompt": f"text {i} {label} {i * 7919}", "completion": label} for i in range(10) for label in labels
    ]
    result = check_file(jsonl(tmp_path / "d.jsonl", rows))
    # Two Unicode forms of one label are one class, as for tune.
    told = any(unicodedata.normalize("NFC", a) != unicodedata.normalize("NFC", b) for a, b in pairs)
    assert any("pairs of labels that may be one" in w for w in result["warnings"]) == told


def test_banking77_has_no_labels_that_may_be_one(banking: list[dict[str, str]]) -> None:
    assert alike_labels(sorted({r["completion"] for r in banking})) == []


def test_labels_that_may_be_missing_values_are_reported(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"text {i} {i * 7919}", "completion": ("None", "yes", "none")[i % 3]} for i in range(60)
    ]
    (warning,) = [
        w for w in check_file(jsonl(tmp_path / "d.jsonl", rows))["warnings"] if "missing values" in w
    ]
    assert "`None`" in warning and "`none`" not in warning


def test_a_constant_field_of_json_answers_hides_no_contradiction(tmp_path: Path) -> None:
    """The label's field is not guessed: `currency` has the fewest values and tells nothing."""
    rows = [
        {
            "prompt": f"Invoice {i} of the office in {town}",
            "completion": json.dumps({"currency": "USD", "total": t}),
        }
        for i, town in enumerate(("Bonn", "Lyon", "Oslo", "Graz"))
        for t in (f"{i}.00", f"{i}.50")
    ]
    found = check_file(jsonl(tmp_path / "data.jsonl", rows))
    assert found["labels"] is None and found["contradictions"]["total"] >= 4
    assert any("--answer-field" in text for text in found["warnings"])
    named = check_file(tmp_path / "data.jsonl", field="currency")
    assert named["labels"]["counts"] == {"USD": 8} and named["contradictions"]["total"] == 0


def test_an_answer_in_two_unicode_forms_is_one_answer(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Where is the Café Zoë in Köln?", "completion": text} for text in ("Köln", "Ko\u0308ln")
    ]
    rows += [{"prompt": "Where is the Cafe\u0301 Zoe\u0308 in Ko\u0308ln?", "completion": "Köln"}]
    found = check_file(jsonl(tmp_path / "data.jsonl", rows))
    assert found["contradictions"]["total"] == 0
    assert found["duplicates"]["exact_rows"] == 2
