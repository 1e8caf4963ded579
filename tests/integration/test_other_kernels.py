"""Other kernels than Debian's cloud one: boot to a shell and teleport. They are big downloads, so they are named:

VMF_KERNELS="linux-image-amd64 linux-image-6.12.107+deb12-amd64-unsigned" pytest tests/integration/test_other_kernels.py
"""

from __future__ import annotations

import os
import re

import pytest
from attrs import evolve

from vmf.control.sockets import connect
from vmf.machine.config import MachineConfig
from vmf.testing import guests
from vmf.testing.hosts import Host

pytestmark = pytest.mark.linux

PACKAGES = os.environ.get("VMF_KERNELS", "").split()


@pytest.mark.parametrize("package", PACKAGES or [""])
def test_a_kernel_boots_to_a_shell_and_teleports(hosts: tuple[Host, Host], shell: MachineConfig, package: str) -> None:
    if not package:
        pytest.skip('VMF_KERNELS names no packages; VMF_KERNELS="linux-image-amd64", say, fetches 70 MB')
    kernel = guests.kernel_of(package)
    if kernel.path is None:
        pytest.skip(kernel.reason)
    source, target = hosts
    for host in hosts:
        host.define(evolve(shell, kernel=kernel.path, memory_mib=256))
    source.start("box")
    source.wait_for_output("box", b"vmf#", 200)
    _type(source, "echo version-$(uname -r).; left=behind\n")
    version = re.search(rb"version-(\d\S+)\.", source.wait_for_output("box", b".\r\nvmf#"))
    assert version is not None
    port = target.wait("box")
    with source.client("box") as client:
        client.teleport("127.0.0.1", port)
    _type(target, "echo $left-$(uname -r).\n")
    target.wait_for_output("box", b"behind-" + version[1] + b".")
    _type(target, "poweroff -f\n")
    target.wait_gone("box", 60)


def _type(host: Host, text: str) -> None:
    with connect(host.home.paths("box").console_socket, 10) as console:
        console.sendall(text.encode())
