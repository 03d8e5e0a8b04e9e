"""Varied strings for comparing tokenizers: digits, code, emoji, many scripts, whitespace runs, special tokens."""

from __future__ import annotations

import random
import string
import unicodedata

WORDS = [
    "contract",
    "clause",
    "liability",
    "Supplier",
    "shall",
    "not",
    "be",
    "liable",
    "for",
    "any",
    "indirect",
    "loss",
    "renewal",
    "notice",
    "e-mail",
    "don't",
    "we'll",
    "they've",
    "I'm",
    "it's",
    "you'd",
    "naïve",
    "façade",
    "Übergröße",
    "señor",
    "Łódź",
    "привет",
    "мир",
    "договор",
    "合同",
    "条款",
    "風險",
    "こんにちは",
    "안녕하세요",
    "مرحبا",
    "שלום",
    "नमस्ते",
    "def",
    "return",
    "lambda",
    "self.__init__",
    "x+=1",
    "!=",
    "===",
    "->",
    "/*",
    "*/",
    "//",
    "<div>",
    "</div>",
    "{{text}}",
    "${HOME}",
    "https://example.org/a?b=c&d=1#e",
    "$1,234.56",
    "€9.99",
    "10%",
    "3.14159",
    "1e-9",
    "0xFF",
    "2026-11-24",
    "12:34:56",
    "+44",
    "½",
    "²",
    "Ⅷ",
    "٣",
    "४",
    "١٢٣",
    "#1",
    "@user",
    "C++",
    "C#",
    ".NET",
]
EMOJI = "😀🎉👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇩🇪✅❗️➡️♥🧪"
CODE = (
    "for i in range(10):\n\tprint(f'{i:>3}')\n",
    "SELECT * FROM t WHERE a='b' AND c>=10;",
    '{"risk": "lock_in", "reason": "renews for 24 months"}',
    "#include <stdio.h>\r\nint main(void) { return 0; }\r\n",
    "<?xml version='1.0'?><a b=\"c\">&amp;</a>",
)
SPACES = (
    " ",
    "  ",
    "    ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    " \n ",
    "\u00a0",
    "\u3000",
    "\u200b",
    " \t\n",
    "\x0b",
    "\u2028",
)


def varied_strings(number: int, special: list[str], *, seed: int = 0) -> list[str]:
    """`number` distinct strings; every special token occurs alone, glued to words, and among spaces."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    for token in special:
        for text in (
            token,
            f"a{token}b",
            f" {token} ",
            f"{token}{token}",
            f"\n{token}\n",
            f"1{token}2",
            token[:-1],
        ):
            found[text] = None
    letters = [c for c in map(chr, range(0x20, 0x2FFF)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    makers = (
        lambda: " ".join(rng.choices(WORDS, k=rng.randint(1, 12))),
        lambda: "".join(rng.choices(string.digits + " .,-", k=rng.randint(1, 30))),
        lambda: "".join(rng.choices(string.printable, k=rng.randint(1, 40))),
        lambda: "".join(
            rng.choice(SPACES) * rng.randint(1, 4) + rng.choice(WORDS) for _ in range(rng.randint(1, 6))
        ),
        lambda: "".join(rng.choices(SPACES, k=rng.randint(1, 8))),
        lambda: rng.choice(CODE) * rng.randint(1, 2) + rng.choice(WORDS),
        lambda: "".join(rng.choices([*EMOJI, " ", "a", "1"], k=rng.randint(1, 15))),
        lambda: "".join(rng.choices(letters, k=rng.randint(1, 15))),
        lambda: (
            "".join(chr(rng.randint(0x4E00, 0x9FA5)) for _ in range(rng.randint(1, 20))) + rng.choice(WORDS)
        ),
        lambda: (
            rng.choice(special or [""]) + rng.choice(WORDS) + rng.choice(SPACES) + rng.choice(special or [""])
        ),
    )
    while len(found) < number:
        text = rng.choice(makers)()
        if text and "\x00" not in text:
            found[text] = None
    return list(found)[:number]
