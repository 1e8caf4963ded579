"""The result of comparing two machines before a teleport, and helpers to compare them.

A description is plain data. `compare_descriptions` walks both at once and makes a `Blocker` of every difference,
under the name by which a person knows that setting and with the command that removes the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import frozen

MISSING = "(missing)"
_TOO_LONG = 80


@frozen
class Blocker:
    """One reason why a teleport cannot happen.

    Attributes:
        field: what differs, as the user knows it ("memory", "cpu feature avx2", "device pc.uart16550").
        source, target: the two values, as the user would write them.
        remedy: what to do, with the command where there is one.
    """

    field: str
    source: str
    target: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}: {self.source} at the source, {self.target} at the target. {self.remedy}"


@frozen
class FieldText:
    """How a field is called and what to do when it differs; `{name}`, `{source}` and `{target}` are filled in.

    `unit` is written behind the values where they are shown, not in the remedy's command.
    """

    label: str
    remedy: str
    unit: str = ""


FIELDS: Mapping[str, FieldText] = {
    "memory_mib": FieldText(
        "memory", "Set the target's memory with `vmf modifyvm {name} --memory {source}`.", "MiB"
    ),
    "memory": FieldText("memory", "Set the target's memory with `vmf modifyvm {name} --memory {source}`."),
    "cpu.backend": FieldText(
        "CPU backend", "Set the target's backend with `vmf modifyvm {name} --cpu-backend {source}`."
    ),
    "cpu.tsc_khz": FieldText("TSC rate (kHz)", "Teleport to a host whose TSC runs at the same rate."),
    "devices": FieldText("devices", "Give the target machine the same devices as the source machine."),
}  # fmt: skip
"""By path in the description; the longest path that is the field's own or its parent's counts."""
DEFAULT_REMEDY = "Configure the target machine as the source machine."

Hook = Callable[[Any, Any], Sequence[Blocker]]
"""Compares one field by its own rules: (source value, target value) to blockers; the CPUID contract, say."""


def show(value: Any) -> str:
    """A value as a person would write it, on one line and not too long."""
    text: str
    if isinstance(value, bool) or value is None:
        text = "none" if value is None else "on" if value else "off"
    elif isinstance(value, bytes):
        text = value.hex()
    elif isinstance(value, list | tuple):
        text = ", ".join(show(item) for item in value) or "none"
    else:
        text = str(value)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= _TOO_LONG else text[: _TOO_LONG - 1] + "…"


def _text_of(path: str) -> FieldText | None:
    while path:
        if path in FIELDS:
            return FIELDS[path]
        path = path.rpartition(".")[0]
    return None


def _blocker(name: str, path: str, source: Any, target: Any) -> Blocker:
    text = _text_of(path)
    # The path may consist of names that the other side made up.
    label = text.label if text is not None and path in FIELDS else show(path.replace("_", " ").replace(".", " "))
    remedy = text.remedy if text is not None else DEFAULT_REMEDY
    values = {"{name}": name, "{source}": show(source), "{target}": show(target)}
    for mark, value in values.items():  # not str.format: the values come from the other side
        remedy = remedy.replace(mark, value)
    unit = f" {text.unit}" if text is not None and text.unit and path in FIELDS else ""
    return Blocker(label, show(source) + unit, show(target) + unit, remedy)


def compare_descriptions(
    name: str,
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    hooks: Mapping[str, Hook] | None = None,
) -> list[Blocker]:
    """Every difference between two descriptions, in the order of the source's fields.

    Args:
        name: of the target machine, for the commands in the remedies.
        hooks: by path ("cpu.cpuid"): fields that are not simply equal or different.
    """
    found: list[Blocker] = []
    _compare(name, "", source, target, hooks or {}, found)
    return found


def _compare(name: str, path: str, source: Any, target: Any, hooks: Mapping[str, Hook], found: list[Blocker]) -> None:
    if path in hooks:
        found += hooks[path](source, target)
        return
    if isinstance(source, Mapping) and isinstance(target, Mapping):
        for key in (*source, *(key for key in target if key not in source)):
            inner = f"{path}.{key}" if path else str(key)
            _compare(name, inner, source.get(key, MISSING), target.get(key, MISSING), hooks, found)
    elif _plain(source) != _plain(target):
        found.append(_blocker(name, path, source, target))


def _plain(value: Any) -> Any:
    """Tuples come back from the wire as lists, and True is not 1 here."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return (type(value) is bool, value)


def compare_payloads(source: Sequence[tuple[str, int, int]], target: Sequence[tuple[str, int, int]]) -> list[Blocker]:
    """Payloads (kind, version, instance) that the target cannot take; nothing when either side lists none."""
    if not source or not target:
        return []
    known = set(target)
    found = []
    for kind, version, instance in source:
        if (kind, version, instance) in known:
            continue
        others = sorted(v for k, v, i in known if (k, i) == (kind, instance))
        label = f"state of {kind}" + (f" #{instance}" if instance else "")
        if others:
            remedy = "Bring both hosts to the same release of the plugin that provides it."
            found.append(Blocker(show(label), f"version {version}", f"version {others[-1]}", remedy))
        else:
            remedy = "Install the plugin that provides it at the target, and give the machine that device."
            found.append(Blocker(show(label), f"version {version}", MISSING, remedy))
    return found
