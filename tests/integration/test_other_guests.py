"""Guests that are neither Linux nor flat images, as whole machines: a multiboot image and a bzImage entered as it is,
both of our own making; and memtest86+, which is a download and slow:

VMF_MEMTEST=1 pytest tests/integration/test_other_guests.py
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from vmf.control.sockets import connect
from vmf.machine.config import MachineConfig
from vmf.testing import guests
from vmf.testing.hosts import Host

# mov edx,0x3f8; l: lodsb; test al,al; jz +3; out dx,al; jmp l
_PRINT_STRING = bytes.fromhex("baf8030000 ac 84c0 7403 ee ebf8")
# mov al,'!'; out dx,al; l: mov edx,0x3fd; in al,dx; test al,1; jz l; mov edx,0x3f8; in al,dx; out dx,al; jmp l: what is
# typed comes back
_ECHO = bytes.fromhex("b021 ee bafd030000 ec a801 74f6 baf8030000 ec ee ebed")


def multiboot() -> bytes:
    """Prints its command line and its module, then what is typed."""
    # cmp eax,0x2badb002; jne $; mov esi,[ebx+16]
    code = bytes.fromhex("3d02b0ad2b 75fe 8b7310") + _PRINT_STRING
    # mov eax,[ebx+24]; mov ecx,[eax+4]; mov esi,[eax]; sub ecx,esi; rep outsb
    code += bytes.fromhex("8b4318 8b4804 8b30 29f1 f36e") + _ECHO
    body = struct.pack("<4I", 0x1BADB002, 3, -(0x1BADB002 + 3) & 0xFFFF_FFFF, 0) + code
    at = 0x10_0000
    elf = b"\x7fELF\1\1\1".ljust(16, b"\0")
    elf += struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, at + 16, 52, 0, 0, 52, 32, 1, 40, 0, 0)
    elf += struct.pack("<8I", 1, 0x1000, at, at, len(body), len(body), 7, 0x1000)
    return elf.ljust(0x1000, b"\0") + body


def bzimage() -> bytes:
    """Prints its command line, then what is typed; without a packed kernel, as memtest86+ is."""
    head = bytearray(3 * 512)
    head[0x1F1], head[0x1FE:0x200], head[0x200:0x206] = 2, b"\x55\xaa", b"\xeb\x6aHdrS"
    struct.pack_into("<H", head, 0x206, 0x20C)
    head[0x211] = 1
    struct.pack_into("<I", head, 0x22C, 0x7FFF_FFFF)
    struct.pack_into("<HI", head, 0x236, 1, 255)
    struct.pack_into("<QI", head, 0x258, 0x10_0000, 0x1_0000)
    code = bytes.fromhex("8bb628020000") + _PRINT_STRING + _ECHO  # mov esi,[rsi+0x228]
    return bytes(head) + bytes(0x200) + code


@pytest.mark.parametrize("kind", ["multiboot", "bzimage"])
def test_a_guest_starts_and_teleports(hosts: tuple[Host, Host], tmp_path: Path, kind: str) -> None:
    source, target = hosts
    kernel, initrd = tmp_path / "guest", tmp_path / "module"
    kernel.write_bytes(multiboot() if kind == "multiboot" else bzimage())
    initrd.write_bytes(b"<the module>")
    machine = MachineConfig(
        name="box", memory_mib=16, kernel=kernel, initrd=initrd, cmdline="one two=3", cpu_backend="unicorn"
    )
    for host in hosts:
        host.define(machine)
    source.start("box")
    printed = f"{kernel} one two=3<the module>!" if kind == "multiboot" else "one two=3!"
    source.wait_for_output("box", printed.encode())
    port = target.wait("box")
    with source.client("box") as client:
        client.teleport("127.0.0.1", port)
    with connect(target.home.paths("box").console_socket, 10) as console:
        console.sendall(b"typed")
    target.wait_for_output("box", b"typed")
    with target.client("box") as client:
        client.power_off()


@pytest.mark.timeout(900)
def test_memtest86_tests_memory_and_goes_on_after_a_teleport(hosts: tuple[Host, Host]) -> None:
    if not os.environ.get("VMF_MEMTEST"):
        pytest.skip("VMF_MEMTEST=1 fetches memtest86+ and runs it for some minutes")
    found = guests.memtest()
    if found.path is None:
        pytest.skip(found.reason)
    source, target = hosts
    for host in hosts:
        host.define(MachineConfig(name="box", memory_mib=64, kernel=found.path, cpu_backend="unicorn"))
    source.start("box")
    source.wait_for_output("box", b"Status: Testing", 600)
    port = target.wait("box")
    with source.client("box") as client:
        client.teleport("127.0.0.1", port)
    heard = target.wait_for_output("box", b"Status: Testing", 300)
    assert b"Errors: 0 " in heard
    with target.client("box") as client:
        client.power_off()
