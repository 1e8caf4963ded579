"""The neutral vCPU state as plain data: lossless, and strict on the way in."""

from __future__ import annotations

import copy
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmf.cpu import codec
from vmf.cpu.state import (
    GENERAL_REGISTERS,
    REQUIRED_MSRS,
    SEGMENT_NAMES,
    XSAVE_MIN_SIZE,
    DescriptorTable,
    PendingEvents,
    Segment,
    VcpuState,
)
from vmf.errors import StateError

u16, u32, u64 = (st.integers(0, (1 << width) - 1) for width in (16, 32, 64))
segments = st.builds(Segment, u16, u64, u32, st.integers(0, (1 << 17) - 1))
tables = st.builds(DescriptorTable, u64, u16)
vectors = st.none() | st.integers(0, 255)
states = st.builds(
    VcpuState,
    registers=st.fixed_dictionaries(dict.fromkeys(GENERAL_REGISTERS, u64)),
    rip=u64,
    rflags=u64,
    segments=st.fixed_dictionaries(dict.fromkeys(SEGMENT_NAMES, segments)),
    ldtr=segments,
    tr=segments,
    gdtr=tables,
    idtr=tables,
    cr0=u64,
    cr2=u64,
    cr3=u64,
    cr4=u64,
    cr8=st.integers(0, 15),
    xcr0=u64,
    efer=u64,
    dr=st.tuples(u64, u64, u64, u64, u64, u64),
    msrs=st.builds(
        lambda required, more: {**more, **required},
        st.fixed_dictionaries(dict.fromkeys(sorted(REQUIRED_MSRS), u64)),
        st.dictionaries(u32, u64, max_size=5),
    ),
    xsave=st.binary(min_size=XSAVE_MIN_SIZE, max_size=XSAVE_MIN_SIZE + 256),
    events=st.builds(
        PendingEvents,
        vectors,
        st.none() | u32,
        st.none() | u64,
        vectors,
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.sampled_from((0, 1, 2)),
    ),
    halted=st.booleans(),
    tsc=u64,
    tsc_khz=u32,
)


@given(states)
def test_a_state_survives_the_wire_bit_for_bit(state: VcpuState) -> None:
    assert codec.from_plain(cbor2.loads(cbor2.dumps(codec.to_plain(state)))) == state


def fresh() -> dict[str, Any]:
    return codec.to_plain(VcpuState(registers=dict.fromkeys(GENERAL_REGISTERS, 0)))


@pytest.mark.parametrize("name", sorted(fresh()))
def test_a_missing_field_is_refused(name: str) -> None:
    body = fresh()
    del body[name]
    with pytest.raises(StateError):
        codec.from_plain(body)


def test_a_leftover_field_is_refused() -> None:
    with pytest.raises(StateError):
        codec.from_plain({**fresh(), "extra": 1})


@given(st.sampled_from(sorted(fresh())), st.none() | st.booleans() | st.text(max_size=3) | st.just([1]) | st.just(-1))
def test_a_field_of_another_type_is_refused(name: str, value: Any) -> None:
    body = copy.deepcopy(fresh())
    if name == "halted" and isinstance(value, bool):
        return
    body[name] = value
    with pytest.raises(StateError):
        codec.from_plain(body)


def test_an_msr_twice_is_refused() -> None:
    body = fresh()
    body["msrs"] += [body["msrs"][0]]
    with pytest.raises(StateError, match="twice"):
        codec.from_plain(body)
