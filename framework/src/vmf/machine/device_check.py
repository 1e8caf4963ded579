"""What the devices of two machines must agree on: which there are, their settings, where the guest finds them.

A setting that differs is not seen until the guest touches the device, and then it reads all ones. So each device tells
its settings (`Device.settings`), the bus what was claimed when the machine was made, and the check compares both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vmf.machine.bus import Bus, Range
from vmf.teleport.check import Blocker, show


def label_of(kind: str, instance: int) -> str:
    """A device for people: "pc.uart16550", "virtio.block #1"."""
    return show(kind) + (f" #{show(instance)}" if instance else "")


def describe_ranges(bus: Bus) -> dict[str, dict[str, list[str]]]:
    """By owner: the ports and addresses that are claimed now, joined where they touch."""
    found: dict[str, dict[str, list[str]]] = {}
    for what, claimed in (("ports", bus.port_ranges), ("addresses", bus.mmio_ranges)):
        for owner in sorted({each.owner for each in claimed}):
            found.setdefault(owner, {})[what] = _joined(each for each in claimed if each.owner == owner)
    return found


def _joined(ranges: Iterable[Range]) -> list[str]:
    joined: list[list[int]] = []
    for base, end in sorted((each.base, each.base + each.size) for each in ranges):
        if joined and joined[-1][1] == base:
            joined[-1][1] = end
        else:
            joined.append([base, end])
    return [f"{base:#x}-{end - 1:#x}" for base, end in joined]


def check_devices(source: Any, target: Any) -> list[Blocker]:
    """Devices, as rows [kind, instance], that only one side has."""

    def rows(value: Any) -> set[str]:
        if not isinstance(value, list):
            return set()
        return {f"device {label_of(*row)}" for row in value if isinstance(row, list) and len(row) == 2}

    there, here = rows(source), rows(target)
    found = []
    for label in sorted(there - here):
        remedy = "Install the plugin that provides it, and list it in `devices` of the target machine's definition."
        found.append(Blocker(label, "present", "missing", remedy))
    for label in sorted(here - there):
        remedy = "Remove it from `devices` in the target machine's definition."
        found.append(Blocker(label, "missing", "present", remedy))
    return found


def check_settings(source: Any, target: Any) -> list[Blocker]:
    """Settings by device that both sides have; nothing where the other vmf does not tell any."""
    remedy = "Give both machines the same `device_options` for it, and their hosts the same release of its plugin."
    return _differences(source, target, "device {owner}: option {name}", remedy)


def check_ranges(source: Any, target: Any) -> list[Blocker]:
    """Ports and addresses by owner."""
    remedy = "Give both machines the same `device_options` for it, and their hosts the same release of its plugin."
    return _differences(source, target, "device {owner}: {name}", remedy)


def _differences(source: Any, target: Any, label: str, remedy: str) -> list[Blocker]:
    if not isinstance(source, Mapping) or not isinstance(target, Mapping):
        return []
    found = []
    for owner in sorted(set(source) & set(target), key=str):
        there, here = source[owner], target[owner]
        if not isinstance(there, Mapping) or not isinstance(here, Mapping):
            continue
        for name in sorted({*there, *here}, key=str):
            if _differ(there.get(name), here.get(name)):
                field = label.replace("{owner}", show(owner)).replace("{name}", show(name))
                found.append(Blocker(field, _said(there, name), _said(here, name), remedy))
    return found


def _said(values: Mapping[str, Any], name: str) -> str:
    return show(values[name]) if name in values else "not given"


def _differ(there: Any, here: Any) -> bool:
    """Lists and tuples are one on the wire; true is not 1."""
    if isinstance(there, Sequence | Mapping) and isinstance(here, Sequence | Mapping):
        if isinstance(there, str | bytes) or isinstance(here, str | bytes):
            return type(there) is not type(here) or there != here
        if isinstance(there, Mapping) or isinstance(here, Mapping):
            if not isinstance(there, Mapping) or not isinstance(here, Mapping) or set(there) != set(here):
                return True
            return any(_differ(there[key], here[key]) for key in there)
        return len(there) != len(here) or any(_differ(*pair) for pair in zip(there, here, strict=True))
    return type(there) is not type(here) or bool(there != here)
