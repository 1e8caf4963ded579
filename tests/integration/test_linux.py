"""An unmodified Debian kernel: boots, answers, teleports, resets, switches itself off."""

from __future__ import annotations

import random
import re
import time

import pytest

from vmf.control.sockets import connect
from vmf.machine.config import MachineConfig
from vmf.testing.hosts import Host
from vmf.testing.serial_check import check

pytestmark = pytest.mark.linux

HOPS = 6


def type_at(host: Host, text: str) -> None:
    with connect(host.home.paths("box").console_socket, 10) as console:
        console.sendall(text.encode())
        time.sleep(0.2)


def test_a_shell_answers_typed_input_and_goes_on_after_a_teleport(
    hosts: tuple[Host, Host], shell: MachineConfig
) -> None:
    source, target = hosts
    for host in hosts:
        host.define(shell)
    source.start("box")
    source.wait_for_output("box", b"vmf#")
    type_at(source, "echo $((6 * 7))-there; cat /proc/cpuinfo; left=behind\n")
    source.wait_for_output("box", b"42-there")
    assert b"lm" in source.wait_for_output("box", b"flags")

    port = target.wait("box")
    with source.client("box") as client:
        client.teleport("127.0.0.1", port)
    type_at(target, "echo $left-$((2 * 3))\n")
    target.wait_for_output("box", b"behind-6")

    type_at(target, "date +now=%s.\n")
    stamps = re.findall(rb"\nnow=(\d+)", target.wait_for_output("box", b"\nnow="))
    assert abs(int(stamps[-1]) - time.time()) < 3, "the guest's wall clock is wrong after the teleport"

    type_at(target, "reboot -f\n")
    target.wait_for_output("box", b"vmf: init is running", 120)
    type_at(target, "poweroff -f\n")
    target.wait_gone("box", 60)
    assert target.state("box") == "poweredoff"


@pytest.mark.timeout(600)
def test_the_self_checking_guest_survives_teleports_at_random_instants(
    hosts: tuple[Host, Host], selfcheck: MachineConfig
) -> None:
    source, target = hosts
    for host in hosts:
        host.define(selfcheck)
    source.start("box")
    source.wait_for_output("box", b"tick 5 ", 120)
    output = b""
    for _ in range(HOPS):
        port = target.wait("box")
        time.sleep(random.random() / 2)
        with source.client("box") as client:
            client.teleport("127.0.0.1", port)
        source.wait_gone("box")
        output += source.output("box")
        source, target = target, source
    time.sleep(1.5)
    output += source.output("box")
    heard_at = time.time()
    report = check(output)
    assert report.problems == ()
    assert report.rounds > 0
    assert abs(report.clocks[-1][1] / 1e9 - heard_at) < 3, "the guest's wall clock is wrong after the teleports"
