"""The process that runs one machine: the body of `vmf startvm`.

Theory of operation. The main thread only waits: for signals, which arrive as bytes in a pipe (a handler may interrupt
the main thread anywhere, so it must not touch locks), and for the thread that lives the machine's life: boot or wait
for a teleport, run, finish. Control and console are served from before the machine starts until after it ended, so
every state can be asked for and no answer is lost. The first SIGINT, SIGTERM or SIGHUP powers the machine off and
lets the process end in order; a second one, `SAME_REQUEST_S` later or more, ends it at once (the machine is then
"aborted").

A detached machine is the same function in a new session, with its messages in vmm.log; it reports readiness, or its
error, as one line of JSON on a pipe to whoever started it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import define, evolve

from vmf.control import rpc, terminal
from vmf.control.console import ConsoleServer
from vmf.control.keeper import Keeper
from vmf.control.seam import ControlledMachine, Plain, TakesSnapshots, WritesJournal
from vmf.control.server import ControlServer
from vmf.control.signals import SAME_REQUEST_S, SIGNALS, SignalPipe, end_at_once
from vmf.control.vmm_log import MachineLog, rotate
from vmf.errors import InvalidStateError, MachineError, OperationCancelled, TeleportCancelled, VmfError
from vmf.machine.config import MachineConfig
from vmf.machine.home import Home, Tenure
from vmf.reading import open_to_append

log = logging.getLogger("vmf.process")

MachineFactory = Callable[[MachineConfig, Callable[[VmfError], None]], ControlledMachine]
FATE_S = 0.5
"""How long a process that is to end at once tries to note that, so that nobody looks for another cause."""
INTERRUPTED_START_S = 5.0
"""A start that is interrupted may end in an orderly way for so long."""
LINGER_S = 0.05
"""A machine that has left is taken apart so much later: it may run on this very host now, and need the processor."""


class Observer:
    """What the process tells about its machine while it goes on; every method may be called from any thread."""

    def waiting(self, address: str) -> None:
        """It listens for a teleport at this address (`scheme:host:port`, the real port)."""

    def arriving(self, event: Mapping[str, Any]) -> None:
        """Progress of an arriving teleport."""

    def arrived(self, summary: Mapping[str, Any]) -> None:
        """The teleport is done."""

    def running(self, info: Mapping[str, Any]) -> None:
        """The guest runs here."""

    def state_changed(self, old: str, new: str) -> None:
        """Every change of state."""

    def notice(self, text: str) -> None:
        """One line for people."""


@define
class _Outcome:
    state: str = "poweredoff"
    error: BaseException | None = None
    failure: str = ""
    """Why the machine failed, if it did and was not reset since."""


def run_machine_process(
    home: Home,
    name: str,
    observer: Observer | None = None,
    *,
    make_machine: MachineFactory | None = None,
    insecure: bool = False,
    peer_password: str | None = None,
) -> str:
    """Run a machine in this process until it has finished; its last state ("poweredoff" or "teleported").

    Call it on the main thread: it handles signals. With `insecure` it waits for a teleport wherever the definition
    says; `peer_password` is that of the teleport peers that are asked before it boots. Raises whatever kept the machine
    from starting, and InvalidStateError when another process runs it.
    """
    watcher = observer if observer is not None else Observer()
    # Late, as they need what only teleports need, and `vmf startvm --help` does not.
    from vmf.machine.doubt import refuse_in_doubt
    from vmf.machine.identity import strangers
    from vmf.machine.journal import FileJournal, clear_interrupted

    with (
        home.tenure(name) as tenure,
        MachineLog(tenure.paths.vmm_log, name) as vmm_log,
        contextlib.ExitStack() as stack,
    ):
        paths, config = tenure.paths, home.load(name)
        if insecure:
            config = evolve(config, teleporter=evolve(config.teleporter, insecure=True))
        outcome = _Outcome()
        try:
            if config.teleporter.enabled:
                _make_room(home, config)
            else:  # what only waits can make no second copy
                refuse_in_doubt(home, name)
            clear_interrupted(home, name)
            for stranger in strangers(paths.directory):
                watcher.notice(f"warning: {stranger} is of another machine than '{name}' and is not used.")
            machine = (make_machine or _real_machine)(config, lambda problem: watcher.notice(f"warning: {problem}"))
            if isinstance(machine, WritesJournal):
                machine.use_journal(FileJournal(home, name))
            if isinstance(machine, TakesSnapshots):
                from vmf.machine.snapshot import SnapshotStore

                store = SnapshotStore(name, paths.snapshots)
                store.sweep()
                machine.use_snapshots(store)
            machine.add_state_listener(lambda old, new: _note_state(machine, old, new, outcome))
            with contextlib.closing(machine):
                _serve(machine, config, tenure, watcher, outcome, peer_password, stack)
        except VmfError as error:
            outcome.error = error
        if outcome.error is not None:
            vmm_log.tell(outcome.error)
        detail = str(outcome.error) if isinstance(outcome.error, VmfError) else ""
        if outcome.failure:
            detail = f"the machine had failed: {outcome.failure} {detail}".rstrip()
        try:
            home.record_end(name, outcome.state, detail)
        except VmfError as error:
            watcher.notice(f"warning: {error}")
        if outcome.error is not None:
            raise outcome.error
        return outcome.state


def _make_room(home: Home, config: MachineConfig) -> None:
    """Have another machine of this home stop answering questions at the port that this one is to wait on.

    It arrived there, and its source did not confirm that; whoever waits there now answers in its place.
    """
    from vmf.control.asking import ask_all
    from vmf.control.client import ControlClient

    def release(client: ControlClient) -> None:
        at = str(client.info().get("answers_at", ""))
        if at.rpartition(":")[2] == str(config.teleporter.port):
            client.release_teleporter()

    ask_all(home, [other for other in home.running() if other != config.name], release)


def _real_machine(config: MachineConfig, report: Callable[[VmfError], None]) -> ControlledMachine:
    from vmf.control.adapter import MachineAdapter
    from vmf.plugins.bridge import PluginRegistry

    return MachineAdapter(config, PluginRegistry(on_problem=report))


def _serve(
    machine: ControlledMachine,
    config: MachineConfig,
    tenure: Tenure,
    watcher: Observer,
    outcome: _Outcome,
    peer_password: str | None,
    stack: contextlib.ExitStack,
) -> None:
    """Until the machine has ended. Signals stay handled until `stack` ends: they may come twice in one instant."""
    paths = tenure.paths
    console = ConsoleServer(machine.console_write, paths)
    machine.add_console_listener(console.output)
    machine.add_state_listener(watcher.state_changed)
    machine.add_state_listener(lambda old, new: _tell_problem(machine, watcher, new))
    control = ControlServer(machine, paths.control_socket)
    console.start()
    control.start()
    stopping = threading.Event()
    signals = stack.enter_context(SignalPipe())
    with Keeper(tenure, control, console, lambda: _stand_still(machine)):

        def live() -> None:
            try:
                outcome.state = _live(machine, config, watcher, stopping, peer_password)
            except BaseException as error:  # noqa: BLE001 - raised again on the main thread
                outcome.error = error
            os.write(signals.writer, b"\0")

        life = threading.Thread(target=live, name="vmf-life", daemon=True)
        life.start()
        same_request_until = 0.0
        while received := os.read(signals.reader, 1):
            if received == b"\0":
                break
            if received[0] not in SIGNALS:
                continue  # another part of this process handles it; its number comes here all the same
            if stopping.is_set():
                if time.monotonic() < same_request_until:
                    continue
                terminal.restore()  # before anything is said there
                watcher.notice("Ended at once.")
                name = signal.Signals(received[0]).name
                # Beside, as the file system may be what everything waits for.
                noting = threading.Thread(target=tenure.note_fate, args=(f"it was ended at once by a second {name}",))
                noting.daemon = True
                noting.start()
                noting.join(FATE_S)
                end_at_once(received[0])
            same_request_until = time.monotonic() + SAME_REQUEST_S
            stopping.set()
            watcher.notice(f"{signal.Signals(received[0]).name}: powering off (once more to end at once) ...")
            threading.Thread(target=_power_off, args=(machine, watcher), name="vmf-poweroff", daemon=True).start()
        life.join()
        signals.wind_up()
    if outcome.state == "teleported":
        time.sleep(LINGER_S)
    control.close()
    console.close(outcome.state)


def _note_state(machine: ControlledMachine, old: str, new: str, outcome: _Outcome) -> None:
    """Write a change of state into the log, and a failure with its reason, which the machine itself forgets."""
    log.info("%s -> %s", old, new)
    if new == "failed":
        outcome.failure = str(machine.info().get("failure") or "the machine failed")
        log.error("The machine has failed: %s", outcome.failure)
    elif new == "running":
        outcome.failure = ""


def _stand_still(machine: ControlledMachine) -> None:
    """Another host has taken the machine over."""
    with contextlib.suppress(InvalidStateError):
        machine.pause()


def _live(
    machine: ControlledMachine,
    config: MachineConfig,
    watcher: Observer,
    stopping: threading.Event,
    peer_password: str | None,
) -> str:
    if config.teleporter.enabled:
        address = machine.listen()
        for text in machine.info().get("teleporter_notices", ()):
            watcher.notice(f"warning: {text}")
        watcher.waiting(address)
        if stopping.is_set():
            machine.cancel_teleport()
        try:
            summary = machine.wait_for_teleport(watcher.arriving)
        except TeleportCancelled:
            return "poweredoff"
        watcher.arrived(summary)
    else:
        try:
            machine.start(**({} if peer_password is None else {"peer_password": peer_password}))
        except OperationCancelled:
            if stopping.is_set():
                return "poweredoff"
            raise
    watcher.running(machine.info())
    if stopping.is_set():
        _power_off(machine, watcher)
    return machine.wait_finished()


def _tell_problem(machine: ControlledMachine, watcher: Observer, state: str) -> None:
    """Why a machine was paused that its user did not pause."""
    if state == "paused" and (problem := machine.info().get("problem")):
        watcher.notice(f"paused: {problem}")


def _power_off(machine: ControlledMachine, watcher: Observer) -> None:
    try:
        for problem in machine.power_off() or ():
            watcher.notice(f"warning: {problem}")
    except InvalidStateError:
        log.debug("Nothing to power off.", exc_info=True)
    except VmfError as error:
        log.warning("%s", error)


# -- detached ------------------------------------------------------------------------------------------------


def spawn_detached(
    home: Home,
    name: str,
    *,
    environment: Mapping[str, str] | None = None,
    insecure: bool = False,
    peer_password: str | None = None,
) -> Plain:
    """Start a machine in a process of its own, in a new session, and wait until it runs or waits for its teleport.

    Returns {"pid", "state", "address"}; address is where it waits for a teleport, "" otherwise. `insecure` and
    `peer_password` as for `run_machine_process`. Raises what kept the machine from starting. KeyboardInterrupt while
    waiting ends the new process.
    """
    home.load(name)
    from vmf.machine.home import explained, private_directory

    options = (("--insecure",) if insecure else ()) + (("--peer-password",) if peer_password is not None else ())
    paths = home.paths(name)
    with home.changing(name, "modify"):  # refuses when it runs, and then its log is not touched
        private_directory(paths.logs)
        rotate(paths.vmm_log)
    try:
        vmm_log = open_to_append(paths.vmm_log)
    except OSError as error:
        raise explained(error, paths.vmm_log) from error
    reader, writer = (_above_streams(each) for each in os.pipe())
    try:
        with open(vmm_log, "wb") as output:
            child = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "vmf.control"),
                    *(name, str(home.data), str(home.runtime), str(writer), *options),
                ],
                stdin=subprocess.DEVNULL if peer_password is None else subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(writer,),
                env={"OPENBLAS_NUM_THREADS": "1", **(os.environ if environment is None else environment)},
                start_new_session=True,
                cwd="/",
            )
    except OSError as error:
        raise MachineError(
            f"Machine '{name}' could not be started: {error.strerror or error}.", "Try again."
        ) from error
    finally:
        os.close(writer)
    if child.stdin is not None and peer_password is not None:
        # Not as an argument, which everybody sees.
        with contextlib.suppress(BrokenPipeError), child.stdin as pipe_in:
            pipe_in.write(peer_password.encode() + b"\n")
    # Reaps the child should it end before us, so that a long-lived embedding program keeps no zombie.
    threading.Thread(target=child.wait, name="vmf-reaper", daemon=True).start()
    try:
        with open(reader, "rb") as pipe:
            line = pipe.readline(rpc.MAX_REQUEST)
    except KeyboardInterrupt:
        _end_start(child)
        raise
    try:
        answer = json.loads(line)
    except ValueError:
        raise _died_early(name, paths.vmm_log, child) from None
    if "error" in answer:
        raise rpc.error_from(answer["error"])
    ready: Plain = answer["ready"]
    return ready


def _end_start(child: subprocess.Popen[bytes]) -> None:
    """End a process whose start is not wanted; at once when something in it, a plugin perhaps, does not end."""
    child.terminate()
    try:
        child.wait(INTERRUPTED_START_S)
    except subprocess.TimeoutExpired:
        child.terminate()  # the second signal ends it at once


def _died_early(name: str, vmm_log: Path, child: subprocess.Popen[bytes]) -> MachineError:
    """Why a process ended without a word, which is then in its log as well."""
    try:
        status = child.wait(10)
    except subprocess.TimeoutExpired:
        why, remedy = "closed its pipe before it was ready", f"Its messages are in {vmm_log}."
    else:
        why, remedy = f"ended with status {status} before it was ready", f"Its messages are in {vmm_log}."
        if status < 0:
            why = f"was ended by {signal.Signals(-status).name} before it was ready"
        if status == -signal.SIGKILL:
            remedy = (
                "Most likely the kernel killed it for lack of memory (`journalctl -k` or `dmesg` tells): give the "
                f"machine less (`vmf modifyvm {name} --memory`), or free some."
            )
    error = MachineError(f"The process of machine '{name}' {why}.", remedy)
    with contextlib.suppress(OSError), vmm_log.open("a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} ERROR vmf.process: {error}\n")
    return error


def _above_streams(descriptor: int) -> int:
    """Where a standard stream is closed, a pipe gets its number, which the child's own streams take again."""
    if descriptor > 2:
        return descriptor
    import fcntl

    higher = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(descriptor)
    return higher


def continuation(info: Mapping[str, Any]) -> list[str]:
    """What to tell of a machine that has just been started from a snapshot's memory; nothing of others."""
    name = info.get("continues_from")
    if not name:
        return []
    return [
        f"It continues from snapshot '{name}', with the same random numbers as every other start from it until its"
        " guest has mixed in new ones. Renew keys that must be secret or unique (docs/how-to/snapshots.md)."
    ]


class _Reporter(Observer):
    """Tells the starting process once, and the log everything."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._notices: list[str] = []

    def tell(self, message: Plain) -> None:
        """Once only: the pipe is closed afterwards."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(BrokenPipeError):
                os.write(descriptor, json.dumps(message).encode() + b"\n")
            os.close(descriptor)

    def waiting(self, address: str) -> None:
        log.info("Waiting for a teleport at %s.", address)
        self.tell(
            {"ready": {"pid": os.getpid(), "state": "teleportingin", "address": address, "notices": self._notices}}
        )

    def arriving(self, event: Mapping[str, Any]) -> None:
        if event.get("message"):
            log.warning("Teleport: %s", event["message"])

    def arrived(self, summary: Mapping[str, Any]) -> None:
        log.info("Arrived: %s", json.dumps(dict(summary)))

    def running(self, info: Mapping[str, Any]) -> None:
        log.info("Running on %s.", info.get("cpu_backend_used", "?"))
        cpuid = info.get("cpuid") or {}
        if info.get("cpu_backend_choice"):
            self.notice(f"CPU backend: {info['cpu_backend_choice']}.")
        for line in cpuid.get("explanation", ()):
            self.notice(f"CPUID contract: {line}")
        for line in continuation(info):
            self.notice(line)
        state = str(info.get("state", "running"))
        self.tell({"ready": {"pid": os.getpid(), "state": state, "address": "", "notices": self._notices}})

    def notice(self, text: str) -> None:
        self._notices.append(text)
        log.info("%s", text)


def main() -> int:
    """Of `python -m vmf.control`, which `spawn_detached` starts."""
    name, data, runtime, descriptor = sys.argv[1:5]
    os.set_inheritable(int(descriptor), False)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    reporter = _Reporter(int(descriptor))
    try:
        options = sys.argv[5:]
        password = sys.stdin.buffer.readline().decode().rstrip("\n") if "--peer-password" in options else None
        home = Home(Path(data), Path(runtime))
        run_machine_process(home, name, reporter, insecure="--insecure" in options, peer_password=password)
    except BaseException as error:
        log.log(logging.ERROR, "%s", error, exc_info=not isinstance(error, VmfError))
        reporter.tell({"error": rpc.error_object(error)})
        return error.exit_status if isinstance(error, VmfError) else 1
    return 0
