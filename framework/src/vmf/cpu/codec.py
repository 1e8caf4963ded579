"""The neutral vCPU state as plain data (for the wire and for snapshots) and back.

Strict on the way in: a missing, leftover or ill-typed field raises StateError, because an almost right register is
the worst thing a teleport can do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from vmf.cpu.state import (
    GENERAL_REGISTERS,
    SEGMENT_NAMES,
    DescriptorTable,
    PendingEvents,
    Segment,
    VcpuState,
)
from vmf.errors import StateError

FORMAT_VERSION = 1

_PLAIN_FIELDS = (
    "rip", "rflags", "cr0", "cr2", "cr3", "cr4", "cr8", "xcr0", "efer", "xsave", "halted", "tsc", "tsc_khz",
)  # fmt: skip
_FIELDS = frozenset({*_PLAIN_FIELDS, "registers", "segments", "ldtr", "tr", "gdtr", "idtr", "dr", "msrs", "events"})


def to_plain(state: VcpuState) -> dict[str, Any]:
    """Plain data of format `FORMAT_VERSION`."""
    body: dict[str, Any] = {name: getattr(state, name) for name in _PLAIN_FIELDS}
    body["registers"] = [state.registers[name] for name in GENERAL_REGISTERS]
    body["segments"] = [_segment_row(state.segments[name]) for name in SEGMENT_NAMES]
    body["ldtr"] = _segment_row(state.ldtr)
    body["tr"] = _segment_row(state.tr)
    body["gdtr"] = [state.gdtr.base, state.gdtr.limit]
    body["idtr"] = [state.idtr.base, state.idtr.limit]
    body["dr"] = list(state.dr)
    body["msrs"] = [[index, state.msrs[index]] for index in sorted(state.msrs)]
    body["events"] = attrs.asdict(state.events)
    return body


def from_plain(body: object) -> VcpuState:
    """The inverse of `to_plain`. Raises StateError."""
    if not isinstance(body, Mapping) or set(body) != _FIELDS:
        raise StateError("vCPU state: missing or unknown fields.")
    try:
        registers = _row(body["registers"], len(GENERAL_REGISTERS))
        segments = body["segments"]
        if not isinstance(segments, list) or len(segments) != len(SEGMENT_NAMES):
            raise StateError("vCPU state: six segments expected.")
        msr_rows = body["msrs"]
        if not isinstance(msr_rows, list) or len(msr_rows) > 4096:
            raise StateError("vCPU state: the MSRs are not a list of at most 4096.")
        msrs = {row[0]: row[1] for row in (_row(row, 2) for row in msr_rows)}
        if len(msrs) != len(msr_rows):
            raise StateError("vCPU state: an MSR comes twice.")
        dr = _row(body["dr"], 6)
        if not all(0 <= value < 1 << 64 for value in dr):
            raise StateError("vCPU state: a debug register is out of range.")
        return VcpuState(
            registers=dict(zip(GENERAL_REGISTERS, registers, strict=True)),
            segments={name: Segment(*_row(row, 4)) for name, row in zip(SEGMENT_NAMES, segments, strict=True)},
            ldtr=Segment(*_row(body["ldtr"], 4)),
            tr=Segment(*_row(body["tr"], 4)),
            gdtr=DescriptorTable(*_row(body["gdtr"], 2)),
            idtr=DescriptorTable(*_row(body["idtr"], 2)),
            dr=(dr[0], dr[1], dr[2], dr[3], dr[4], dr[5]),
            msrs=msrs,
            events=_events(body["events"]),
            **{name: body[name] for name in _PLAIN_FIELDS},
        )
    except (TypeError, ValueError) as error:
        # The first argument alone: attrs adds the whole definition of the field to it, and the value.
        reason = str(error.args[0] if error.args else error).rstrip(".")
        raise StateError(f"vCPU state: {reason:.200}.") from error


def _segment_row(segment: Segment) -> list[int]:
    return [segment.selector, segment.base, segment.limit, segment.access]


def _row(value: object, length: int) -> list[int]:
    if not isinstance(value, list) or len(value) != length or not all(type(number) is int for number in value):
        raise StateError(f"vCPU state: expected {length} integers, got {value!r:.80}.")
    return value


def _events(value: object) -> PendingEvents:
    if not isinstance(value, Mapping) or set(value) != set(attrs.fields_dict(PendingEvents)):
        raise StateError("vCPU state: missing or unknown fields in the pending events.")
    return PendingEvents(**value)
