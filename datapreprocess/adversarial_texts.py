"""Texts that are difficult to tokenize: a fixed sample, and any number of random texts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

# Each fragment was encoded wrongly by some tokenizer: letters of many scripts, combining marks, control characters,
# joined characters, code and numbers.
_FRAGMENTS = (
    " ", "  ", "\n", "\n\n", "\r", "\r\n", "\t", "\v", "\f", " \n", "\n ", " " * 5, " " * 23, " " * 24, " " * 25, "a",
    "The", "the", "I'm", "don't", "'s", "'ll", "'LL", "\u2019s", "'", "_", "-", "--", "...", "!!!", "###", "1", "12",
    "1234567", "3.14", "1,000", "²", "Ⅷ", "½", "٣", "\u09ea", "def f(x):\n    return x", "for (;;) {\n\t}\n",
    "a_b.c->d", "<p>&amp;</p>", "http://x.y/z?a=b&c=d#e", "C:\\x\\y", "\\u00e9", "é", "e\u0301", "Å", "A\u030a",
    "\u212b", "ﬁ", "q\u0307\u0323", "q\u0323\u0307", "\u0344", "\u0345", "\u0958", "\u1e9b\u0323", "한국어",
    "\u1112\u1161\u11ab", "\u1100", "日本語", "中文。", "ไทย", "नमस्ते", "שלום", "مرحبا", "ελληνικά", "Русский", "\u017f",
    "ß", "İ", "\u0131", "ǆ", "ﬀ", "\u00a0", "\u00ad", "\u200b", "\u200d", "\u200e", "\u2028", "\u2029", "\u3000",
    "\ufeff", "\u0085", "\u180e", "\x00", "\x01", "\x1c", "\x7f", "\x80", "\ufffd", "\ufffe", "\uffff", "\ue000", "😀",
    "👍🏽", "👩‍👩‍👧", "❤️", "\U0001f1e9\U0001f1ea", "\U0001d518", "𐍈", "𠀀", "\U000e0001", "\U0010ffff", "▁", "▁▁a", "Ġ",
    "Ċ", "<0x0A>", "##ing", "</w>", "<s>", "</s>", "<unk>", "<|endoftext|>", "[CLS]",
)  # fmt: skip
_RUN_LENGTHS = (1, 2, 3, 4, 7, 8, 15, 16, 17, 24, 25, 31, 48, 64, 100, 255, 256, 257, 1000)
_RUNS = (" ", "\n", "\t", "\r\n", "a", "e", "A", "0", "=", "-", ".", "\u0301", "é", "日", "😀", "\x00", "ab", "▁")


def fixed_sample(added_tokens: Sequence[str] = ()) -> list[str]:
    """Return a fixed sample of a few thousand short texts, and texts around `added_tokens`."""
    fragments = [*_FRAGMENTS, *added_tokens]
    texts = ["", *fragments]
    texts += [unit * count for unit in _RUNS for count in _RUN_LENGTHS]
    texts += [f"x{unit * count}y" for unit in _RUNS for count in _RUN_LENGTHS[:12]]
    texts += [f"{before}{fragment}{after}" for fragment in fragments for before, after in ((" ", ""), ("a", " b"))]
    texts += ["\ufeff" + "word " * 50, "Pneumono" * 500, "x" * 5000, "9" * 2000]
    # All characters below U+3200, which include most letters and marks of Europe and Asia, and some of every plane.
    texts += ["".join(map(chr, range(first, first + 64))) for first in range(0, 0x3200, 64)]
    texts += [chr(plane << 16 | low) + "a" for plane in range(17) for low in (0x30, 0x301, 0x4E00, 0xF900, 0xFFFF)]
    texts += random_texts(200, seed=0, added_tokens=added_tokens)
    return texts


def random_texts(count: int, seed: int, added_tokens: Sequence[str] = ()) -> Iterator[str]:
    """Yield `count` texts that depend only on the arguments: random characters, fragments, repetitions and mixtures."""
    random_ = random.Random(seed)
    fragments = [*_FRAGMENTS, *added_tokens]
    for _ in range(count):
        kind, length = random_.randrange(4), random_.randrange(1, 40)
        if kind == 0:
            yield "".join(_character(random_) for _ in range(length))
        elif kind == 1:
            yield "".join(random_.choices(fragments, k=length))
        elif kind == 2:
            yield "".join(
                random_.choice(fragments) if random_.random() < 0.5 else _character(random_) for _ in range(length)
            )
        else:
            yield random_.choice(fragments) * random_.randrange(1, 200) + random_.choice(fragments)


def _character(random_: random.Random) -> str:
    """Return a character below U+0080, U+0800, U+10000 or U+110000 (equally likely limits); never a surrogate."""
    code = random_.randrange(random_.choice((0x80, 0x800, 0x10000, 0x110000)))
    return chr(code if not 0xD800 <= code < 0xE000 else code - 0x800)
