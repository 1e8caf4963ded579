"""A TLS peer on a plain channel is recognised by its first bytes."""

from __future__ import annotations

import pytest

from vmf.errors import RemoteProtocolError
from vmf.teleport.protocol.frames import HEADER_SIZE, decode_header


@pytest.mark.parametrize("start", [b"\x16\x03\x01\x02\x00\x01\x00", b"\x15\x03\x03\x00\x02\x02\x46"])
def test_tls_is_named(start: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="speaks TLS") as caught:
        decode_header(start.ljust(HEADER_SIZE, b"\xff"), {})
    assert "--transport tls" in caught.value.remedy


def test_other_noise_is_not_called_tls() -> None:
    with pytest.raises(RemoteProtocolError, match="does not speak vmf's"):
        decode_header(b"\x16\x04\x01\x02".ljust(HEADER_SIZE, b"\xff"), {})
