"""A Linux guest whose handover is cut: it goes on where somebody decides, and notices nothing but a pause."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmf.errors import TeleportUncertain
from vmf.machine.config import MachineConfig
from vmf.testing import guests
from vmf.testing.faults import Fault, FaultProxy
from vmf.testing.hosts import Host
from vmf.testing.serial_check import check

pytestmark = pytest.mark.linux


@pytest.fixture
def selfcheck() -> MachineConfig:
    """A machine with Debian's kernel and the self-checking program."""
    try:
        guest = guests.selfcheck_guest("run -m 8 -r 32 -t 20")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return MachineConfig(
        name="box",
        memory_mib=128,
        kernel=guest.kernel,
        initrd=guest.initrd,
        cmdline=f"{guest.cmdline} loglevel=5",
        cpu_backend="unicorn",
    )


def test_linux_comes_back_and_then_leaves(tmp_path: Path, selfcheck: MachineConfig) -> None:
    """First HANDOVER is lost and the guest resumes at the source; then RUNNING, and it goes on at the target."""
    with Host(tmp_path / "source") as source, Host(tmp_path / "target") as target:
        for host in (source, target):
            host.define(selfcheck)
        source.start("box")
        port = target.wait("box")
        source.wait_for_output("box", b"tick 20 ", timeout=120)
        with FaultProxy(port, Fault("cut", "HANDOVER")) as proxy, source.client("box") as client:
            with pytest.raises(TeleportUncertain):
                client.teleport("127.0.0.1", proxy.port)
            stood = source.output("box")
            assert client.teleport_status(ask=True)["doubt"]["answer"] == "never"
            assert source.output("box") == stood, "an uncertain guest printed"
            assert "goes on here" in client.resolve_teleport("resume")
        source.wait_for_more("box")
        target.wait_for_state("box", "teleportingin")
        with FaultProxy(port, Fault("cut", "RUNNING")) as proxy, source.client("box") as client:
            with pytest.raises(TeleportUncertain):
                client.teleport("127.0.0.1", proxy.port)
            assert client.teleport_status(ask=True)["doubt"]["answer"] == "runs"
            client.resolve_teleport("discard")
        source.wait_gone("box")
        for _ in range(5):
            target.wait_for_more("box")
        report = check(source.output("box") + target.output("box"), whole=False)
        assert report.problems == ()
