"""Saving and restoring: a restored machine answers every access as the saved one does; bad states change nothing."""

from __future__ import annotations

import copy
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmf.device.base import Payload
from vmf.errors import StateError
from vmf_device_pc import plugin

PORTS = [
    0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x70, 0x71,
    *range(0x3F8, 0x400), 0x60, 0x64, 0x92, 0xCF9,
]  # fmt: skip

accesses = st.lists(
    st.one_of(
        st.tuples(st.just("out"), st.sampled_from(PORTS), st.integers(0, 255)),
        st.tuples(st.just("cmos"), st.sampled_from([0, 1, 3, 4, 5, 9, 0x0A, 0x0B, 0x0B, 0x0C]), st.integers(0, 255)),
        st.tuples(st.just("in"), st.sampled_from(PORTS), st.just(0)),
        st.tuples(st.just("time"), st.integers(0, 3 * 10**9), st.just(0)),
        st.tuples(st.just("type"), st.integers(0, 40), st.integers(0, 255)),
        st.tuples(st.just("take"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


def play(pc: Any, steps: list[tuple[str, int, int]]) -> list[Any]:
    """Do the accesses; everything that could be seen."""
    seen: list[Any] = []
    for what, where, value in steps:
        if what == "out":
            pc.outb(where, value)
        elif what == "cmos":
            seen.append(pc.cmos_read(where))
            pc.cmos_write(where, value)
        elif what == "in":
            seen.append(pc.inb(where))
        elif what == "time":
            if where < 10**8:
                pc.run_for(where)
            else:
                pc.advance(where)
        elif what == "type":
            seen.append(pc.uart.serial_input(bytes([value]) * where))
        elif pc.pic.pending():
            seen.append(pc.pic.acknowledge())
        seen.append(pc.pic.pending())
    pc.uart.flush()
    seen.append(b"".join(pc.output))
    return [*seen, *pc.requests, [device.save() for device in pc.devices]]


@settings(max_examples=300, deadline=None)
@given(before=accesses, after=accesses, order=st.permutations(range(5)))
def test_a_restored_machine_goes_on_as_the_saved_one(
    make_pc: Any, before: list[Any], after: list[Any], order: list[int]
) -> None:
    first, second = make_pc(), make_pc()
    play(first, before)
    play(second, after)  # whatever the target was before
    saved = [device.save() for device in first.devices]
    second.clock.set(first.clock.now())
    for index in order:
        second.devices[index].restore(copy.deepcopy(saved[index]))
    assert [device.save() for device in second.devices] == saved
    for pc in (first, second):
        pc.output.clear()
        pc.requests.clear()
    assert play(second, after) == play(first, after)


def mutations(payload: Payload) -> list[Payload]:
    """Ways in which a payload can be wrong."""
    body = dict(payload.body)
    wrong = [
        attrs.evolve(payload, kind="pc.other"),
        attrs.evolve(payload, version=payload.version + 1),
        attrs.evolve(payload, version=0),
        attrs.evolve(payload, body={**body, "surplus": 0}),
        attrs.evolve(payload, body={}),
    ]
    for name in body:
        wrong.append(attrs.evolve(payload, body={key: body[key] for key in body if key != name}))
        values = (-1 << 80, 1 << 80, 1.5, "text", b"x" * 100_000, [0] * 99, {"a": 1}, [None] * 3)
        wrong += [attrs.evolve(payload, body={**body, name: value}) for value in values]
    return wrong


@pytest.mark.parametrize("index", range(5))
def test_wrong_states_are_refused_and_change_nothing(pc: Any, index: int) -> None:
    pc.init_pics()
    pc.outb(0x43, 0x34)
    pc.outb(0x40, 1, 2)
    pc.uart.serial_input(b"abc")
    device = pc.devices[index]
    before = device.save()
    for wrong in mutations(before):
        with pytest.raises(StateError, match=r"pc\."):
            device.restore(wrong)
        assert device.save() == before
    device.restore(before)


@pytest.mark.parametrize(
    ("index", "change"),
    [
        (0, lambda body: body["master"].update(elcr=0x01)),
        (0, lambda body: body["slave"].update(vector_base=0x31)),
        (0, lambda body: body["slave"].pop("irr")),
        (1, lambda body: body["channels"][0].update(gate=False)),
        (1, lambda body: body["channels"].pop()),
        (2, lambda body: body.update(fcr=0, fifo=b"ab")),
        (3, lambda body: body.update(frozen=5)),
        (3, lambda body: body.update(memory=bytes(128))),
    ],
)
def test_states_that_the_chip_does_not_have_are_refused(pc: Any, index: int, change: Any) -> None:
    payload = pc.devices[index].save()
    body = copy.deepcopy(dict(payload.body))
    change(body)
    with pytest.raises(StateError):
        pc.devices[index].restore(attrs.evolve(payload, body=body))
    assert pc.devices[index].save() == payload


def test_reset_gives_the_power_on_state(pc: Any, make_pc: Any) -> None:
    fresh = [device.save() for device in make_pc().devices]
    play(pc, [("out", port, 0x35) for port in PORTS if port not in (0x71,)])
    for device in pc.devices:
        device.reset()
    assert [device.save() for device in pc.devices if device.kind != "pc.cmos"] == [
        payload for payload in fresh if payload.kind != "pc.cmos"
    ]
    assert not pc.pic.pending()


def test_payloads_are_plain_data(pc: Any) -> None:
    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or type(value) in (bool, int, str, bytes)

    for device in pc.devices:
        assert plain(dict(device.save().body)), device.kind


def test_the_plugin_makes_the_interrupt_controller_first(make_pc: Any) -> None:
    from vmf.machine.bus import Bus

    pc = make_pc()
    devices = plugin.vmf_create_device(attrs.evolve(pc.environment, bus=Bus()))
    assert [device.kind for device in devices] == [device.kind for device in pc.devices]
    assert plugin.vmf_api_version == 1
