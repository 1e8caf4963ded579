"""What a device plugin implements.

A device is made once per machine by its plugin's `vmf_create_device` hook, gets its resources from the
`DeviceEnvironment` in its constructor, and from then on is only touched on the vCPU thread (other threads post work
with `environment.post`). Time comes from `environment.clock` and `environment.timers` only, so that pausing and
teleporting carry it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import Factory, evolve, field, frozen

from vmf.device.interrupts import InterruptController, IrqLine

if TYPE_CHECKING:
    from vmf.machine.bus import Bus
    from vmf.machine.clock import MachineClock
    from vmf.machine.timers import Timers
    from vmf.memory.guest import GuestMemory
    from vmf.memory.scattered import Ranges
    from vmf.plugins.containment import Culprit
    from vmf.storage.drive import Drive


@frozen
class Payload:
    """One device's saved state.

    Attributes:
        kind: stable name of the device model, e.g. "pc.uart16550".
        version: of the body's layout; a reader refuses versions it does not know.
        body: plain data (None, bool, int, str, bytes, list, dict with str keys), no floats.
        instance: tells several devices of one kind apart.
    """

    kind: str
    version: int
    body: Mapping[str, Any] = field(factory=dict)
    instance: int = 0


def _one_by_one(environment: DeviceEnvironment) -> Callable[[Ranges], None]:
    def ranges_written(ranges: Ranges) -> None:
        for gpa, size in ranges.tolist():
            environment.memory_written(gpa, size)

    return ranges_written


@frozen
class DeviceEnvironment:
    """What a device may use.

    Attributes:
        bus: to claim ports and MMIO.
        memory: guest RAM, for DMA.
        memory_written: `memory_written(gpa, size)` after every transfer into RAM that did not come from the guest's
            own instructions, on the vCPU thread and before the guest is told of it: engines that translate code drop
            what they made from there. (Dirty tracking sees such writes by itself.)
        ranges_written: `ranges_written(ranges)` says that of many at once, an array of rows (gpa, size).
        clock: guest time in nanoseconds.
        timers: call me at guest time T.
        irq_line: `irq_line(n)` gives ISA interrupt line n; provided by the interrupt-controller device, which is
            made first.
        provide_interrupts: called by the interrupt-controller device to publish itself and its line factory.
        post: run a callable on the vCPU thread soon; callable from any thread.
        guest_waits: whether the vCPU thread sleeps because the guest has nothing to do (HLT): what is posted now is
            welcome at once. Otherwise it costs the guest an interruption. From any thread; False where nobody knows.
        request_power_off, request_reset: ask the machine; callable on the vCPU thread.
        request_pause: ask the machine to pause soon; `request_pause(reason)` with a sentence for people that says what
            to do before the user resumes it. On the vCPU thread. See `Device.resumed`.
        serial_output: bytes the guest writes to its first serial port go here (any size, never blocks).
        options: the machine's settings for this device.
        drives: the machine's storage ports in their order; a device claims those that it serves.
    """

    bus: Bus
    memory: GuestMemory
    clock: MachineClock
    timers: Timers
    irq_line: Callable[[int], IrqLine]
    provide_interrupts: Callable[[InterruptController, Callable[[int], IrqLine]], None]
    post: Callable[[Callable[[], None]], None]
    request_power_off: Callable[[], None]
    request_reset: Callable[[], None]
    serial_output: Callable[[bytes], None]
    memory_written: Callable[[int, int], None] = lambda _gpa, _size: None
    request_pause: Callable[[str], None] = lambda _reason: None
    ranges_written: Callable[[Ranges], None] = field(default=Factory(_one_by_one, takes_self=True))
    guest_waits: Callable[[], bool] = lambda: False
    options: Mapping[str, Any] = field(factory=dict)
    drives: Sequence[Drive] = ()

    def of_plugin(self, culprit: Culprit, options: Mapping[str, Any]) -> DeviceEnvironment:
        """For the devices of one plugin: what they hand over to be called back stands under the plugin's name."""
        from vmf.plugins.containment import guarded

        def post(function: Callable[[], None]) -> None:
            self.post(guarded(culprit, "what it posted", function))

        return evolve(
            self,
            options=dict(options),
            bus=self.bus.of_plugin(culprit),
            timers=self.timers.of_plugin(culprit),
            post=post,
        )


class Device(ABC):
    """One device of a machine; touched on the vCPU thread only.

    What a method raises is told under the names of plugin and device. While the guest runs (I/O, timers, posted work,
    `serial_input`) it ends the machine with state "failed"; elsewhere it fails the operation that called, and the guest
    goes on. `close` may raise, which is logged. Return only what is specified: everything is checked.
    """

    kind: str
    """As in `Payload.kind`: a printable text, at most 100 characters."""
    VERSION: int = 1
    """Of the payload's body, as `save` writes it and `restore` takes it. The check of a teleport compares it."""
    writes_ram: bool = True
    """Whether it ever writes guest RAM (DMA). Where none does, an engine's log of the guest's writes is complete."""

    @abstractmethod
    def reset(self) -> None:
        """Power-on state."""

    def quiesce(self) -> None:  # noqa: B027 - most devices have nothing in flight
        """The vCPU has stopped: finish or park what is in flight.

        Afterwards, until the vCPU runs again, the device writes no RAM: it is called before a teleport's last look
        at RAM, before a pause is reported, before RAM is cleared, and again before `save`. Raises StateError when
        something does not finish in reasonable time; then the machine goes on.
        """

    @abstractmethod
    def save(self) -> Payload:
        """The complete state. Called after `quiesce`, with the vCPU stopped. Changes nothing: it is also called before
        a teleport, to see whether the state can travel, and then the guest goes on."""

    @abstractmethod
    def restore(self, payload: Payload) -> None:
        """Take over a state: unknown versions, missing and leftover fields raise StateError and change nothing."""

    def medium_changed(self, drive: Drive) -> None:  # noqa: B027 - most devices serve no drives
        """A drive of the machine has another medium or none now, and another `size`. Called at rest (`quiesce`), for
        removable drives only; not everybody's drive is meant."""

    def settings(self) -> Mapping[str, Any] | None:
        """Settings that the guest can see, by name: plain data. Both ends of a teleport must agree on them, as must a
        machine and its snapshot. Here None: the plugin's options, as the definition gives them, stand for it. Override
        it where a setting that is left out means the same as its default, or where the guest cannot see some."""
        return None

    def resumed(self) -> None:  # noqa: B027 - most devices put nothing off
        """The guest is about to run (again): what was put off until then can be tried once more."""

    def migration_blocker(self) -> str:
        """Why this device cannot teleport now, one line for people; "" when it can."""
        return ""

    def serial_input(self, data: bytes) -> int:
        """Bytes typed at the console: how many were accepted. Devices without a serial port take none."""
        return 0

    def close(self) -> None:  # noqa: B027 - most devices hold nothing of the host
        """Free host resources; idempotent."""
