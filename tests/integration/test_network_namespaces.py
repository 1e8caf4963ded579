"""The specification's procedure over TLS, and with a password, between two hosts that share nothing but a cable."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmf.machine.config import MachineConfig
from vmf.testing import network
from vmf.testing.network import NamespacedHost
from vmf.testing.serial_check import check

pytest.importorskip("vmf_transport_tls")
IMAGE_OPTIONS = ("--memory", "32", "--cpu-backend", "unicorn")
PORT = "6000"


@pytest.fixture
def networked(tmp_path: Path) -> Iterator[tuple[NamespacedHost, NamespacedHost]]:
    reason = network.missing()
    if reason:
        pytest.skip(reason)
    with network.two_networked_hosts(tmp_path) as hosts:
        yield hosts


def ok(host: NamespacedHost, *arguments: str) -> str:
    done = host.vmf(*arguments)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def refused(host: NamespacedHost, *arguments: str) -> str:
    """The one clear line."""
    done = host.vmf(*arguments)
    assert done.returncode != 0, done.stdout
    assert done.stderr.startswith("vmf: error: "), done.stderr
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_the_procedure_over_tls(
    networked: tuple[NamespacedHost, NamespacedHost], builtin: MachineConfig, tmp_path: Path
) -> None:
    source, target = networked
    for host, name in ((source, "sourcevmname"), (target, "targetvmname")):
        ok(host, "createvm", name, *IMAGE_OPTIONS, "--image", str(builtin.image))
    # Certificates: two commands, and the copy.
    ok(source, "tls", "init")
    ok(source, "tls", "issue", target.address, "--out", str(target.directory / "tls"))
    secret = tmp_path / "secret"
    secret.write_text("the cable is short\n")
    secret.chmod(0o600)

    # "On the target host, configure the virtual machine to wait for a teleport request to arrive when it is started"
    ok(target, "modifyvm", "targetvmname", "--teleporter", "on", "--teleporter-port", PORT)
    assert "neither TLS nor a password" in refused(target, "startvm", "targetvmname", "--detach")
    ok(target, "modifyvm", "targetvmname", "--teleporter-transport", "tls")
    ok(target, "modifyvm", "targetvmname", "--teleporter-password-file", str(secret))
    # "Start the VM on the target host. Instead of running, the VM shows ... that it is waiting"
    waiting = subprocess.Popen(
        target.command("startvm", "targetvmname"),
        env=target.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert waiting.stdout is not None
        line = waiting.stdout.readline()
        assert re.search(rf"waits for a teleport at tls:.*:{PORT}", line), line
        # "Start the VM on the source host as usual."
        ok(source, "startvm", "sourcevmname", "--detach")
        source.wait_for_output("sourcevmname", b"tick 3 ")
        to = ("controlvm", "sourcevmname", "teleport", "--host", target.address, "--port", PORT)
        protected = (*to, "--transport", "tls", "--password-file", str(secret))
        # The wrong ones first. There is nobody on the source's own loopback: it is another host.
        assert "nobody listens" in refused(source, *to[:4], "localhost", *to[5:], "--transport", "tls")
        assert "speaks TLS" in refused(source, *to)
        assert "asks for a password" in refused(source, *to, "--transport", "tls")
        assert "not for '10.0.0.1'" in refused(source, *protected, "--tls-hostname", "10.0.0.1")
        assert json.loads(ok(target, "showvminfo", "targetvmname", "--json"))["state"] == "teleportingin"
        source.wait_for_more("sourcevmname")
        # "When it is running and you want it to be teleported, issue the following command on the source host"
        assert "every check passed" in ok(source, *protected, "--check")
        assert "downtime" in ok(source, *protected)
        target.wait_for_more("targetvmname")
        source.wait_gone("sourcevmname")
        assert json.loads(ok(target, "showvminfo", "targetvmname", "--json"))["state"] == "running"
        assert json.loads(ok(source, "showvminfo", "sourcevmname", "--json"))["state"] == "teleported"
        assert check(source.output("sourcevmname") + target.output("targetvmname")).problems == ()
        ok(target, "controlvm", "targetvmname", "poweroff")
        assert waiting.wait(30) == 0
    finally:
        if waiting.poll() is None:
            waiting.kill()
        waiting.communicate()


def test_the_hosts_share_nothing_but_the_cable(networked: tuple[NamespacedHost, NamespacedHost]) -> None:
    """Or the test above would show little."""
    inner = [
        subprocess.run(
            ["ip", "netns", "exec", host.namespace, "ip", "-o", "address"], capture_output=True, text=True, check=True
        ).stdout
        for host in networked
    ]
    for host, seen in zip(networked, inner, strict=True):
        assert set(re.findall(r"inet (\S+)", seen)) == {"127.0.0.1/8", f"{host.address}/24"}
