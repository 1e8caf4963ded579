"""Where sparse files have data: against a model, on real files, and where the system cannot tell."""

from __future__ import annotations

import os
import tempfile
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from vmf.storage import sparse

PAGE = 4096
LAYOUT = st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 40), st.booleans()), max_size=6)
"""Pages: first, count, and whether they are zeroes that were written."""


def made(layout: list[tuple[int, int, bool]], size: int) -> tuple[int, bytearray]:
    """A file, unlinked, and what is in it."""
    descriptor, path = tempfile.mkstemp()
    os.unlink(path)
    os.ftruncate(descriptor, size)
    content = bytearray(size)
    for first, count, zeroes in layout:
        end = min((first + count) * PAGE, size)
        data = bytes(max(0, end - first * PAGE)) if zeroes else os.urandom(max(0, end - first * PAGE))
        if data:
            os.pwrite(descriptor, data, first * PAGE)
            content[first * PAGE : end] = data
    return descriptor, content


@given(LAYOUT, st.integers(1, 3100))
def test_chunks_cover_everything_and_the_digest_knows_no_holes(layout: list[tuple[int, int, bool]], pages: int) -> None:
    size = pages * PAGE
    sparsely, content = made(layout, size)
    densely, _ = made([(0, pages, True)], size)
    try:
        os.pwrite(densely, content, 0)
        found = list(sparse.chunks(sparsely, size))
        assert found[0][0] == 0
        assert found[-1][0] + found[-1][1] == size
        assert all(at + length == following for (at, length, _), (following, _, _) in pairwise(found))
        for at, length, data in found:
            assert data or not any(content[at : at + length])
            assert not data or at % sparse.CHUNK == 0
            assert not data or length <= sparse.CHUNK
        assert sparse.digest(sparsely, size) == sparse.digest(densely, size)
        before = sparse.digest(sparsely, size)
        os.pwrite(sparsely, bytes([content[-1] ^ 1]), size - 1)
        assert sparse.digest(sparsely, size) != before
    finally:
        os.close(sparsely)
        os.close(densely)
