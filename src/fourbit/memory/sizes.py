"""Sizes of memory as people write and read them: GB is 10^9 bytes, GiB is 2^30."""

from __future__ import annotations

import re

from fourbit.errors import ConfigError

_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_size(text: str) -> int:
    """Bytes of "24GB", "900 MB", "1.5GiB" or a plain number of bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None or float(match.group(1)) == 0:
        raise ConfigError(
            f"memory = '{text}': write a size such as 24GB or 900MB (powers of ten), or 8GiB (of two)"
        )
    return round(float(match.group(1)) * unit)


def size_text(count: int) -> str:
    """Three or more digits in MB below a gigabyte, else GB with two decimals."""
    return f"{count / 1e6:,.0f} MB" if abs(count) < 10**9 else f"{count / 1e9:,.2f} GB"
