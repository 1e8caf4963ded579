"""Addresses are what they say, before a transport is asked."""

from __future__ import annotations

from typing import Any

import pytest

from vmf.transport.base import Address


@pytest.mark.parametrize(("host", "port", "what"), [(None, 6000, "host"), ("here", "6000", "port")])
def test_a_wrong_type_is_refused_where_the_address_is_made(host: Any, port: Any, what: str) -> None:
    with pytest.raises(TypeError, match=what):
        Address("tcp", host, port)


def test_brackets_are_taken_off() -> None:
    assert str(Address("tcp", "[::1]", 1)) == "tcp:[::1]:1"
    assert Address("tcp", "[::1]", 1).host == "::1"
