"""Sizes as people write them: 4G, 512M, 1.5GiB; units are powers of 1024."""

from __future__ import annotations

import re

_UNITS = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*(?:([KMGT])(?:i?B)?|(B))?", re.IGNORECASE)


def parse(text: str, unit: str = "B") -> int | None:
    """Bytes, or None for what is no size (a fraction of a byte included).

    Args:
        unit: of a plain number: B, K, M, G or T.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        return None
    whole, _, fraction = found[1].partition(".")
    factor = _UNITS[(found[2] or found[3] or unit).upper()]
    bytes_, rest = divmod(int(whole + fraction) * factor, 10 ** len(fraction))
    return None if rest else bytes_
