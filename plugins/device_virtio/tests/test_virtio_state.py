"""Saved states: all of it travels, and hostile ones raise StateError only."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmf.device.base import Payload
from vmf.errors import StateError

KINDS = ("pci.host", "virtio.rng", "virtio.console", "virtio.blk")


def machine(bench: Any) -> Any:
    pc = bench.pc(bench.drive(bench.image()), console=True)
    for slot, queues in ((1, 1), (2, 2), (4, 1)):
        bench.driver(pc, slot).start(queues=queues)
    return pc


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(bench: Any, kind: str) -> None:
    payload = machine(bench).device(kind).save()
    target = bench.pc(bench.drive(bench.image()), console=True).device(kind)
    target.restore(payload)
    assert target.save() == payload


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_versions_and_kinds(bench: Any, kind: str) -> None:
    device = machine(bench).device(kind)
    payload = device.save()
    for wrong in (Payload(kind, 2, payload.body), Payload("other", 1, payload.body)):
        with pytest.raises(StateError):
            device.restore(wrong)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [at, *(path for key in value for path in paths(value[key], (*at, key)))]
    if isinstance(value, list):
        return [at, *(path for index, item in enumerate(value) for path in paths(item, (*at, index)))]
    return [at]


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-1, 1 << 65), st.sampled_from([0, 1, 255, 65535, 1 << 31, 1 << 32]),
    st.text(max_size=3), st.binary(max_size=5), st.just([]), st.just({}),
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_any_change_is_taken_or_refused(bench: Any, data: st.DataObject, kind: str) -> None:
    pc = machine(bench)
    device = pc.device(kind)
    body = copy.deepcopy(dict(device.save().body))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(paths(body)))
        if not path:
            continue
        place: Any = body
        for key in path[:-1]:
            place = place[key]
        if data.draw(st.booleans()):
            place[path[-1]] = data.draw(JUNK)
        elif isinstance(place, dict):
            del place[path[-1]]
        if not isinstance(place, dict | list):
            break
    try:
        device.restore(Payload(kind, 1, body))
    except StateError:
        pass
    else:
        for slot in (1, 2, 4):
            pc.config_read(slot, 0x10, 4)
        device.quiesce()
        device.save()
    device.reset()
    for each in pc.devices:
        each.close()
    bench.made.clear()
