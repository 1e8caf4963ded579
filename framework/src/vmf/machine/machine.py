"""A machine: the object that embedding programs and the `vmf` command drive.

    registry = PluginRegistry()
    with Machine(MachineConfig(name="a", memory_mib=256, kernel="/boot/vmlinuz"), registry) as machine:
        machine.start()
        machine.console.add_listener(print)
        machine.wait_finished()

Threads: any thread may call any method; operations that change the state take turns. The guest runs on the vCPU
thread of `vmf.machine.hardware`. A teleport runs on the thread that asked for it and can be cancelled from others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vmf.cpu.backend import CpuBackend, ExitReason, VmExit
from vmf.errors import InvalidStateError, LeaseLost, MachineError, VmfError
from vmf.machine.config import MachineConfig
from vmf.machine.console import SerialConsole
from vmf.machine.contract import AUTO_BACKEND, ContractOrigin, Decision, describe_choice, describe_contract, settle
from vmf.machine.hardware import Hardware
from vmf.machine.listeners import tell
from vmf.machine.operations import Operation, Operations
from vmf.machine.resets import ResetReason, Resets
from vmf.machine.startup import Startup
from vmf.machine.states import MAY_FAIL, MachineState, check_transition
from vmf.machine.storage import MachineStorage
from vmf.machine.teleporter import ProgressListener, Teleporter
from vmf.machine.tracing import Tracing
from vmf.memory.guest import GuestMemory
from vmf.plugins.bridge import PluginRegistry
from vmf.teleport.journal import Journal, MemoryJournal
from vmf.transport.base import Address

if TYPE_CHECKING:
    from vmf.cpu.state import VcpuState
    from vmf.machine.doubt import Doubt
    from vmf.machine.snapshot import SnapshotInfo, SnapshotStore
    from vmf.machine.switch import SwitchSummary
    from vmf.machine.trace import TraceSummary
    from vmf.teleport.check import Blocker
    from vmf.teleport.progress import TeleportSummary

log = logging.getLogger(__name__)

_S = MachineState
StateListener = Callable[[MachineState, MachineState], None]


class Machine:
    """One virtual machine in this process.

    Attributes:
        config: its definition.
        console: its first serial port.
        state: where it is in its life.
        failure: what ended it, one line, when the state is FAILED.
        summary: of the last teleport that ended well here, as source or as target.
    """

    def __init__(self, config: MachineConfig, registry: PluginRegistry | None = None) -> None:
        self.config = config
        self.registry = registry if registry is not None else PluginRegistry()
        self.console = SerialConsole()
        self.failure = ""
        self.summary: TeleportSummary | None = None
        self.backend_choice = ""
        """What `--cpu-backend auto` chose and why, for people; "" when the user chose."""
        self.problem = ""
        """Why the machine was paused without its user's asking, and what to do about it; "" otherwise."""
        self.continues_from = ""
        """The snapshot from whose memory it was started; "" when it booted or came by a teleport."""
        self.contract_origin: ContractOrigin | None = None
        """How the CPUID contract in force (`hardware.cpuid`) came about; None before there is one."""
        self._state = _S.POWERED_OFF
        self._hardware: Hardware | None = None
        self._storage: MachineStorage | None = None
        self.snapshots: SnapshotStore | None = None
        """Where its snapshots are; None for a machine that has no place for any."""
        self.operation = Operations(config.name)
        """Held by one operation at a time. Never taken on the vCPU thread, for which operations wait."""
        self._changed = threading.Condition(threading.Lock())
        """Guards `_state`, for moments only; any thread."""
        self._powering_off = False
        self._crashed = False
        """The vCPU thread has failed and stands still, whatever the state says at this moment."""
        self.handed_over = False
        """A teleport's HANDOVER was sent: nothing may run, or fail, here that could make a second copy run."""
        self.resets = Resets(config.name)
        self._listeners: tuple[StateListener, ...] = ()
        self.journal: Journal = MemoryJournal(config.name)
        """Where its teleports are written down; replace it before the first one."""
        self._teleporter = Teleporter(self)
        self.tracing = Tracing(self)
        self._startup = Startup(config)

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- what it is

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def state(self) -> MachineState:
        return self._state

    @property
    def hardware(self) -> Hardware:
        """The assembled hardware; raises InvalidStateError while powered off."""
        if self._hardware is None:
            raise InvalidStateError(
                f"machine {self.name} is {self._state.value}.", f"Start it with `vmf startvm {self.name}`."
            )
        return self._hardware

    def info(self) -> dict[str, Any]:
        """A snapshot for people and programs: plain data."""
        hardware = self._hardware
        answer: dict[str, Any] = {
            "name": self.name,
            "state": self._state.value,
            "memory_mib": self.config.memory_mib,
            "cpu_backend": self.config.cpu_backend,
            "failure": self.failure,
            "operation": None if (under_way := self.operation.under_way) is None else under_way.describe(),
            "problem": self.problem or ("" if self._state is _S.FAILED else self.resets.problem()),
            "resets": self.resets.info(),
        }
        if hardware is not None:
            answer |= hardware.info() | {
                "cpu_backend_choice": self.backend_choice,
                "tracing": self.tracing.under_way,
                "continues_from": self.continues_from,
                "drives": self.storage.info(),
            }
            if self.contract_origin is not None:
                answer["cpuid"] = describe_contract(hardware.cpuid, self.contract_origin)
        return answer | self._teleporter.info()

    def boot_digest(self) -> dict[str, str]:
        """What a reset would start: SHA-256 of images and command line, by option name."""
        return self._startup.digests()

    # -- state

    def set_state(self, new: MachineState) -> None:
        """Enter a state; raises InvalidStateError when the table of transitions forbids it."""
        with self._changed:
            old = self._state
            if old is new:
                return
            check_transition(self.name, old, new)
            self._state = new
            self._changed.notify_all()
        try:
            tell("the state", self._listeners, old, new)
        finally:
            self.registry.hooks.machine_state_changed(self.name, old.value, new.value)
            if self._crashed and new in MAY_FAIL:  # it failed before anybody could say that it runs
                self.set_state(_S.FAILED)

    def add_state_listener(self, listener: StateListener) -> None:
        """Call `listener(old, new)` after every change, on the thread that caused it; it must not block. What it
        raises is logged."""
        self._listeners = (*self._listeners, listener)

    def wait_for(self, *states: MachineState, timeout: float | None = None) -> MachineState:
        """Wait until the machine is in one of the states; returns it. Raises MachineError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._state in states, timeout):
                wanted = " or ".join(state.value for state in states)
                raise MachineError(f"machine {self.name} is {self._state.value}, not {wanted}, after {timeout} s.")
            return self._state

    def wait_finished(self, timeout: float | None = None) -> MachineState:
        """Wait until it has powered off, gone to another host, or failed."""
        return self.wait_for(_S.POWERED_OFF, _S.TELEPORTED, _S.FAILED, timeout=timeout)

    # -- starting

    def start(self, *, paused: bool = False, peer_password: str | None = None) -> None:
        """Power on and boot. Returns when the guest runs (or stands before its first instruction, if `paused`).

        `peer_password` is that of the teleport peers that are asked before (`cpuid.peers`), None for none.
        """
        with self.operation.long("the start") as operation, self.operation:
            self.set_state(_S.STARTING)
            self.begin_run()
            try:
                if self.snapshots is not None:
                    self.snapshots.refuse_half_restored("started")
                self.storage.open(operation.check)
                if not self._go_on_from_snapshot(operation):
                    decision = settle(self.config, self.registry, self._plug, peer_password)
                    self.contract_origin, self.backend_choice = decision.origin, decision.choice
                    self.hardware.power_on(self._load)
                if not paused:
                    self.hardware.run()
            except BaseException:
                self.scrap()
                self.set_state(_S.POWERED_OFF)
                raise
            self.set_state(_S.RUNNING)
            if paused:
                self.pause()

    def begin_run(self) -> None:
        """Another run: nothing of the one before counts any longer. For this room's modules."""
        self._powering_off = self._crashed = self.handed_over = False
        self.failure = self.problem = ""
        self.resets = Resets(self.name)

    def _go_on_from_snapshot(self, operation: Operation) -> bool:
        """Where the machine was put back to a snapshot with memory; False for a plain boot."""
        self.continues_from = ""
        if self.snapshots is None:
            return False
        from vmf.machine import snapshot

        self.continues_from = snapshot.resume(self, self.snapshots, operation.observed(None))
        if not self.continues_from:
            return False
        self.snapshots.forget_resume()  # once only: from here on the disks go on
        return True

    def take_snapshot(
        self, name: str, description: str = "", progress: Callable[[str, int, int], None] | None = None
    ) -> SnapshotInfo:
        """Write down everything of this machine (running or paused), and go on; it stands still meanwhile.

        Args:
            progress: called on this thread with (what, bytes done, bytes in all).

        Raises InvalidStateError, ConfigError when the name is taken, HomeError when it cannot be written,
        OperationCancelled after `cancel_operation`. After any of them there is no snapshot, and the machine continues.
        """
        from vmf.machine import snapshot

        if self.snapshots is None:
            raise MachineError(f"machine {self.name} has no place for snapshots.", "Set `snapshots` first.")
        return snapshot.take(self, self.snapshots, name, description, progress)

    def _plug(self, decision: Decision) -> None:
        hardware = self._hardware or self.assemble(decision.backend)
        hardware.plug_vcpu(decision.table, decision.tsc_khz, decision.backend)

    def assemble(self, backend: CpuBackend | None = None) -> Hardware:
        """Make the hardware, without a vCPU yet. For this room's modules.

        Args:
            backend: None for the one of the definition; with "auto" the most preferred one that works here.
        """
        if backend is None:
            name = self.config.cpu_backend
            backend = self.registry.choose_cpu_backend(name)
            self.backend_choice = ""
            if name == AUTO_BACKEND:
                self.backend_choice = describe_choice(backend, self.registry.rank_cpu_backends()[1])
        config = self.config
        self._hardware = Hardware(
            self.name,
            config.memory_mib,
            backend,
            lambda environment: self.registry.devices(environment, config.devices, config.device_options),
            self.console,
            on_exit=self._on_exit,
            on_crash=self._on_crash,
            request_power_off=self._guest_power_off,
            request_reset=self._guest_reset,
            request_pause=self._pause_for,
            drives=self.storage.drives,
        )
        self.storage.require_claimed()
        self.console.accept_input()
        return self._hardware

    @property
    def storage(self) -> MachineStorage:
        """The drives of this run; made anew after a power-off."""
        if self._storage is None:
            self._storage = MachineStorage(self.config, self.registry, self._on_lease_lost)
        return self._storage

    def _on_lease_lost(self, error: LeaseLost) -> None:
        """On an I/O thread: another machine has taken an image over. This one must stand still."""
        hardware = self._hardware
        if hardware is not None:
            hardware.thread.post(lambda: hardware.halt(freeze_time=True))
        self._fail(str(error))

    def _load(self, memory: GuestMemory) -> VcpuState:
        return self._startup.load(memory, self.hardware.tsc_khz, vendor=self.hardware.cpuid.vendor)

    # -- running

    def change_medium(self, port: int, medium: str) -> None:
        """Put another medium (an image's URI; "" for none) into the DVD or floppy drive at `port`, until it ends.

        The definition stays as it is. Raises InvalidStateError unless running or paused, NotFoundError without such
        a drive, ConfigError for a hard disk, StorageError when the medium cannot be used; then the old one is in it.
        """
        with self.operation:
            if self._state not in (_S.RUNNING, _S.PAUSED):
                raise self.illegal("given another medium", "running or paused")
            self.storage.change_medium(port, medium, self.hardware.change_medium)

    def pause(self) -> None:
        """Stop the guest; its time stands still until `resume`."""
        with self.operation:
            if self._state is not _S.RUNNING:
                raise self.illegal("paused", "running")
            self.hardware.halt(freeze_time=True)
            self.set_state(_S.PAUSED)

    def resume(self) -> None:
        """Let a paused guest go on."""
        with self.operation:
            if self._state is not _S.PAUSED:
                raise self.illegal("resumed", "paused")
            self.problem = ""
            self.hardware.run()
            self.set_state(_S.RUNNING)

    def reset(self) -> None:
        """Restart the guest as by the reset button: RAM is lost, the images are loaded again."""
        with self.operation:
            if self._state not in (_S.RUNNING, _S.PAUSED, _S.FAILED) or self.handed_over:
                raise self.illegal("reset", "running or paused")
            self.resets.note(ResetReason.USER)
            if self._state is _S.PAUSED:
                self._restart(run=False)
                return
            crashed, self._crashed = self._crashed, False
            try:
                self.hardware.halt(freeze_time=False)
                self._restart(run=True)
            except BaseException as error:
                # The guest has gone, at least in part.
                self._crashed = crashed
                self._on_crash(error)
                raise
            if self._state is _S.FAILED:
                self.failure = ""
                self.set_state(_S.RUNNING)

    @property
    def powering_off(self) -> bool:
        """The guest has switched itself off; the machine will follow in a moment."""
        return self._powering_off

    def _restart(self, *, run: bool) -> None:
        self.hardware.power_on(self._load, keep_mapping=self._teleporter.under_way)
        if run:
            self.hardware.run()

    def illegal(self, action: str, wanted: str) -> InvalidStateError:
        return InvalidStateError(
            f"machine {self.name} is {self._state.value} and cannot be {action}: it would have to be {wanted}.",
            f"See `vmf showvminfo {self.name}`.",
        )

    def type(self, data: bytes) -> int:
        """Type at the serial console; how many bytes were taken. The caller keeps the rest.

        None are taken while a megabyte waits, during the handover of a teleport, and until a machine that waits for one
        has arrived. Raises InvalidStateError without hardware (powered off).
        """
        return self.hardware.type(data)

    # -- on the vCPU thread: what the guest and the engine do

    def _on_exit(self, exit_: VmExit) -> None:
        if exit_.reason is ExitReason.SHUTDOWN:
            self._reset_by(ResetReason.TRIPLE_FAULT)
        elif exit_.reason is ExitReason.HALTED:
            self._guest_power_off()  # interrupts off for good: how a guest without ACPI switches itself off
        else:
            self._fail(f"CPU backend {self.hardware.backend.name}: {exit_.detail or exit_.reason.value}")

    def _on_crash(self, error: BaseException) -> None:
        log.debug("machine %s", self.name, exc_info=error)  # for the plugin's authors
        self._fail(str(error) if isinstance(error, VmfError) else f"{type(error).__name__}: {error}")

    def _fail(self, why: str) -> None:
        if self.handed_over:
            log.error("machine %s, after it was handed over: %s", self.name, why)
            return
        log.info("machine %s failed: %s", self.name, why)  # its process says so, too
        self.failure = why
        self._crashed = True
        self._teleporter.request_cancel(f"machine {self.name} failed: {why.rstrip('.')}")
        self.tracing.cancel(wait=False, reason="the machine failed")
        if self._state in MAY_FAIL:
            self.set_state(_S.FAILED)

    def _guest_reset(self) -> None:
        self._reset_by(ResetReason.GUEST)

    def _reset_by(self, reason: ResetReason) -> None:
        """The guest asked for a reset (a port, or a triple fault): restart it between two slices.

        A machine that somebody halted in the meantime (a pause, the handover) is reset but left halted.
        """
        if why := self.resets.note(reason):
            self._fail(why)
            return
        hardware = self.hardware
        hardware.thread.post(lambda: self._restart(run=not hardware.held))

    def _pause_for(self, why: str) -> None:
        """A device cannot continue before its user has done something (made room on a disk, say)."""
        if self.problem:
            return
        self.problem = why
        log.warning("machine %s pauses: %s", self.name, why)
        threading.Thread(target=self._pause_quietly, name=f"pause-{self.name}", daemon=True).start()

    def _pause_quietly(self) -> None:
        try:
            self._teleporter.cancel(wait=True, reason=f"the machine has to pause: {self.problem.rstrip('.')}")
            self.operation.wait_long()
            self.pause()
        except VmfError as error:
            log.info("machine %s: %s", self.name, error)  # it is paused already, or has ended meanwhile

    def _guest_power_off(self) -> None:
        self._powering_off = True
        hardware = self.hardware
        hardware.thread.post(lambda: hardware.halt(freeze_time=False))
        threading.Thread(target=self._power_off_quietly, name=f"poweroff-{self.name}", daemon=True).start()

    def _power_off_quietly(self) -> None:
        try:
            self._power_off("the guest switched itself off")
        except InvalidStateError:
            pass  # somebody else powered it off, or it has just left for another host

    # -- ending

    def cancel_operation(self, *, wait: bool = False, reason: str = "") -> str:
        """Cancel the long operation under way (a start, a snapshot, a trace, a teleport); "" when there is none.

        Returns what it was, for people. The machine then is what it was before the operation.
        """
        if found := self.operation.cancel(wait=wait, reason=reason):
            return found
        if self.cancel_trace(wait=wait, reason=reason or "cancelled"):
            return "the trace"
        if self._state is not _S.TELEPORTING_IN and self.cancel_teleport(wait=wait):
            return "the teleport"
        return ""

    def power_off(self) -> tuple[str, ...]:
        """Pull the plug; what is under way is cancelled first.

        It ends although its storage does not answer: returns what may be missing there, a sentence each.
        """
        return self._power_off("the machine was powered off")

    def _power_off(self, why: str) -> tuple[str, ...]:
        waited = self._state in (_S.TELEPORTING_IN, _S.STARTING)
        self._teleporter.cancel(wait=True, reason=why)
        self.cancel_trace(wait=True, reason=why)
        self.operation.cancel(wait=True, reason=why)
        with self.operation:
            if waited and self._state is _S.POWERED_OFF:
                return ()  # that was all: it waited for a teleport, or was about to start
            if self._state in (_S.POWERED_OFF, _S.STOPPING):
                raise self.illegal("powered off", "running or paused")
            try:
                if self._state is not _S.TELEPORTING_IN:
                    self.set_state(_S.STOPPING)
            except InvalidStateError:
                raise
            except BaseException:  # the user's Ctrl-C while listeners were told
                self._end()
                raise
            return self._end()

    def _end(self) -> tuple[str, ...]:
        try:
            return self.scrap()
        finally:
            self.set_state(_S.POWERED_OFF)

    def scrap(self) -> tuple[str, ...]:
        """Take the hardware apart; what its storage did not take. For this room's modules."""
        self._teleporter.stop_listening()
        self._teleporter.close_witness()
        self.console.hold_input()  # first: what is taken from here on would be lost
        self.console.drop_input()
        hardware, self._hardware, self.contract_origin = self._hardware, None, None
        if hardware is not None:
            hardware.close()
        storage, self._storage = self._storage, None
        return () if storage is None else storage.close()  # after the devices, which may have written until now

    def close(self) -> None:
        """End it, whatever it does; idempotent."""
        try:
            if self._state is not _S.POWERED_OFF:
                self.power_off()
        except InvalidStateError:
            with self.operation:
                self.scrap()
                if self._state in (_S.STARTING, _S.STOPPING):  # interrupted halfway
                    self.set_state(_S.POWERED_OFF)

    # -- another CPU backend, and watching the guest

    def switch_backend(self, name: str) -> SwitchSummary:
        """Go on with another CPU backend, live; with the present one's name, on a fresh vCPU of it.

        Raises InvalidStateError unless running or paused, PluginError or BackendUnavailable, TeleportBlocked with
        everything in the machine's CPUID contract that stands against it, or StateError when that backend cannot
        hold the vCPU's state. After any error the machine goes on as before.
        """
        from vmf.machine import switch

        with self.operation:
            if self._state not in (_S.RUNNING, _S.PAUSED):
                raise self.illegal("switched to another CPU backend", "running or paused")
            self.tracing.refuse("switched to another CPU backend")
            hardware, level = self.hardware, self.level
            if name == "auto":
                backend = self.registry.choose_cpu_backend(
                    name, lambda other: "; ".join(map(str, switch.find_blockers(self.name, hardware, other, level)))
                )
            else:
                backend = self.registry.choose_cpu_backend(name)
            summary = switch.switch(self.name, hardware, backend, level)
            self.backend_choice = f"switched from {summary.before} to {summary.after} while it ran"
            return summary

    def trace(
        self,
        instructions: int,
        output: str | Path,
        *,
        json_lines: bool = False,
        progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> TraceSummary:
        """Write the next instructions that the guest executes to a file; returns when they are there.

        The machine goes on meanwhile, slower; from a backend that cannot trace it is switched to one that can, and
        back. A trace that is cancelled or ends with the machine is a summary too, with `complete` false.

        Args:
            instructions: how many; a repeated string instruction counts once.
            output: the file, which is replaced.
            json_lines: write a JSON object a line instead of text.
            progress: called about twice a second on this thread.

        Raises InvalidStateError unless running, BackendUnavailable or TeleportBlocked when no backend can trace this
        machine, MachineError when the file cannot be written.
        """
        return self.tracing.run(instructions, Path(output), json_lines, progress)

    def cancel_trace(self, *, wait: bool = False, reason: str = "cancelled") -> bool:
        """End a trace under way; False when there is none."""
        return self.tracing.cancel(wait=wait, reason=reason)

    @property
    def level(self) -> int:
        """Portability level of the CPUID contract in force; 0 while there is none."""
        return 0 if self.contract_origin is None else self.contract_origin.number

    # -- teleports

    def teleport(
        self,
        host: str,
        port: int,
        *,
        transport: str = "tcp",
        max_downtime_ms: int = 250,
        timeout_s: float | None = None,
        progress: ProgressListener | None = None,
        options: Mapping[str, Any] | None = None,
        password: str | None = None,
    ) -> TeleportSummary:
        """Move this machine to a host that waits for it; returns once it runs there.

        Raises TeleportError (or a subclass) when it did not happen: then the machine goes on here as before, except
        after TeleportUncertain, when the handover was sent and nobody confirmed it.

        Args:
            host, port: where the target waits.
            transport: name of the transport plugin.
            max_downtime_ms: goal for the time during which the guest runs nowhere.
            timeout_s: give up after so many seconds; None for never.
            progress: called with every progress event, on this thread.
            options: settings of the transport: for `tls` the strings `tls_dir` and `tls_hostname`.
            password: that was set at the target. A target that does not show that it knows it is refused.
        """
        address = Address(transport, host, port, options or {})
        return self._teleporter.teleport(address, max_downtime_ms, timeout_s, progress, password)

    @property
    def teleport_notes(self) -> tuple[str, ...]:
        """What the target of the last `check_teleport` without a blocker said that the user should know."""
        return self._teleporter.noted

    def check_teleport(
        self,
        host: str,
        port: int,
        *,
        transport: str = "tcp",
        options: Mapping[str, Any] | None = None,
        password: str | None = None,
    ) -> tuple[Blocker, ...]:
        """Run every check of a teleport against the machine that waits there, and move nothing.

        Both machines go on undisturbed. Returns everything that speaks against the teleport; () when it can go.
        Raises InvalidStateError unless this machine runs or is paused, TransportError or TeleportError when the
        check itself did not happen (nobody waits there, say).
        """
        return self._teleporter.check(Address(transport, host, port, options or {}), password)

    @property
    def doubt(self) -> Doubt | None:
        """The teleport whose handover nobody confirmed, until it is resolved."""
        return self._teleporter.doubt

    def teleport_in_doubt(
        self, *, asking: bool = True, peer: Address | None = None, password: str | None = None
    ) -> dict[str, Any] | None:
        """What is known of a teleport whose handover nobody confirmed, as plain data; None without one.

        Args:
            asking: ask the target, too, which takes up to some seconds.
            peer: whom to ask; by default where it was sent.
            password: that is set there; by default the one that was given for the teleport.
        """
        return self._teleporter.describe_doubt(asking=asking, peer=peer, password=password)

    def release_teleporter(self) -> bool:
        """After an arrival that its source did not confirm: be asked about it no more, and free the port.

        Whoever waits there next answers in its place, if it belongs to the same home. False when nothing was to free.
        """
        return self._teleporter.close_witness()

    def resolve_teleport(
        self, how: str, *, force: bool = False, peer: Address | None = None, password: str | None = None
    ) -> str:
        """Decide what becomes of a machine in doubt; returns what was found and done, for people.

        Args:
            how: "resume": it goes on here; "discard": it is given up here.
            force: even where that may make two of it, or lose it: then you know better than the target.
            peer, password: as of `teleport_in_doubt`.

        Raises TeleportError that says what may happen, when it must not be done without force.
        """
        return self._teleporter.resolve(how, force=force, peer=peer, password=password)

    def cancel_teleport(self, *, wait: bool = False) -> bool:
        """Cancel a teleport under way, in or out; False when there was none (any more)."""
        return self._teleporter.cancel(wait=wait)

    def listen(
        self,
        address: str | None = None,
        port: int | None = None,
        *,
        transport: str | None = None,
        insecure: bool | None = None,
    ) -> Address:
        """Power on as a teleport target and start to listen, by default as configured; returns the real address.

        Raises ConfigError when other hosts could reach it with neither TLS nor a password, unless `insecure`.
        """
        teleporter = self.config.teleporter
        where = Address(
            transport if transport is not None else teleporter.transport,
            address if address is not None else teleporter.address,
            port if port is not None else teleporter.port,
            teleporter.transport_options(),
        )
        return self._teleporter.listen(where, insecure=teleporter.insecure if insecure is None else insecure)

    def wait_for_teleport(self, progress: ProgressListener | None = None) -> TeleportSummary:
        """After `listen`: wait until a machine has arrived and runs here. Failed attempts leave it waiting.

        Raises TeleportCancelled after `cancel_teleport` (or `power_off`); then the machine is powered off.
        """
        return self._teleporter.wait(progress)


def wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    """Poll every millisecond; for embedding programs that wait for guest output."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


__all__ = ["Machine", "MachineState", "wait_until"]
