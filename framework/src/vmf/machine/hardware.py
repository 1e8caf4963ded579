"""The hardware of one machine: RAM, bus, clock, timers, devices and vCPU, assembled from plugins.

Everything that touches devices or the vCPU runs on the vCPU thread; the public methods here get it there. What the
user may do and when is the business of `vmf.machine.machine`; how a state travels is that of `vmf.teleport`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from vmf.cpu import codec
from vmf.cpu.backend import CpuBackend, Vcpu, VcpuEnvironment, VmExit, WriteLog
from vmf.cpu.state import VcpuState
from vmf.cpuid.compare import diff
from vmf.cpuid.table import CpuidTable
from vmf.device.base import Device, DeviceEnvironment, Payload
from vmf.device.interrupts import InterruptController, IrqLine
from vmf.device.state import check_total
from vmf.errors import ConfigError, ContractOverridden, StateError, VmfError
from vmf.machine import switch
from vmf.machine.addressing import require_addressable
from vmf.machine.bus import Bus
from vmf.machine.clock import MachineClock
from vmf.machine.closing import CLOSE_SECONDS, finish
from vmf.machine.console import SerialConsole
from vmf.machine.controller import CheckedController
from vmf.machine.device_check import describe_ranges, label_of
from vmf.machine.guest_time import GuestTime
from vmf.machine.timers import TimerQueue
from vmf.machine.vcpu_thread import VcpuThread
from vmf.memory.guest import MIB, PAGE_SIZE, GuestMemory
from vmf.memory.scattered import Ranges
from vmf.storage.drive import Drive

log = logging.getLogger(__name__)

VCPU_KIND = "vmf.vcpu"
CLOCK_KIND = "vmf.clock"
CONSOLE_KIND = "vmf.console"

CONSOLE_RETRY_NS = 10_000_000
"""How soon input that the serial port had no room for is offered again."""
STATE_ATTEMPTS = 4
STATE_PAUSE_S = 0.005
"""A guest that is in the middle of something may be through with it then."""

DeviceFactory = Callable[[DeviceEnvironment], Sequence[Device]]


class Hardware:
    """One machine's hardware. Made powered on but with nothing loaded; `close` frees it."""

    def __init__(
        self,
        name: str,
        memory_mib: int,
        backend: CpuBackend,
        make_devices: DeviceFactory,
        console: SerialConsole,
        *,
        on_exit: Callable[[VmExit], None],
        on_crash: Callable[[BaseException], None],
        request_power_off: Callable[[], None],
        request_reset: Callable[[], None],
        request_pause: Callable[[str], None] = lambda _reason: None,
        options: Mapping[str, Any] | None = None,
        drives: Sequence[Drive] = (),
    ) -> None:
        self.name = name
        self.backend = backend
        self.memory = GuestMemory(memory_mib * MIB)
        self.bus = Bus([(region.gpa, region.size) for region in self.memory.regions])
        self.clock = MachineClock()
        self.time = GuestTime(self.clock)
        self.timers = TimerQueue(self.clock)
        self.console = console
        self.tsc_khz = 0
        self.cpuid = CpuidTable()
        self._controller: InterruptController | None = None
        self._lines: Callable[[int], IrqLine] | None = None
        self._vcpu: Vcpu | None = None
        self.held = True
        """Somebody wants the vCPU stopped: only `run` lets it go on. vCPU thread."""
        self._console_timer = self.timers.timer(self._offer_input)
        self.thread = VcpuThread(name, self.clock, self.timers, on_exit, on_crash, self.time.keep)
        environment = DeviceEnvironment(
            bus=self.bus,
            memory=self.memory,
            clock=self.clock,
            timers=self.timers,
            irq_line=self._irq_line,
            provide_interrupts=self._provide_interrupts,
            post=self.thread.post,
            guest_waits=lambda: self.thread.asleep,
            request_power_off=request_power_off,
            request_reset=request_reset,
            request_pause=request_pause,
            serial_output=console.output,
            memory_written=self._memory_written,
            ranges_written=self._ranges_written,
            options=options or {},
            drives=tuple(drives),
        )
        self.devices: tuple[Device, ...] = ()
        try:
            self.devices = tuple(self.thread.call(lambda: make_devices(environment)))
            if self._controller is None:
                raise ConfigError(
                    f"machine {name}: none of its devices is an interrupt controller.",
                    'Add "pc" to `devices` in its definition.',
                )
        except BaseException:
            self.close()
            raise
        self.device_ranges: dict[str, dict[str, list[str]]] = describe_ranges(self.bus)
        """Ports and addresses by owner, as they were claimed when the machine was made; the guest may move some."""

    def device_settings(self) -> dict[str, dict[str, Any]]:
        """By device: the settings that the guest can see."""

        def settings() -> dict[str, dict[str, Any]]:
            return {
                label_of(kind, instance): dict(device.settings() or {})
                for device, (kind, instance) in zip(self.devices, self.device_keys(), strict=True)
            }

        return self.thread.call(settings)

    # -- assembly

    def _provide_interrupts(self, controller: InterruptController, lines: Callable[[int], IrqLine]) -> None:
        if self._controller is not None:
            raise ConfigError(
                "two devices both want to be the interrupt controller.", "Leave one of them out of `devices`."
            )
        self._controller, self._lines = CheckedController(controller), lines

    def _memory_written(self, gpa: int, size: int) -> None:
        if self._vcpu is not None:
            self._vcpu.memory_written(gpa, size)

    def _ranges_written(self, ranges: Ranges) -> None:
        if self._vcpu is not None:
            self._vcpu.ranges_written(ranges)

    def _irq_line(self, number: int) -> IrqLine:
        if self._lines is None:
            raise ConfigError(
                f"a device asks for interrupt line {number!r:.20} before any interrupt controller exists.",
                'Put "pc" first in `devices`.',
            )
        return self._lines(number)

    def plug_vcpu(self, cpuid: CpuidTable, tsc_khz: int, backend: CpuBackend | None = None) -> None:
        """Make the vCPU for a contract (again, when there was one), of another backend if one is given.

        Takes tens of milliseconds. After an error there is no vCPU, and the backend is the one before.
        """
        chosen = backend or self.backend
        require_addressable(self.name, self.memory, cpuid, chosen)

        def plug() -> None:
            if self._vcpu is not None:
                self.thread.attach(None)
                self._vcpu.close()
                self._vcpu = None
            vcpu = chosen.create_vcpu(self.vcpu_environment(cpuid, tsc_khz))
            try:
                self._verify(vcpu, cpuid, chosen.name)
            except BaseException:
                vcpu.close()
                raise
            self._vcpu, self.backend = vcpu, chosen
            self.cpuid, self.tsc_khz = cpuid, tsc_khz
            self.time.tsc_khz = tsc_khz
            self.thread.attach(self._vcpu)

        self.thread.call(plug)

    def vcpu_environment(self, cpuid: CpuidTable | None = None, tsc_khz: int = 0) -> VcpuEnvironment:
        """For a vCPU of this machine, by default under its present contract."""
        assert self._controller is not None
        return VcpuEnvironment(
            memory=self.memory,
            bus=self.bus,
            interrupts=self._controller,
            cpuid=cpuid if cpuid is not None else self.cpuid,
            tsc_khz=tsc_khz or self.tsc_khz,
        )

    def exchange_vcpu(self, backend: CpuBackend, new: Vcpu) -> tuple[Vcpu, int]:
        """Go on with `new`, a vCPU of `backend` made for this machine's contract; see `vmf.machine.switch`.

        Returns the old vCPU, which is the caller's now, and how long the guest stood still, ns. Raises StateError (or
        what else the new vCPU raises): then the old one goes on.
        """

        def exchange() -> tuple[Vcpu, int]:
            begun = time.monotonic_ns()
            old = self.vcpu
            self._verify(new, self.cpuid, backend.name)
            state = old.save()
            # It may have been this machine's vCPU before, and RAM has been written since.
            new.invalidate_code(0, self.memory.size)
            new.restore(state)
            switch.verify(state, new.save(), backend.name)
            self.time.hand_over(old, new)
            self._vcpu, self.backend = new, backend
            self.thread.attach(new)
            return old, time.monotonic_ns() - begun

        return self.thread.call(exchange)

    def _verify(self, vcpu: Vcpu, contract: CpuidTable, backend: str) -> None:
        """Raise ContractOverridden unless the engine presents the contract, as far as it can tell."""
        presented = vcpu.read_cpuid()
        if presented is None:
            return
        differences = diff(contract, presented, machine=self.name)
        if differences:
            reasons = "; ".join(f"{each.field} {each.contract}, presented {each.capability}" for each in differences)
            raise ContractOverridden(
                f"the CPU backend {backend} does not present the CPUID contract of machine {self.name}: {reasons}.",
                differences[0].remedy,
                tuple(differences),
            )

    def present_state(self) -> VcpuState | None:
        """What the vCPU carries now, between two instructions; None where it cannot be said at this instant."""

        def save() -> VcpuState | None:
            if self._vcpu is None:
                return None
            try:
                return self._vcpu.save()
            except StateError:
                return None

        return self.thread.call(save)

    def state_refusal(self) -> StateError | None:
        """Why the vCPU's state cannot be saved, whatever its backend's reason is; None where it can. What is merely in
        flight has passed at one of a few attempts."""

        def attempt() -> StateError | None:
            if self._vcpu is not None:
                try:
                    self._vcpu.save()
                except StateError as error:
                    return error
            return None

        refusal = self.thread.call(attempt)
        for _ in range(STATE_ATTEMPTS - 1):
            if refusal is None:
                break
            time.sleep(STATE_PAUSE_S)
            refusal = self.thread.call(attempt)
        return refusal

    def try_state(self, state: VcpuState) -> VcpuState:
        """Put a state into the vCPU, which has not run yet, and read it back. Raises StateError."""

        def attempt() -> VcpuState:
            self.vcpu.restore(state)
            return self.vcpu.save()

        return self.thread.call(attempt)

    def write_log(self) -> WriteLog | str:
        """The engine's log of all writes to RAM, or why it has none that would tell of all."""
        if writers := sorted({device.kind for device in self.devices if device.writes_ram}):
            return f"it does not see what devices write ({', '.join(writers)})"
        return self.vcpu.write_log() or f"the CPU backend {self.backend.name} has none"

    @property
    def vcpu(self) -> Vcpu:
        if self._vcpu is None:
            raise StateError("the machine has no vCPU yet.")
        return self._vcpu

    # -- life

    def power_on(self, load: Callable[[GuestMemory], VcpuState], *, keep_mapping: bool = False) -> None:
        """Reset everything, load the guest and leave it stopped before its first instruction.

        With `keep_mapping` RAM is cleared by writing, so that a dirty tracker sees it.
        """

        def reset() -> None:
            self.time.hold(self.clock.now(), 0)
            for device in self.devices:
                device.quiesce()  # nothing may arrive in RAM once it is cleared
            if keep_mapping:
                for first, end in self.memory.touched_ranges().tolist():
                    np.frombuffer(self.memory.buffer, dtype=np.uint64)[
                        first * PAGE_SIZE // 8 : end * PAGE_SIZE // 8
                    ] = 0
            else:
                self.memory.clear()
            for device in self.devices:
                device.reset()
            state = load(self.memory)
            self.memory.tell_observers()
            self.vcpu.restore(attrs.evolve(state, tsc=0, tsc_khz=self.tsc_khz))
            self.vcpu.invalidate_code(0, self.memory.size)

        self.thread.call(reset)

    def run(self) -> None:
        """Let the vCPU run; its time continues from where it stood, or where it would be by now, as `halt` was told."""

        def run() -> None:
            self.held = False
            if not self.thread.running:
                for device in self.devices:
                    device.resumed()
            self.time.start(self.vcpu)  # also where a reset between two slices has stopped nothing but time
            self.thread.set_running(True)

        self.thread.call(run)

    def halt(self, *, freeze_time: bool) -> None:
        """Stop the vCPU between two instructions, and what the devices do to RAM on their own.

        Guest time stands still from this very instant on: whatever is read of the machine from then on is as it was
        when the vCPU stopped. Raises StateError when a device does not come to rest (its storage does not answer);
        then the guest runs as before, and no time was lost.

        Args:
            freeze_time: the guest does not see the time until `run` pass (a user's pause); otherwise `run` adds it
                (a teleport, whose failure must leave no gap). A second halt may take it out, but never adds it.
        """

        def halt() -> None:
            held, running = self.held, self.thread.running
            self.held = True
            self.thread.set_running(False)
            if self._vcpu is not None:
                self.time.stop(self._vcpu)
            try:
                for device in self.devices:
                    device.quiesce()
            except BaseException:
                self.held = held
                if running:
                    self.time.start(self.vcpu)
                    self.thread.set_running(True)
                raise
            if freeze_time:
                self.time.leave_out()

        self.thread.call(halt)

    @property
    def stopped_at_ns(self) -> int | None:
        """When the vCPU stopped, ns of this host's CLOCK_MONOTONIC; None while it may run."""
        stopped = self.time.stopped
        return None if stopped is None else stopped.host_ns

    def change_medium(self, drive: Drive, exchange: Callable[[], None]) -> None:
        """Do `exchange`, which puts another medium into a drive, while no device uses any; then tell the devices."""

        def change() -> None:
            for device in self.devices:
                device.quiesce()
            exchange()
            for device in self.devices:
                device.medium_changed(drive)

        self.thread.call(change)

    def type(self, data: bytes) -> int:
        """Input for the guest's first serial port; how many bytes were taken."""
        taken = self.console.type(data)
        self.thread.post(self._offer_input)
        return taken

    def _offer_input(self) -> None:
        for device in self.devices:
            self.console.feed(device.serial_input)
        if self.console.has_input and self._console_timer.deadline is None:
            self._console_timer.arm(self.clock.now() + CONSOLE_RETRY_NS)

    # -- state

    def payload_kinds(self) -> list[tuple[str, int, int]]:
        """(kind, version, instance) of every payload that `save` gives and `restore` takes."""
        return [
            (CLOCK_KIND, 1, 0),
            (VCPU_KIND, codec.FORMAT_VERSION, 0),
            (CONSOLE_KIND, 1, 0),
            *(
                (kind, device.VERSION, instance)
                for device, (kind, instance) in zip(self.devices, self.device_keys(), strict=True)
            ),
        ]

    def save(self) -> list[Payload]:
        """The complete state of the stopped machine, RAM excepted."""

        def save() -> list[Payload]:
            for device in self.devices:
                device.quiesce()
            stopped = self.time.stopped
            if stopped is None:
                raise StateError("the machine runs: its state can only be saved while it is stopped.")
            state = attrs.evolve(self.vcpu.save(), tsc=stopped.tsc)
            return [
                Payload(CLOCK_KIND, 1, {"guest_ns": stopped.guest_ns}),
                Payload(VCPU_KIND, codec.FORMAT_VERSION, codec.to_plain(state)),
                Payload(CONSOLE_KIND, 1, {"pending_input": self.console.pending_input()}),
                *(
                    attrs.evolve(device.save(), instance=instance)
                    for device, (_, instance) in zip(self.devices, self.device_keys(), strict=True)
                ),
            ]

        payloads = self.thread.call(save)
        check_total(payloads)
        return payloads

    def migration_blockers(self) -> list[tuple[str, str, str]]:
        """(kind, reason, remedy) of every device that cannot teleport now, or cannot say."""

        def blockers() -> list[tuple[str, str, str]]:
            found = []
            for device in self.devices:
                try:
                    reason, remedy = device.migration_blocker(), "Detach it, or wait until it can move."
                except VmfError as error:
                    reason, remedy = error.message.rstrip("."), error.remedy
                if reason:
                    found.append((device.kind, reason, remedy))
            return found

        return self.thread.call(blockers)

    def rehearse_save(self) -> list[tuple[str, VmfError]]:
        """Save every device between two instructions of the guest, which then goes on: what would fail when it is
        stopped for good, as (device, reason)."""

        def rehearse() -> list[tuple[str, VmfError]]:
            refusals: list[tuple[str, VmfError]] = []
            payloads = []
            for device, (kind, instance) in zip(self.devices, self.device_keys(), strict=True):
                try:
                    device.quiesce()
                    payloads.append(device.save())
                except VmfError as error:
                    refusals.append((f"{kind} #{instance}" if instance else kind, error))
            if not refusals:
                try:
                    check_total(payloads)
                except StateError as error:
                    refusals.append(("all", error))
            return refusals

        return self.thread.call(rehearse)

    def restore(self, payloads: Sequence[Payload]) -> None:
        """Take over a saved state; RAM is in place. Leaves the machine stopped. Raises StateError.

        After an error parts of the state may have been taken: reset before using the machine.
        """

        def restore() -> None:
            waiting: dict[tuple[str, int], Payload] = {}
            for payload in payloads:
                if (payload.kind, payload.instance) in waiting:
                    raise StateError(f"the state of {payload.kind} #{payload.instance} came twice.")
                waiting[payload.kind, payload.instance] = payload

            def take(kind: str, instance: int = 0) -> Payload:
                payload = waiting.pop((kind, instance), None)
                if payload is None:
                    raise StateError(f"the state of {kind} #{instance} is missing.")
                return payload

            guest_ns = _integer(_versioned(take(CLOCK_KIND), 1), "guest_ns")
            state = codec.from_plain(_versioned(take(VCPU_KIND), codec.FORMAT_VERSION))
            console = _versioned(take(CONSOLE_KIND), 1)
            pending = console.get("pending_input")
            if set(console) != {"pending_input"} or not isinstance(pending, bytes):
                raise StateError(f"{CONSOLE_KIND}: expected just the pending input.")
            own = [(device, take(*key)) for device, key in zip(self.devices, self.device_keys(), strict=True)]
            if waiting:
                kinds = ", ".join(sorted(f"{kind} #{instance}" for kind, instance in waiting))
                raise StateError(f"this machine has no place for the state of {kinds}.")
            self.time.hold(guest_ns, state.tsc)
            for device, payload in own:
                device.restore(payload)
            self.vcpu.restore(state)
            self.vcpu.invalidate_code(0, self.memory.size)
            self.console.set_pending_input(pending)

        self.thread.call(restore)

    def catch_up_and_run(self, stopped_at_ns: int, *, running: bool) -> int:
        """After `restore`: move guest time on by what has passed since it was stopped (both in ns of this host's
        CLOCK_MONOTONIC) and run, or stay paused as it was. Returns when it was let run."""

        def go() -> int:
            if not running:
                return self.clock.host_now()
            now = self.time.start(self.vcpu, stopped_at_ns)
            self.held = False
            self.thread.set_running(True)
            if self.console.has_input:
                self._offer_input()
            return now

        return self.thread.call(go)

    def discard(self) -> None:
        """Forget whatever was restored, RAM too."""

        def discard() -> None:
            for device in self.devices:
                device.quiesce()
            self.memory.clear()
            for device in self.devices:
                device.reset()
            self.console.drop_input()
            self.time.hold(0, 0)

        self.thread.call(discard)

    def device_keys(self) -> list[tuple[str, int]]:
        """(kind, instance) of every device, in order; instances count up among devices of one kind."""
        seen: dict[str, int] = {}
        keys = []
        for device in self.devices:
            instance = seen.get(device.kind, 0)
            seen[device.kind] = instance + 1
            keys.append((device.kind, instance))
        return keys

    def info(self) -> dict[str, Any]:
        """What `Machine.info` says of it: plain data."""
        return {
            "cpu_backend_used": self.backend.name,
            "guest_time_seconds": round(self.clock.now() / 1e9, 3),
            "cpu_seconds": round(self.thread.run_seconds, 3),
            "tsc_khz": self.tsc_khz,
            "devices": [kind for kind, _ in self.device_keys()],
        }

    def uptime_ns(self) -> int:
        """Guest time."""
        return self.clock.now()

    def close(self) -> None:
        """Stop for good and free everything; idempotent. It ends whatever a plugin does: what takes longer than
        `CLOSE_SECONDS` is left behind, and said in the log."""
        stopped = self.thread.close()
        steps: list[tuple[str, Callable[[], None]]] = []
        vcpu, self._vcpu = self._vcpu, None
        if vcpu is not None and stopped:  # else its thread is still in it
            steps.append((f"the vCPU of {self.backend.name}", vcpu.close))
        steps += [(f"device {device.kind}", device.close) for device in self.devices]
        self.devices = ()
        if finish(steps, CLOSE_SECONDS) and stopped:
            self.memory.close()
        else:
            log.warning("machine %s: its RAM stays allocated, as a plugin may still use it", self.name)


def _versioned(payload: Payload, version: int) -> Mapping[str, Any]:
    if payload.version != version:
        raise StateError(
            f"{payload.kind}: version {payload.version} of its state is not known here (known: {version}).",
            "Bring both hosts to the same release of vmf.",
        )
    return payload.body


def _integer(body: Mapping[str, Any], name: str) -> int:
    value = body.get(name)
    if set(body) != {name} or type(value) is not int or not 0 <= value < 1 << 63:
        raise StateError(f"{CLOCK_KIND}: expected just {name}, a non-negative 63-bit number.")
    return value
