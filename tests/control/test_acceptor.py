"""Accepting without a descriptor left."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

from vmf.control import sockets


def test_a_connection_is_told_that_no_descriptor_is_left(tmp_path: Path) -> None:
    acceptor = sockets.Acceptor(sockets.listen(tmp_path / "s"))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    clients = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for client in clients:
        client.connect(str(tmp_path / "s"))
    try:
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        fillers = [os.dup(0) for _ in range(highest)]  # no gap is left below
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(fillers) + 1, before[1]))
        for _ in range(2):
            connection, reason, remedy = acceptor.accept(0)
            assert connection is not None
            assert "too few file descriptors" in reason
            assert "ulimit -n" in remedy
            connection.close()
            acceptor.refill()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for filler in fillers:
            os.close(filler)
    connection, reason, _ = acceptor.accept(0)
    assert connection is not None
    assert not reason
    connection.close()
    acceptor.close()
    for client in clients:
        client.close()
