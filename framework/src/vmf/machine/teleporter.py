"""The teleports of one machine, out and in: who may start one, how it is cancelled, and which state it ends in.

What happens on the wire is `vmf.teleport`; what a teleport sees of the machine is `vmf.machine.teleport_view`. At most
one teleport is under way; it runs on the thread that asked for it and can be cancelled from any other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vmf.errors import ConfigError, InvalidStateError, TeleportBlocked, TeleportCancelled, TeleportUncertain
from vmf.machine.doubt import Doubt, describe
from vmf.machine.states import MachineState
from vmf.machine.teleport_view import TeleportView
from vmf.teleport.link import Canceller, CancelRequest
from vmf.teleport.protocol import handover
from vmf.transport.base import Address, Channel, Listener, Transport

if TYPE_CHECKING:
    from vmf.machine.machine import Machine
    from vmf.teleport.check import Blocker
    from vmf.teleport.progress import ProgressEvent, TeleportSummary

CONNECT_TIMEOUT = 10.0
"""Seconds to reach a teleport target."""
CHECK_TIMEOUT = 110.0
"""Seconds for the answer to a check: more than the plugins at the target may take together, see `vmf.plugins.hooks`. A
target that has died is noticed earlier, as it does not show that it lives."""

_S = MachineState
ProgressListener = Callable[["ProgressEvent"], None]


def check_exposure(name: str, transport: Transport, where: Address) -> None:
    """Raise ConfigError when a machine without a password would let any other host in, as nobody asked it to."""
    if transport.authenticates or transport.is_local(where):
        return
    at = f"{where.host}, every address of this host," if where.host in ("", "*", "0.0.0.0", "::") else where.host
    raise ConfigError(
        f"machine {name} would wait on {at} with neither TLS nor a password: whoever reaches it could start a machine "
        f"of his own here in its place, and read and alter one that comes.",
        f"Set a password (`vmf modifyvm {name} --teleporter-password-file stdin`), use TLS (`vmf modifyvm {name} "
        f"--teleporter-transport tls`), wait on this host only (`--teleporter-address localhost`), or, where everybody "
        f"on the network is trusted, say so: `vmf startvm {name} --insecure`.",
    )


class Teleporter:
    """One machine's teleports; `Machine`'s methods of the same names are its public face.

    Attributes:
        noted: what the target of the last check said that the user should know.
        listener: what a target listens on, while it waits.
        witness: what it listens on after an arrival that the source did not confirm, to be asked about it.
        doubt: the teleport out that nobody confirmed, until it is resolved.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.noted: tuple[str, ...] = ()
        self.listener: Listener | None = None
        self.witness: Listener | None = None
        self.doubt: Doubt | None = None
        self._cancel: CancelRequest | None = None
        self._given_up = False
        self._done = threading.Event()
        self._done.set()

    def info(self) -> dict[str, Any]:
        """Where it can be reached, for `Machine.info`: plain data."""
        answer: dict[str, Any] = {}
        if (witness := self.witness) is not None:
            answer["answers_at"] = str(witness.address)
        if (listener := self.listener) is not None:
            answer["teleporter_address"] = str(listener.address)
            answer["teleporter_addresses"] = [str(each) for each in listener.addresses]
            answer["teleporter_notices"] = list(listener.notices)
        return answer

    @property
    def under_way(self) -> bool:
        """A machine is on its way out or in, or is waited for."""
        return not self._done.is_set()

    def request_cancel(self, reason: str = "") -> bool:
        """Ask the teleport under way to end, from any thread; False when there is none.

        `reason` is a clause for people, which the other side is told, too.
        """
        cancel = self._cancel
        if cancel is None:
            return False
        cancel.ask(reason)
        return True

    def cancel(self, *, wait: bool, reason: str = "") -> bool:
        if not self.request_cancel(reason):
            return False
        listener = self.listener
        if listener is not None:
            listener.shutdown()
        if wait:
            self._done.wait(30)
        return True

    # -- out

    def teleport(
        self,
        address: Address,
        max_downtime_ms: int,
        timeout_s: float | None,
        progress: ProgressListener | None,
        password: str | None = None,
    ) -> TeleportSummary:
        from vmf.teleport.source import SourceOptions, teleport_source

        machine = self._machine
        going_on = {_S.RUNNING: _S.TELEPORTING, _S.PAUSED: _S.TELEPORTING_PAUSED}
        with machine.operation:
            before = machine.state
            if before not in going_on:
                raise machine.illegal("teleported", "running or paused")
            machine.tracing.refuse("teleported")
            cancel = self._cancel = CancelRequest()
            self._done.clear()
            machine.set_state(going_on[before])
        view = TeleportView(machine)
        try:
            timeout_s = self._prepare(view, timeout_s, cancel, progress)
            patience = CONNECT_TIMEOUT if timeout_s is None else min(timeout_s, CONNECT_TIMEOUT)

            def connect() -> Channel:
                return machine.registry.transport(address.scheme).connect(address, patience)

            channel = connect()
            try:
                options = SourceOptions(
                    max_downtime_ms=max_downtime_ms, timeout_s=timeout_s, password=password, peer=address
                )
                listener = self._observed(progress, "source")
                machine.summary = teleport_source(view, channel, options, listener, cancel, connect)
            finally:
                channel.close()
            return machine.summary
        except TeleportUncertain as error:
            with machine.operation:  # nobody resolves it halfway
                self.doubt = Doubt.of(error, address, before is _S.RUNNING, view, password)
                machine.set_state(_S.UNCERTAIN)
                machine.hardware.halt(freeze_time=True)  # however long it takes until somebody decides
            raise
        except BaseException:
            if machine.state is going_on[before]:
                machine.set_state(before)
            raise
        finally:
            self._cancel = None
            self._done.set()

    @staticmethod
    def _prepare(
        view: TeleportView, timeout_s: float | None, cancel: threading.Event, progress: ProgressListener | None
    ) -> float | None:
        """Ask the plugins here before the target waits for us, which it does not for long; the time that is left."""
        from vmf.teleport.progress import Reporter
        from vmf.teleport.protocol.states import Phase

        report = Reporter("source", progress)

        def slow(plugin: str) -> None:
            report.phase(Phase.CHECK, ram_bytes=view.memory.size, message=f"checking: waiting for the {plugin}")

        canceller = Canceller(cancel, timeout_s, now=lambda: None, late=lambda: None)
        began = time.monotonic()
        try:
            canceller.check()
            view.prepare(canceller.check, slow)
            canceller.check()
        finally:
            canceller.close()
        return None if timeout_s is None else max(0.001, timeout_s - (time.monotonic() - began))

    def check(self, address: Address, password: str | None = None) -> tuple[Blocker, ...]:
        from vmf.teleport.source import SourceOptions, teleport_source

        machine = self._machine
        if machine.state not in (_S.RUNNING, _S.PAUSED):
            raise machine.illegal("checked for a teleport", "running or paused")
        view = TeleportView(machine)
        view.prepare(lambda: None)
        channel = machine.registry.transport(address.scheme).connect(address, CONNECT_TIMEOUT)
        try:
            options = SourceOptions(check_only=True, timeout_s=CHECK_TIMEOUT, password=password)
            self.noted = teleport_source(view, channel, options).notes
        except TeleportBlocked as error:
            return error.blockers
        finally:
            channel.close()
        return ()

    # -- out, and nobody knows

    def resolve(self, how: str, *, force: bool, peer: Address | None, password: str | None) -> str:
        """Decide what becomes of a machine in doubt; one sentence about what was found and done."""
        machine = self._machine
        with machine.operation:
            doubt = self.doubt
            if doubt is None or machine.state is not _S.UNCERTAIN:
                raise InvalidStateError(
                    f"machine {machine.name} is {machine.state.value}: there is no teleport to resolve.",
                    f"See `vmf showvminfo {machine.name}`.",
                )
            found = doubt.ask(machine.registry, machine.name, peer, password)
            leased = machine.storage.leased
            if how == "resume":
                found.permit(handover.may_resume(found.testimony.answer, leased), machine.name, "resume", force)
                doubt.resume()
                self.doubt = None
                machine.set_state(_S.RUNNING if doubt.was_running else _S.PAUSED)
                return f"{found.said} Machine '{machine.name}' goes on here."
            found.permit(handover.may_discard(found.testimony.answer), machine.name, "discard", force)
            doubt.discard()
            self.doubt = None
            if found.testimony.answer is handover.Answer.RUNS:
                machine.set_state(_S.TELEPORTED)
                return f"{found.said} It is given up here."
        machine.power_off()
        return f"{found.said} Machine '{machine.name}' is given up here and powered off."

    def describe_doubt(self, *, asking: bool, peer: Address | None, password: str | None) -> dict[str, Any] | None:
        """What is known of the teleport in doubt, and, if `asking`, what the target says; None without one."""
        machine, doubt = self._machine, self.doubt
        if doubt is None:
            return None
        found = doubt.ask(machine.registry, machine.name, peer, password) if asking else None
        return describe(doubt.entry, found, orphaned=False, leased=machine.storage.leased) | {"why": doubt.why}

    def stop_listening(self) -> None:
        """At the end of a machine that listens and nobody waits with it."""
        listener = self.listener
        if listener is not None and self._done.is_set():
            self.listener, self._cancel, self._given_up = None, None, True
            listener.close()

    def close_witness(self) -> bool:
        """Be asked no more; False when it was not."""
        witness, self.witness = self.witness, None
        if witness is None:
            return False
        witness.close()
        return True

    def _observed(self, progress: ProgressListener | None, role: str) -> ProgressListener:
        """Pass events on, and tell the life-cycle hooks of every phase."""
        phase = ""

        def observe(event: ProgressEvent) -> None:
            nonlocal phase
            name = getattr(event, "phase", phase)
            name = getattr(name, "value", name)
            if name != phase:
                phase = name
                self._machine.registry.hooks.teleport_phase(self._machine.name, role, phase)
            if progress is not None:
                progress(event)

        return observe

    # -- in

    def listen(self, where: Address, *, insecure: bool) -> Address:
        machine = self._machine
        if not insecure and machine.config.teleporter.password_verifier is None:
            check_exposure(machine.name, machine.registry.transport(where.scheme), where)
        if machine.snapshots is not None:
            machine.snapshots.refuse_half_restored("made to wait for a teleport")
        with machine.operation:
            machine.set_state(_S.TELEPORTING_IN)
            machine.begin_run()
            try:
                machine.boot_digest()
                machine.storage.prepare()
                machine.assemble()
                machine.console.hold_input()  # until the guest is here
                listener = self.listener = machine.registry.transport(where.scheme).listen(where)
            except BaseException:
                machine.scrap()
                machine.set_state(_S.POWERED_OFF)
                raise
            self._cancel = CancelRequest()
            self._given_up = False
        return listener.address

    def wait(self, progress: ProgressListener | None) -> TeleportSummary:
        from vmf.teleport.authentication import Verifier
        from vmf.teleport.target import TargetOptions, wait_for_teleport

        machine = self._machine
        with machine.operation:
            if self._given_up:
                raise TeleportCancelled(f"machine {machine.name} was powered off before it waited for a teleport.")
            cancel, listener = self._cancel, self.listener
            if machine.state is not _S.TELEPORTING_IN or cancel is None or listener is None:
                raise machine.illegal("waiting for a teleport", "listening")
            self._done.clear()  # before the look at `cancel`: who sets it then either is seen or waits for us
            if cancel.is_set():
                self._done.set()
                machine.scrap()
                machine.set_state(_S.POWERED_OFF)
                raise TeleportCancelled(f"machine {machine.name} was told not to wait for a teleport.")
        try:
            view = TeleportView(machine)
            text = machine.config.teleporter.password_verifier
            options = TargetOptions(verifier=None if text is None else Verifier.parse(text))
            machine.summary = wait_for_teleport(view, listener, self._observed(progress, "target"), cancel, options)
            if not machine.summary.confirmed:
                self.witness = listener
            return machine.summary
        finally:
            self.listener = None
            if self.witness is not listener:
                listener.close()
            # Before `_done`: whoever waits for that finds a machine that is powered off, and takes nothing apart twice.
            with machine.operation:
                if machine.state is _S.TELEPORTING_IN:
                    machine.scrap()
                    machine.set_state(_S.POWERED_OFF)
            self._cancel = None
            self._done.set()
