"""The process around a machine: readiness, signals, endings, and what is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from vmf.control.client import ControlClient
from vmf.control.process import spawn_detached
from vmf.control.reach import CONSOLE_LIVE, reach
from vmf.control.signals import SAME_REQUEST_S
from vmf.errors import ControlError, ImageError, InvalidStateError, MachineError, NotFoundError, PluginError
from vmf.machine import death
from vmf.machine.home import Home

DRIVER = """
import json, runpy, sys
from pathlib import Path
from vmf.control.process import Observer, run_machine_process
from vmf.machine.home import Home

FakeMachine = runpy.run_path(sys.argv[3])["FakeMachine"]
if sys.argv[4:] == ["stuck"]:
    FakeMachine.power_off = lambda self: None

class Said(Observer):
    def say(self, *what): print(json.dumps(what), flush=True)
    def waiting(self, address): self.say("waiting", address)
    def arriving(self, event): self.say("arriving", event["phase"])
    def running(self, info): self.say("running", info["state"])
    def notice(self, text): self.say("notice", text)

home = Home(Path(sys.argv[1]), Path(sys.argv[2]))
print(json.dumps(["ended", run_machine_process(
    home, "vm", Said(), make_machine=lambda config, report: FakeMachine(config.name)
)]))
"""


class Process:
    """A fake machine's process."""

    def __init__(self, home: Home, *, stuck: bool = False, **arguments: object) -> None:
        conftest = Path(__file__).with_name("conftest.py")
        self.child = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(home.data), str(home.runtime), str(conftest), *["stuck"] * stuck],
            stdout=subprocess.PIPE,
            text=True,
            **arguments,  # type: ignore[call-overload]
        )

    def said(self, *what: str) -> None:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        assert json.loads(line or "null") == list(what)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.child.kill()
        self.child.wait()
        assert self.child.stdout is not None
        self.child.stdout.close()


@pytest.fixture
def waiting_home(home: Home) -> Home:
    home.update("vm", lambda old: attrs.evolve(old, teleporter=attrs.evolve(old.teleporter, enabled=True)))
    return home


def test_power_off_over_the_control_socket(home: Home) -> None:
    with Process(home) as process:
        process.said("running", "running")
        record = home.process("vm")
        assert record is not None
        assert record.pid == process.child.pid
        with pytest.raises(InvalidStateError, match="running already"):
            spawn_detached(home, "vm")
        with ControlClient.of(home, "vm") as client:
            client.power_off()
        process.said("ended", "poweredoff")
        assert process.child.wait(60) == 0
    assert list(home.paths("vm").runtime.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_powers_off_in_order(home: Home, number: signal.Signals) -> None:
    with Process(home) as process:
        process.said("running", "running")
        process.child.send_signal(number)
        process.said("notice", f"{number.name}: powering off (once more to end at once) ...")
        process.said("ended", "poweredoff")
        assert process.child.wait(60) == 0
    assert home.resting_state("vm") == "poweredoff"


@pytest.mark.parametrize("pair", [(signal.SIGTERM, signal.SIGINT), (signal.SIGHUP, signal.SIGHUP)])
def test_signals_in_the_same_instant_are_one_request_and_not_lost(
    home: Home, pair: tuple[signal.Signals, signal.Signals]
) -> None:
    for _ in range(3):
        with Process(home) as process:
            process.said("running", "running")
            for number in pair:
                process.child.send_signal(number)
            assert process.child.wait(60) == 0
        assert home.resting_state("vm") == "poweredoff"


def test_a_second_signal_ends_it_at_once(home: Home) -> None:
    with Process(home, stuck=True) as process:
        process.said("running", "running")
        process.child.send_signal(signal.SIGTERM)
        process.said("notice", "SIGTERM: powering off (once more to end at once) ...")
        time.sleep(2 * SAME_REQUEST_S)
        process.child.send_signal(signal.SIGINT)
        process.said("notice", "Ended at once.")
        assert process.child.wait(60) == 128 + signal.SIGINT
    assert home.resting_state("vm") == "aborted"
    left = home.sight("vm").left
    assert left is not None
    assert death.explain(left, home.paths("vm").vmm_log) == "it was ended at once by a second SIGINT"


def test_consoles_leave_descriptors_for_control(home: Home) -> None:
    limit = 40

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    with Process(home, preexec_fn=lower) as process, contextlib.ExitStack() as stack:
        process.said("running", "running")
        consoles = [stack.enter_context(reach(home, "vm", CONSOLE_LIVE)) for _ in range(limit)]
        consoles[-1].settimeout(60)
        assert f"file descriptors left for another connection (its limit is {limit})".encode() in consoles[-1].recv(
            4096
        )
        with ControlClient.of(home, "vm") as client:
            client.pause()
            assert client.info()["state"] == "paused"
        # Control, too, says so at the end, and works again afterwards.
        with contextlib.ExitStack() as clients:

            def connect_many() -> None:
                for _ in range(limit):
                    assert clients.enter_context(ControlClient.of(home, "vm")).info()["state"] == "paused"

            with pytest.raises(ControlError, match="too few file descriptors left"):
                connect_many()
        deadline = time.monotonic() + 60
        while True:
            try:
                with ControlClient.of(home, "vm") as client:
                    client.resume()
                break
            except ControlError:
                assert time.monotonic() < deadline


def test_ignored_signals_stay_ignored(home: Home) -> None:
    with Process(home, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        process.said("running", "running")
        process.child.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        with ControlClient.of(home, "vm") as client:
            assert client.info()["state"] == "running"


def test_signal_while_waiting_for_a_teleport(waiting_home: Home) -> None:
    with Process(waiting_home) as process:
        process.said("waiting", "tcp:127.0.0.1:4711")
        process.said("arriving", "waiting")
        process.child.send_signal(signal.SIGINT)
        process.said("notice", "SIGINT: powering off (once more to end at once) ...")
        process.said("ended", "poweredoff")
        assert process.child.wait(60) == 0


def test_cancel_while_waiting_for_a_teleport(waiting_home: Home) -> None:
    with Process(waiting_home) as process:
        process.said("waiting", "tcp:127.0.0.1:4711")
        process.said("arriving", "waiting")
        with ControlClient.of(waiting_home, "vm") as client:
            assert client.cancel_teleport()
        process.said("ended", "poweredoff")


def test_teleported_machine_ends_and_says_so(home: Home) -> None:
    with Process(home) as process:
        process.said("running", "running")
        with ControlClient.of(home, "vm") as client:
            assert client.teleport("there", 1)["rounds"] == 3, "the summary leaves before the process"
        process.said("ended", "teleported")
    assert home.resting_state("vm") == "teleported"


def test_killed_machine_is_aborted_and_starts_again(home: Home) -> None:
    with Process(home) as process:
        process.said("running", "running")
        process.child.kill()
        process.child.wait()
    assert home.resting_state("vm") == "aborted"
    assert home.paths("vm").control_socket.exists()
    with pytest.raises(InvalidStateError, match="aborted"):
        ControlClient.of(home, "vm")
    with Process(home) as process:
        process.said("running", "running")
        with ControlClient.of(home, "vm") as client:
            assert client.info()["state"] == "running"


def test_ctrl_c_at_the_command_cancels_the_teleport_not_the_machine(home: Home) -> None:
    with Process(home) as process:
        process.said("running", "running")
        program = "from vmf.cli import main; main()"
        arguments = ("controlvm", "vm", "teleport", "--host", "slow", "--port", "1")
        command = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env=os.environ | {"VMF_HOME": str(home.data)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert command.stdout is not None
        while "round 3" not in (line := command.stdout.readline()):
            assert line
        command.send_signal(signal.SIGINT)
        _, errors = command.communicate(timeout=20)
        assert "cancelling the teleport" in errors
        assert "vmf: error: the teleport was cancelled." in errors
        assert "Traceback" not in errors
        assert command.returncode == 1
        with ControlClient.of(home, "vm") as client:
            assert client.info()["state"] == "running"


# -- detached: the real machine --------------------------------------------------------------------------------


@pytest.fixture
def detached(home: Home, tmp_path: Path) -> Iterator[Home]:
    """A home whose machine "vm" boots a guest that does nothing but jump to itself."""
    image = tmp_path / "spin.bin"
    image.write_bytes(b"\xeb\xfe")
    home.update("vm", lambda old: attrs.evolve(old, memory_mib=4, image=image, cpu_backend="unicorn"))
    yield home
    record = home.process("vm")
    if record is not None:
        os.kill(record.pid, signal.SIGKILL)


def test_detached_machine_is_ready_when_the_call_returns(detached: Home) -> None:
    ready = spawn_detached(detached, "vm")
    assert ready["state"] == "running"
    record = detached.process("vm")
    assert record is not None
    assert record.pid == ready["pid"]
    assert os.getsid(record.pid) == record.pid
    with ControlClient.of(detached, "vm") as client:
        assert client.info()["state"] == "running"
        client.power_off()
    deadline = time.monotonic() + 60
    while detached.process("vm") is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert detached.resting_state("vm") == "poweredoff"


def test_detached_target_tells_its_real_port(detached: Home) -> None:
    settings = {"enabled": True, "port": 0, "address": "127.0.0.1"}
    detached.update("vm", lambda old: attrs.evolve(old, teleporter=attrs.evolve(old.teleporter, **settings)))
    ready = spawn_detached(detached, "vm")
    assert ready["state"] == "teleportingin"
    scheme, host, port = ready["address"].split(":")
    assert (scheme, host) == ("tcp", "127.0.0.1")
    assert int(port) > 0
    with ControlClient.of(detached, "vm") as client:
        assert client.cancel_teleport()


@pytest.mark.parametrize("what", ["nothing to boot", "missing image", "missing plugin", "unknown machine"])
def test_detached_failure_is_raised_here(detached: Home, what: str) -> None:
    expected: type[Exception] = ImageError
    if what == "nothing to boot":
        detached.update("vm", lambda old: attrs.evolve(old, image=None))
    elif what == "missing image":
        detached.update("vm", lambda old: attrs.evolve(old, image=Path("/nowhere/at/all")))
    elif what == "missing plugin":
        detached.update("vm", lambda old: attrs.evolve(old, cpu_backend="abacus"))
        expected = PluginError
    else:
        detached.unregister("vm")
        expected = NotFoundError
    with pytest.raises(expected) as caught:
        spawn_detached(detached, "vm")
    assert str(caught.value)
    if what != "unknown machine":
        deadline = time.monotonic() + 60
        while detached.process("vm") is not None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert detached.last_run("vm")["detail"] == str(caught.value)


# -- what is left to read afterwards -----------------------------------------------------------------------------


def wait_gone(home: Home) -> None:
    deadline = time.monotonic() + 60
    while home.process("vm") is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_start_that_is_killed_is_explained(detached: Home, tmp_path: Path) -> None:
    """As by the kernel for lack of memory, before it could say anything."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\nif 'vmf.control' in sys.orig_argv:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with pytest.raises(MachineError, match="SIGKILL before it was ready") as caught:
        spawn_detached(detached, "vm", environment={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert "lack of memory" in caught.value.remedy
    assert "lack of memory" in detached.paths("vm").vmm_log.read_text()
    assert detached.process("vm") is None


def test_the_log_keeps_earlier_runs_whatever_later_starts_do(detached: Home) -> None:
    log = detached.paths("vm").vmm_log
    spawn_detached(detached, "vm")
    first = log.read_text()
    assert "starting -> running" in first
    with pytest.raises(InvalidStateError):
        spawn_detached(detached, "vm")
    with ControlClient.of(detached, "vm") as client:
        client.power_off()
    wait_gone(detached)
    detached.update("vm", lambda old: attrs.evolve(old, image=Path("/nowhere")))
    with pytest.raises(ImageError):
        spawn_detached(detached, "vm")
    wait_gone(detached)
    assert log.read_text().startswith(first)
    assert "/nowhere" in log.read_text()


def test_a_crash_leaves_a_traceback(detached: Home) -> None:
    ready = spawn_detached(detached, "vm")
    os.kill(ready["pid"], signal.SIGSEGV)
    wait_gone(detached)
    text = detached.paths("vm").vmm_log.read_text()
    assert "Fatal Python error: Segmentation fault" in text
    assert "process.py" in text
    assert detached.resting_state("vm") == "aborted"
    spawn_detached(detached, "vm")
    assert "crashed (Segmentation fault)" in detached.last_run("vm")["detail"]


def test_large_logs_are_rotated(tmp_path: Path) -> None:
    from vmf.control import vmm_log

    log = tmp_path / "vmm.log"
    for number in range(vmm_log.KEPT + 3):
        log.write_text(f"{number}" + "x" * vmm_log.LIMIT)
        vmm_log.rotate(log)
        assert not log.exists()
    assert [path.read_text()[0] for path in sorted(tmp_path.iterdir())] == ["5", "4", "3"]
    log.write_text("small")
    vmm_log.rotate(log)
    assert log.read_text() == "small"


@pytest.mark.parametrize("recovered", [False, True])
def test_the_reason_of_a_failure_outlives_the_machine(home: Home, fake_class: type, recovered: bool) -> None:
    """In vmm.log, also of a machine in the foreground, and in what showvminfo tells of the last run."""
    import threading

    from vmf.control.process import run_machine_process

    class Failing(fake_class):  # type: ignore[misc]
        def info(self) -> dict[str, object]:
            return {**super().info(), "failure": "the disk melted." if self.state == "failed" else ""}

    machine = Failing()
    running = threading.Thread(
        target=run_machine_process, args=(home, "vm"), kwargs={"make_machine": lambda *_: machine}
    )
    running.start()
    with machine.changed:
        assert machine.changed.wait_for(lambda: machine.state == "running", 60)
    machine.set("failed")
    if recovered:
        machine.set("running")
    machine.set("poweredoff")
    running.join()
    assert home.resting_state("vm") == "poweredoff"
    assert ("the disk melted" in home.last_run("vm")["detail"]) is not recovered
    assert "has failed: the disk melted." in home.paths("vm").vmm_log.read_text()
