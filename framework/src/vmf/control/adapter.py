"""`Machine` as the control server sees it: plain data instead of typed objects."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from vmf.control.seam import Plain, ProgressCallback
from vmf.machine.machine import Machine
from vmf.machine.states import MachineState
from vmf.transport.base import Address

if TYPE_CHECKING:
    from vmf.machine.config import MachineConfig
    from vmf.machine.snapshot import SnapshotStore
    from vmf.plugins.bridge import PluginRegistry
    from vmf.teleport.journal import Journal
    from vmf.teleport.progress import ProgressEvent


def plain(value: Any) -> Any:
    """What JSON can hold of `value`: records become objects, enums their values, infinities and NaN null."""
    if attrs.has(type(value)):
        return {field.name: plain(getattr(value, field.name)) for field in attrs.fields(type(value))}
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes | bytearray):
        return value.hex()
    if isinstance(value, Path):
        return str(value)
    item = getattr(value, "item", None)  # a NumPy scalar
    return plain(item()) if callable(item) else str(value)


class MachineAdapter:
    """Implements `ControlledMachine`."""

    def __init__(self, config: MachineConfig, registry: PluginRegistry) -> None:
        self.machine = Machine(config, registry)
        self._last_event: Plain = {}

    @property
    def name(self) -> str:
        return self.machine.name

    def info(self) -> Plain:
        answer: Plain = plain(self.machine.info())
        return answer

    def start(self, peer_password: str | None = None) -> None:
        self.machine.start(peer_password=peer_password)

    def listen(self) -> str:
        return str(self.machine.listen())

    def wait_for_teleport(self, progress: ProgressCallback) -> Plain:
        answer: Plain = plain(self.machine.wait_for_teleport(self._observer(progress)))
        return answer

    def pause(self) -> None:
        self.machine.pause()

    def resume(self) -> None:
        self.machine.resume()

    def power_off(self) -> tuple[str, ...]:
        return self.machine.power_off()

    def cancel_operation(self, reason: str = "") -> str:
        return self.machine.cancel_operation(reason=reason)

    def reset(self) -> None:
        self.machine.reset()

    def start_teleport(
        self,
        host: str,
        port: int,
        transport: str,
        max_downtime_ms: int,
        timeout_s: float | None,
        progress: ProgressCallback,
        options: Mapping[str, Any] | None = None,
        password: str | None = None,
    ) -> Plain:
        summary = self.machine.teleport(
            host,
            port,
            transport=transport,
            max_downtime_ms=max_downtime_ms,
            timeout_s=timeout_s,
            progress=self._observer(progress),
            options=options,
            password=password,
        )
        answer: Plain = plain(summary)
        return answer

    def check_teleport(
        self,
        host: str,
        port: int,
        transport: str,
        options: Mapping[str, Any] | None = None,
        password: str | None = None,
    ) -> Plain:
        blockers = self.machine.check_teleport(host, port, transport=transport, options=options, password=password)
        target = str(Address(transport, host, port))
        notes = [] if blockers else list(self.machine.teleport_notes)
        return {"ok": not blockers, "target": target, "blockers": plain(blockers), "notes": notes}

    def cancel_teleport(self) -> bool:
        return self.machine.cancel_teleport()

    def switch_backend(self, backend: str) -> Plain:
        answer: Plain = plain(self.machine.switch_backend(backend))
        return answer

    def change_medium(self, port: int, medium: str) -> None:
        self.machine.change_medium(port, medium)

    def trace(self, instructions: int, output: str, json_lines: bool, progress: ProgressCallback) -> Plain:
        summary = self.machine.trace(instructions, output, json_lines=json_lines, progress=progress)
        answer: Plain = plain(summary)
        return answer

    def cancel_trace(self) -> bool:
        return self.machine.cancel_trace()

    def use_snapshots(self, store: SnapshotStore) -> None:
        """Keep snapshots there; before it starts."""
        self.machine.snapshots = store

    def take_snapshot(self, name: str, description: str, progress: ProgressCallback) -> Plain:
        def told(what: str, done: int, total: int) -> None:
            progress({"what": what, "done": done, "total": total})

        answer: Plain = plain(self.machine.take_snapshot(name, description, told))
        return answer

    def use_journal(self, journal: Journal) -> None:
        """Write teleports down there; before the first one."""
        self.machine.journal = journal

    def release_teleporter(self) -> bool:
        return self.machine.release_teleporter()

    def resolve_teleport(self, how: str, force: bool, peer: Plain | None = None) -> str:
        where, password = self._peer(peer)
        return self.machine.resolve_teleport(how, force=force, peer=where, password=password)

    def _peer(self, peer: Plain | None) -> tuple[Address | None, str | None]:
        """Who is to be asked: the target of the teleport in doubt, with what `peer` says otherwise."""
        doubt = self.machine.doubt
        if not peer or doubt is None:
            return None, None
        usual = doubt.entry.peer
        options = {**usual.options, **peer.get("options", {})}
        where = Address(
            peer.get("transport", usual.scheme), peer.get("host", usual.host), peer.get("port", usual.port), options
        )
        return where, peer.get("password")

    def teleport_status(self, ask: bool = False, peer: Plain | None = None) -> Plain:
        state = self.machine.state
        role = "target" if state is MachineState.TELEPORTING_IN else "source"
        active = state in (MachineState.TELEPORTING_IN, MachineState.TELEPORTING, MachineState.TELEPORTING_PAUSED)
        return {
            "active": active,
            "role": role if active else "",
            "progress": self._last_event,
            "summary": plain(self.machine.summary),
            "doubt": plain(self._doubt(ask, peer)),
        }

    def _doubt(self, ask: bool, peer: Plain | None) -> Plain | None:
        where, password = self._peer(peer)
        return self.machine.teleport_in_doubt(asking=ask, peer=where, password=password)

    def console_write(self, data: bytes) -> int:
        return self.machine.type(data)

    def add_console_listener(self, listener: Callable[[bytes], None]) -> None:
        self.machine.console.add_listener(listener)

    def add_state_listener(self, listener: Callable[[str, str], None]) -> None:
        self.machine.add_state_listener(lambda old, new: listener(old.value, new.value))

    def wait_finished(self) -> str:
        # Not FAILED: a failed machine is kept for inspection, until somebody resets it or powers it off.
        return self.machine.wait_for(MachineState.POWERED_OFF, MachineState.TELEPORTED).value

    def close(self) -> None:
        self.machine.close()

    def _observer(self, progress: ProgressCallback) -> Callable[[ProgressEvent], None]:
        def observe(event: ProgressEvent) -> None:
            self._last_event = plain(event)
            progress(self._last_event)

        return observe
