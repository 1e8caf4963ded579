"""A real machine on the Unicorn engine: hostile descriptions and hostile states."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import attrs

from fuzzing import Choices, Finding, Target
from fuzzing.edits import edited
from vmf.errors import VmfError
from vmf.machine.config import MachineConfig
from vmf.machine.machine import Machine
from vmf.machine.teleport_view import TeleportView
from vmf.plugins import PluginRegistry
from vmf.teleport.protocol import codec
from vmf.testing.guests import builtin_guest


@functools.cache
def _machine() -> Machine:
    """Paused after some of its guest has run."""
    config = MachineConfig(
        name="fuzz",
        memory_mib=16,
        image=builtin_guest(),
        cpu_backend="unicorn",
        devices=("pc", "virtio"),
        device_options={"virtio": {"console": True}},
    )
    machine = Machine(config, PluginRegistry())
    machine.start()
    machine.pause()
    return machine


@functools.cache
def _saved() -> tuple[Any, ...]:
    return tuple(_machine().hardware.save())


@functools.cache
def _description() -> dict[str, Any]:
    return codec.decode(codec.encode(dict(TeleportView(_machine()).describe())))


def description(data: bytes) -> None:
    """A machine's description, edited: blockers in words, or VmfError."""
    choices = Choices(data)
    told = edited(_description(), choices, 6)
    if not isinstance(told, dict):
        return
    try:
        codec.encode(told)
    except ValueError:
        return  # it cannot come over the wire
    try:
        blockers = TeleportView(_machine()).check(told)
    except VmfError:
        return
    for blocker in blockers:
        if not str(blocker).isprintable():
            raise Finding(f"a blocker repeats what came: {blocker!r}")


def states(data: bytes) -> None:
    """The whole saved state, edited, into the devices and the engine."""
    choices = Choices(data)
    saved = list(_saved())
    for _ in range(1 + choices.number() % 3):
        number = choices.number() % len(saved)
        body = edited(dict(saved[number].body), choices, 3)
        if isinstance(body, dict):
            saved[number] = attrs.evolve(saved[number], body=body)
    try:
        codec.encode([dict(payload.body) for payload in saved])
    except ValueError:
        return
    hardware = _machine().hardware
    try:
        hardware.restore(saved)
    except VmfError as error:
        if not str(error).isprintable():
            raise Finding(f"an error repeats what came: {error!r}") from None
        return
    hardware.save()


def description_seeds() -> Iterator[bytes]:
    yield b""
    for edit in range(1, 50):
        yield bytes([1 + edit % 4, 1, edit, 0, 2, edit % 12, edit * 11 % 256, 1, edit, 0, 3, 2, 9])


def states_seeds() -> Iterator[bytes]:
    for number in range(len(_saved())):
        for edit in range(1, 12):
            yield bytes([0, number, 1, 1, edit, 0, 1, edit, 0, 2, edit % 12, edit * 11 % 256, 3, 2, 9])


TARGETS = (
    Target("description", description, description_seeds, 128, 1.0),
    Target("states", states, states_seeds, 256, 1.0),
)
