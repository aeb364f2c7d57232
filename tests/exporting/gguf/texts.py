"""A thousand strings that tokenizers like to disagree on, made without chance."""

from __future__ import annotations

from itertools import cycle

WORDS = (
    "card", "Card's", "I'm", "WE'LL", "naïve", "Größe", "façade", "Ελλάδα", "Привет", "日本語のテキスト",
    "한국어", "العربية", "हिन्दी", "ไทย", "e\u0301", "ﬁne", "🙂", "👩\u200d👩\u200d👧", "🇩🇪", "x²", "½", "Ⅻ",
    "٣٤", "1", "42", "2024", "1,000,000", "3.14", "0x1F", "99%", "$5", "a_b", "fooBar", "don't", "Don’t",
    "“quoted”", "—", "…", "...", "???", "==", "->", "//", "/*x*/", "{}", "[i]", "\\n", "<b>", "&amp;",
    "http://x.y/z?a=1", "me@x.org", "\x00", "\x7f", "\u200b", "\ufeff", "\u00a0", "\U0001d518",
)  # fmt: skip
SPACES = (" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\t\t", "", "\u3000", " \u00a0 ")
MARKERS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>user\n", "<|im_end|>\n")
CODE = (
    "def f(x, *a):\n    return x**2 + a[0]  # 1st\n",
    "for (int i=0;i<10;++i){\n\tsum+=v[i];\n}\n",
    "SELECT a, b FROM t WHERE c >= '2024-01-01';",
    '{"key": [1, 2.5, null], "ü": "\\u00fc"}',
)


def strings(count: int = 1000) -> list[str]:
    """Pairs and runs of words, spaces, numbers, code and special tokens, each string once."""
    found: dict[str, None] = {}
    spaces, markers = cycle(SPACES), cycle(MARKERS)
    for left in WORDS:
        for right in WORDS[:14]:
            found[f"{left}{next(spaces)}{right}"] = None
    for index, word in enumerate(WORDS):
        for space in SPACES:
            found[f"{space}{word}{space}{index * 37}{space}"] = None
        found[f"{next(markers)}{word} {index}{next(markers)}"] = None
    for index, text in enumerate(CODE * 12):
        found[f"{text * (1 + index % 3)}{next(spaces)}{WORDS[index]}{next(markers)}"] = None
    for length in range(1, 40):
        found[" " * length + "x"] = None
        found["7" * length] = None
        found["\n" * length + "é" * length] = None
        found["ab " * length] = None
    texts = list(found)
    assert len(texts) >= count
    return [texts[index * len(texts) // count] for index in range(count)]
