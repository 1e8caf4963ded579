"""Machines that have an earlier one's name, that were copied, or whose sockets are hidden, as users meet them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmf.machine.home import Home
from vmf.testing.guests import builtin_guest


def state_of(vmf: Any, name: str = "web", **more: str) -> str:
    (record,) = [each for each in json.loads(vmf("list", "vms", "--json", **more).stdout) if each["name"] == name]
    return str(record["state"])


def output(home: Home) -> str:
    log = home.paths("web").console_log
    return log.read_text(errors="replace") if log.exists() else ""


def wait_for_output(home: Home, text: str) -> str:
    deadline = time.monotonic() + 60
    while text not in (found := output(home)):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def define(vmf: Any, *more: str, **environment: str) -> None:
    vmf(
        *("createvm", "web", "--memory", 16, "--image", builtin_guest(), "--cpu-backend", "unicorn", *more),
        **environment,
    )


def test_a_machine_of_an_old_name_begins_anew(vmf: Any, home: Home) -> None:
    define(vmf)
    vmf("startvm", "web", "--detach")
    wait_for_output(home, "tick 2")
    vmf("snapshot", "web", "take", "s1")
    vmf("controlvm", "web", "poweroff")
    vmf("snapshot", "web", "restore", "s1", "--yes")
    assert "continues from snapshot 's1'" in vmf("unregistervm", "web", "--delete", status=1).stderr
    said = vmf("unregistervm", "web").stdout
    (kept,) = (home.data / "unregistered").iterdir()
    assert f"vmf registervm {kept}" in said
    define(vmf, "--description", "second")
    assert vmf("snapshot", "web", "list", "--json").stdout.strip() == "[]"
    vmf("startvm", "web", "--detach")
    assert "guest is running" in wait_for_output(home, "tick 1")
    vmf("controlvm", "web", "poweroff")
    vmf("unregistervm", "web")
    vmf("registervm", kept)
    vmf("startvm", "web", "--detach")
    assert "tick 1 " not in wait_for_output(home, "tick 4"), "the first one continues where it was"
    vmf("controlvm", "web", "poweroff")


def test_a_copied_directory_starts_nothing(vmf: Any, home: Home) -> None:
    define(vmf)
    shutil.copytree(home.paths("web").directory, home.paths("web2").directory)
    assert "--uuid new" in vmf("startvm", "web2", status=1).stderr
    path = home.paths("web2").definition
    path.write_text(path.read_text().replace('"web"', '"web2"'))
    for command in (("startvm", "web2"), ("startvm", "web2", "--detach"), ("modifyvm", "web2", "--memory", 8)):
        assert "is a copy" in vmf(*command, status=1).stderr
    assert "is a copy" in vmf("showvminfo", "web2").stdout
    assert "is there still" in vmf("modifyvm", "web2", "--uuid", "keep", status=1).stderr
    vmf("modifyvm", "web2", "--uuid", "new", "--memory", 8)
    assert home.load("web2").uuid != home.load("web").uuid
    vmf("startvm", "web2", "--detach")
    vmf("controlvm", "web2", "poweroff")


def test_a_definition_that_is_a_link_stays_one(vmf: Any, home: Home, tmp_path: Path) -> None:
    define(vmf)
    path, real = home.paths("web").definition, tmp_path / "web.toml"
    path.rename(real)
    path.symlink_to(real)
    vmf("modifyvm", "web", "--memory", 24)
    assert path.is_symlink()
    assert "memory_mib = 24" in real.read_text()


@pytest.fixture
def user(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a user without VMF_HOME; what runs at the end is killed."""
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    yield {"VMF_HOME": "", "XDG_DATA_HOME": str(tmp_path / "data"), "XDG_RUNTIME_DIR": str(runtime)}
    holder = Home(tmp_path / "data/vmf", runtime / "vmf").process("web")
    if holder is not None:
        os.kill(holder.pid, signal.SIGKILL)


def test_hidden_sockets_hide_no_machine(vmf: Any, user: dict[str, str], tmp_path: Path) -> None:
    define(vmf, **user)
    vmf("startvm", "web", "--detach", **user)
    other = tmp_path / "other"
    other.mkdir()
    for value in (str(other), "relative", "", "/nowhere"):
        view = user | {"XDG_RUNTIME_DIR": value}
        assert state_of(vmf, **view) == "running"
        assert "running already" in vmf("startvm", "web", status=1, **view).stderr
        assert "cannot be modified" in vmf("modifyvm", "web", "--memory", 8, status=1, **view).stderr
    pid = json.loads(vmf("showvminfo", "web", "--json", **user).stdout)["pid"]
    os.kill(pid, signal.SIGSTOP)  # so that it cannot make its sockets again at once
    try:
        shutil.rmtree(user["XDG_RUNTIME_DIR"])
        assert state_of(vmf, **user) == "running, unreachable"
        shown = vmf("showvminfo", "web", **user).stdout
        assert f"kill {pid}" in shown
        assert "cannot be reached" in vmf("controlvm", "web", "pause", status=1, **user).stderr
        for command in (("startvm", "web"), ("unregistervm", "web", "--delete"), ("modifyvm", "web", "--memory", 8)):
            assert "is running" in vmf(*command, status=1, **user).stderr
    finally:
        os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + 60
    while state_of(vmf, **user) != "running":
        assert time.monotonic() < deadline
    vmf("controlvm", "web", "poweroff", **user)
    assert state_of(vmf, **user) == "poweredoff"


def test_a_start_tells_what_is_not_the_machine_s_own_and_clears_a_half_snapshot(vmf: Any, home: Home) -> None:
    define(vmf)
    half = home.paths("web").snapshots / ".partial-x"  # its process was killed
    half.mkdir(parents=True)
    (half / "ram.img").write_bytes(bytes(4096))
    note = home.paths("web").directory / "resume.json"
    note.write_text(json.dumps({"snapshot": "s1", "generations": {}}))
    said = vmf("startvm", "web", "--detach").stdout
    assert f"warning: {note} is of another machine than 'web' and is not used." in said
    assert "is running (process" in said
    assert not half.exists()
    vmf("controlvm", "web", "poweroff")
