"""Replayed output holds no question to a terminal, and everything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmf.control.terminal_queries import without_queries

QUERIES = [
    b"\x05", b"\x1bZ", b"\x1b[c", b"\x1b[0c", b"\x1b[>c", b"\x1b[=c", b"\x1b[5n", b"\x1b[6n", b"\x1b[?6n",
    b"\x1b[?15n", b"\x1b[?25$p", b"\x1b[4$p", b"\x1b[>q", b"\x1b[>0q", b"\x1b[x", b"\x1b[1x", b"\x1b[?u",
    b"\x1b[?4m", b"\x1b[?2;1;0S", b"\x1b[14t", b"\x1b[18t", b"\x1b[21t", b"\x1b[14;2t", b"\x1b[1$w",
    b"\x1b[1;1;1;1;2;2*y", b"\x1bP$qm\x1b\\", b"\x1bP+q544e\x1b\\", b"\x1b]10;?\x07", b"\x1b]11;?\x1b\\",
    b"\x1b]4;1;?\x07", b"\x1b]4;1;?;2;?\x07", b"\x1b]52;c;?\x07",
    b"\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\", b"\x9b6n", b"\xc2\x9b6n",
]  # fmt: skip
KEPT = [
    b"text\r\n", b"\x1b[1;31m", b"\x1b[2J", b"\x1b[10;20H", b"\x1b[?25h", b"\x1b[?1049l", b"\x1b[22;0t",
    b"\x1b[8;24;80t", b"\x1b]0;title?\x07", b"\x1b]8;;http://x/?q=1\x07", b"\x1b(B",
    b"\xc3\xa9 \xe4\xb8\xad \xe2\x97\x9b", b"\x1b[3q", b"\x1b[s\x1b[u", b"\x1b[4S", b"?", b"6n",
]  # fmt: skip


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_goes_and_its_surroundings_stay(query: bytes) -> None:
    assert without_queries(b"before " + query + b" after") == b"before  after"


@pytest.mark.parametrize("output", KEPT)
def test_what_a_terminal_does_not_answer_stays(output: bytes) -> None:
    assert without_queries(b"before " + output + b" after") == b"before " + output + b" after"


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 100)), max_size=50))
def test_mixtures(picks: list[tuple[bool, int]]) -> None:
    pieces = [(query, (QUERIES[:-2] if query else KEPT)) for query, _ in picks]
    chosen = [(query, pool[at % len(pool)]) for (query, pool), (_, at) in zip(pieces, picks, strict=True)]
    kept = b"".join(piece for query, piece in chosen if not query)
    assert without_queries(b"".join(piece for _, piece in chosen)) == kept
