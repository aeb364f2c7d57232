"""Seeded mutations of bytes, for where there is no coverage-guided fuzzer.

Flipped bits, numbers that break size checks, pieces dropped, doubled and taken from another input, the
end cut off. The same seed gives the same inputs.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

_EDGES = (
    0, 1, 2, 31, 63, 64, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63,
)  # fmt: skip
_WORDS = (
    b"null", b"-1", b"1e999", b"NaN", b"9" * 5000, b"[" * 2000, b"{}", b"[]", b'""', b"true", b"../", b"\0",
    b"\xff", b"\xed\xa0\x80", b"\\ud800", b"&a [*a]", b"{{ 'a' * 10**9 }}", b"{% for i in range(99999) %}",
    b"(a+)+$", b"1000000000", b"\n", b"<|im_end|>", b"assistant",
)  # fmt: skip


def mutated(seeds: list[bytes], count: int, seed: int, longest: int = 1 << 20) -> Iterator[bytes]:
    """`count` inputs, each a seed changed in one to eight places."""
    draw = random.Random(seed)
    for _ in range(count):
        data = bytearray(draw.choice(seeds))
        for _ in range(draw.choice((1, 1, 1, 2, 4, 8))):
            _change(data, draw, seeds)
        yield bytes(data[:longest])


def _change(data: bytearray, draw: random.Random, seeds: list[bytes]) -> None:
    # Most of a format stands at its beginning.
    size = len(data)
    at = int(size * draw.random() ** draw.choice((1, 3)))
    end = min(size, at + draw.choice((1, 2, 8, 64)))
    kind = draw.randrange(9)
    if kind == 0 and at < size:
        data[at] ^= 1 << draw.randrange(8)
    elif kind == 1 and at < size:
        data[at] = draw.randrange(256)
    elif kind == 2:
        width, form = draw.choice(((4, "<I"), (8, "<Q"), (4, ">I"), (2, "<H")))
        number = draw.choice(_EDGES) + draw.choice((-1, 0, 0, 1))
        data[at : at + width] = struct.pack(form, number % (1 << 8 * width))
    elif kind == 3:
        del data[at:end]
    elif kind == 4:
        data[at:at] = data[at:end] * draw.choice((1, 2, 100))
    elif kind == 5:
        del data[at:]
    elif kind == 6:
        data[at : at + draw.choice((0, 1, 4))] = draw.choice(_WORDS)
    elif kind == 7:
        other = draw.choice(seeds)
        start = draw.randrange(len(other) + 1)
        data[at:end] = other[start : start + draw.choice((4, 32, 256))]
    else:
        data[at:end] = draw.randbytes(end - at)
