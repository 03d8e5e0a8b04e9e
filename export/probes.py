"""Strings on which two tokenizers disagree if they disagree at all: digits, spaces, code, scripts, emoji, specials."""

from __future__ import annotations

import random
from collections.abc import Sequence

PARTS = (
    "the", "The", "THE", " contract", "Clause", "don't", "WE'LL", "I'm", "naïve", "Übergröße", "Łódź", "привет",
    "договор", "合同", "条款", "こんにちは", "안녕하세요", "مرحبا", "שלום", "नमस्ते",
    "🙂", "👩‍💻", "🇫🇷", "0", "7", "42", "2024", "1,234.56", "3.14159", "10^-3", "0x1F",
    " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\t\t", " \n ", "\u00a0", "\u3000",
    ".", "...", ",", ";", ":", "!", "?!", "-", "—", "(", ")", "[", "]", "{", "}", "{{x}}", "<", ">", "<b>", "</b>",
    "&amp;", "/", "\\", "//", "==", "!=", "->", "=>", "+=", "self.__init__", "def f(x):", "return", "lambda",
    "SELECT *", "$100", "€5", "50%", "#1", "@me", "a@b.co", "https://x.org/a?b=1&c=2", "'", '"', "``", "`x`",
    "_", "__", "snake_case", "camelCase", "e\u0301", "ﬁ", "Ω", "½", "²", "\u200b", "\u200d", "ſ", "İ", "ß",
)  # fmt: skip


def probe_strings(special: Sequence[str], count: int = 600, seed: int = 7) -> list[str]:
    """`count` fixed strings joined from awkward parts, each special token among and beside them."""
    generator = random.Random(seed)
    strings = [*PARTS, *special]
    for token in special:
        left, right = generator.choice(PARTS), generator.choice(PARTS)
        strings += [f"{left}{token}{right}", f"{token}{token}", f"{left} {token} {right}"]
    while len(strings) < count:
        length = generator.randint(2, 12)
        glue = generator.choice(("", " ", ""))
        strings.append(glue.join(generator.choice(PARTS) for _ in range(length)))
    return strings
