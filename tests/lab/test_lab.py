"""The KVM lab: its parts alone, and what is shown in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from kvmlab import Lab, LabError, LabHung, LabResult, cache, job, missing, needs, packages, qemu
from kvmlab.budget import BudgetedLab
from kvmlab.lab import pytest_command
from kvmlab.slowclock import LEAST, MOST, for_load, slow_clock

TREE = packages.TREE


# -- parts, without the lab


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("VMF_CACHE", str(tmp_path))
    return tmp_path / "lab"


def test_a_cache_entry_is_whole_or_not_there(own_cache: Path) -> None:
    def fails(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise LabError("no luck")

    with pytest.raises(LabError):
        cache.cached("thing", "k", fails)
    assert [path for path in own_cache.iterdir() if path.is_dir()] == []

    def works(directory: Path) -> None:
        (directory / "whole").write_text("x")

    made = cache.cached("thing", "k", works)
    assert (made / "whole").exists()
    assert cache.cached("thing", "k", fails) == made, "it is not made twice"
    with pytest.raises(LabError):
        cache.cached("thing", "k", fails, fresh=True)
    assert (made / "whole").exists(), "a failed renewal leaves the old one"


def test_two_users_make_an_entry_once(own_cache: Path) -> None:
    made = []

    def make(directory: Path) -> None:
        made.append(directory)
        time.sleep(0.1)

    threads = [threading.Thread(target=cache.cached, args=("thing", "k", make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_content_names_an_entry(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("a")
    other.write_text("b")
    assert cache.tree_digest([("x", one)]) != cache.tree_digest([("x", other)])
    assert cache.tree_digest([("x", one)]) != cache.tree_digest([("y", one)])
    assert cache.tree_digest([("x", one), ("y", other)]) == cache.tree_digest([("y", other), ("x", one)])


def test_what_is_missing_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "which", lambda command: None)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    lines = "\n".join(needs.missing(base_is_built=False))
    for word in ("root", "debootstrap", "qemu-system-x86", "e2fsprogs"):
        assert word in lines
    assert "root" not in "\n".join(needs.missing(base_is_built=True)), "a built base needs no root"


def test_failed_tools_are_quoted() -> None:
    with pytest.raises(LabError, match=r"could not try.*status 3:\n.*words"):
        needs.call(["sh", "-c", "echo words; exit 3"], what="try")


def test_requirements_are_those_from_outside() -> None:
    assert packages.requirement_name("backports.zstd>=1.0; python_version < '3.14'") == "backports-zstd"
    names = {packages.requirement_name(requirement) for requirement in packages.requirements()}
    assert {"attrs", "numpy", "pytest", "unicorn"} <= names
    assert not {name for name in names if name.startswith("vmf")}
    assert not names & {"mypy", "ruff"}


def test_a_cut_off_run_has_no_results(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    job.make_results_disk(disk, 1)
    assert job.read_results(disk, tmp_path / "none") is None
    (tmp_path / "out/results").mkdir(parents=True)
    (tmp_path / "out/results/file").write_text("x" * 100)
    for with_status in (False, True):
        if with_status:
            (tmp_path / "out/status").write_text("3\n")
            (tmp_path / "out/uptime").write_text("4.5\n6.5\n")
        archive = subprocess.run(["tar", "-c", "-C", tmp_path / "out", "."], capture_output=True, check=True).stdout
        disk.write_bytes(archive + bytes(4096))
        outcome = job.read_results(disk, tmp_path / f"target-{with_status}")
        assert (outcome == job.Outcome(3, 4.5, 6.5)) if with_status else (outcome is None)
    assert (tmp_path / "target-True/results/file").exists()


def test_doctor_agrees() -> None:
    command = [sys.executable, str(Path(__file__).with_name("lab.py")), "doctor"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (1 if missing() else 0)
    for line in missing():
        assert line in done.stdout


def test_time_in_the_lab_is_slow_if_there_is_a_compiler(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMF_LAB_SLOWDOWN", raising=False)
    clock = slow_clock()
    if needs.which("gcc") is None:
        assert clock.factor == 1
        assert clock.environment() == {}
        pytest.skip("no gcc: the lab goes at the world's time")
    assert clock.library is not None
    assert LEAST <= clock.factor <= MOST
    assert (for_load(0, 2), for_load(4, 2), for_load(1000, 2)) == (LEAST, 2 * LEAST, MOST)
    monkeypatch.setenv("VMF_LAB_SLOWDOWN", "1")
    assert slow_clock().environment() == {}
    monkeypatch.setenv("VMF_LAB_SLOWDOWN", "100")
    said = subprocess.run(
        [sys.executable, "-c", SLEEPER],
        env={**os.environ, **slow_clock().environment()},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    inside, cpu = map(float, said.stdout.split())
    assert inside < 0.1, "0.2 s outside are 2 ms inside"
    assert cpu >= 0, "other clocks are as they were"


SLEEPER = """
import time
began, cpu = time.monotonic(), time.process_time()
time.sleep(0)
import ctypes
ctypes.CDLL(None).usleep(200_000)
print(time.monotonic() - began, time.process_time() - cpu)
"""


def succeeded(result: LabResult) -> None:
    print(result.stdout)
    assert result.status == 0, result.stdout + result.stderr


class _Hangs:
    """A lab that hangs so many times."""

    class clock:
        factor = 1

    def __init__(self, times: int) -> None:
        self.left = times

    def run(self, command: list[str], **_options: object) -> LabResult:
        if self.left:
            self.left -= 1
            raise LabHung("the lab hung and was killed")
        return LabResult(0, False, "done", "", "", Path(), 1.0, 2.0, 3.0)


@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_lab_that_hangs_is_started_once_more(times: int) -> None:
    lab = BudgetedLab(_Hangs(times), None)
    if times < 2:
        assert lab.run(["true"], timeout=1).stdout == "done"
    else:
        with pytest.raises(LabHung):
            lab.run(["true"], timeout=1)


def test_a_lab_that_lost_its_timer_is_not_waited_for(tmp_path: Path) -> None:
    console = tmp_path / "console"
    assert not qemu.lost_timer(console)
    said = "[   52.424482] rcu: rcu_preempt kthread timer wakeup didn't happen for 5255 jiffies! g12729 f0x2\r\n"
    console.write_text("[   52.4] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:\r\n" + said)
    assert not qemu.lost_timer(console), "it may only be slow"
    console.write_text(said + "...\r\n" + said.replace("52", "115"))
    assert qemu.lost_timer(console)


# -- in the lab: the chosen set, most important first, then what VMF_LAB=full adds


@pytest.mark.lab
@pytest.mark.lab_full
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_stock_debian_boots_on_kvm_to_a_shell_that_answers(kvm_lab: Lab, tmp_path: Path) -> None:
    command = ["python3", "tests/lab/payload/boot_debian.py", "--backend", "kvm", "--timeout", "300"]
    result = kvm_lab.run(command, timeout=400, directory=tmp_path / "back")
    succeeded(result)
    assert "BUG" not in result.stdout
    assert "WARNING" not in result.stdout


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_debian_teleports_between_kvm_and_unicorn_under_stress(kvm_lab: Lab, lab_is_full: bool, tmp_path: Path) -> None:
    """Ten moves, at least three of each kind, and a switch of the backend there and back. Without VMF_LAB=full as many
    as there is time for, at least one of each kind: a move takes half a minute, on a busy machine a whole one."""
    command = ["python3", "tests/lab/payload/teleport_debian.py", "--switch", "--timeout", "200"]
    if not lab_is_full:
        command += ["--within", "75"]
    result = kvm_lab.run(command, timeout=1800 if lab_is_full else 540, directory=tmp_path / "back")
    succeeded(result)
    verdict = re.search(r"^--- (\d+) moves: (\{.*?\});.* 0 problems$", result.stdout, re.MULTILINE)
    assert verdict is not None
    moves = json.loads(verdict[2])
    assert set(moves) == {"kvm > kvm", "kvm > unicorn", "unicorn > kvm"}
    assert sum(moves.values()) == int(verdict[1]) >= (10 if lab_is_full else 3)


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_masked_cpuid_is_masked_at_every_level(kvm_lab: Lab, tmp_path: Path) -> None:
    """Read in ring 0 at all levels and VirtualBox's profiles, and under Debian at the level of most machines."""
    command = ["python3", "tests/lab/payload/cpuid_levels.py", "--linux", "3"]
    result = kvm_lab.run(command, timeout=300, directory=tmp_path / "back")
    succeeded(result)


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kvm_in_the_lab_has_hardware_semantics(kvm_lab: Lab, tmp_path: Path) -> None:
    """Real mode, 64-bit mode, ring 3 with SYSCALL, SSE in ring 0, masked CPUID; and what is printed comes back."""
    script = (
        "python3 tests/lab/payload/kvm_smoke.py; status=$?; "
        "cat /sys/module/kvm_amd/parameters/npt; echo to stderr >&2; echo $WORD > $VMF_LAB_RESULTS/file; "
        "exit $((status + 7))"
    )
    heard: list[str] = []
    result = kvm_lab.run(
        ["sh", "-c", script],
        timeout=120,
        directory=tmp_path / "back",
        environment={"WORD": "it's here"},
        echo=lambda stream, data: heard.append(stream),
    )
    print(result.stdout)
    assert result.status == 7, result.stdout + result.stderr
    assert not result.timed_out
    assert "kvm smoke: all right\nY\n" in result.stdout
    assert result.stderr == "to stderr\n"
    assert {"stdout", "stderr", "console"} <= set(heard)
    assert (result.results / "file").read_text() == "it's here\n"
    assert "Kernel panic" not in (result.directory / "dmesg").read_text()


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_kvm_backend_passes_its_tests_in_the_lab(kvm_lab: Lab, tmp_path: Path) -> None:
    if not list(TREE.glob("plugins/cpu_kvm/tests/test_*.py")):
        pytest.skip("plugins/cpu_kvm has no tests")
    result = kvm_lab.run(pytest_command(["-q", "plugins/cpu_kvm/tests"]), timeout=700, directory=tmp_path / "back")
    succeeded(result)
    suite = ElementTree.parse(result.results / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    assert int(suite.get("tests", 0)) > int(suite.get("skipped", 0)), "not all may be skipped"


@pytest.mark.lab
@pytest.mark.lab_full
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_command_that_hangs_is_ended_and_what_it_wrote_comes_back(kvm_lab: Lab, tmp_path: Path) -> None:
    script = "echo before; echo kept > $VMF_LAB_RESULTS/file; sleep 600"
    result = kvm_lab.run(["sh", "-c", script], timeout=4, directory=tmp_path / "back")
    assert (result.status, result.timed_out, result.stdout) == (124, True, "before\n")
    assert (result.results / "file").read_text() == "kept\n"


@pytest.mark.lab
@pytest.mark.lab_full
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_lab_that_dies_is_told_from_a_command_that_fails(kvm_lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="without results"):
        kvm_lab.run(["sh", "-c", "echo b > /proc/sysrq-trigger; sleep 600"], timeout=60, directory=tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.lab
@pytest.mark.lab_full
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_debian_is_switched_to_unicorn_and_back_under_stress(kvm_lab: Lab, tmp_path: Path) -> None:
    """KVM -> Unicorn -> KVM and a trace, three rounds, while the guest checks itself."""
    command = ["python3", "tests/lab/payload/switch_debian.py", "--rounds", "3"]
    result = kvm_lab.run(command, timeout=800, directory=tmp_path / "back")
    succeeded(result)


@pytest.mark.lab
@pytest.mark.lab_full
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_disk_is_right_on_kvm_and_through_switches(kvm_lab: Lab, tmp_path: Path) -> None:
    """Writes, reads, zeroes and discards that check themselves on KVM, on Unicorn and on KVM again, with pauses."""
    result = kvm_lab.run(["python3", "tests/lab/payload/disk_debian.py"], timeout=800, directory=tmp_path / "back")
    succeeded(result)


@pytest.mark.lab
@pytest.mark.lab_full
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_debian_reads_masked_cpuid_at_every_level(kvm_lab: Lab, tmp_path: Path) -> None:
    result = kvm_lab.run(["python3", "tests/lab/payload/cpuid_levels.py"], timeout=800, directory=tmp_path / "back")
    succeeded(result)


@pytest.mark.lab
@pytest.mark.lab_full
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_debian_root_boots_from_a_virtio_disk_on_kvm(kvm_lab: Lab, tmp_path: Path) -> None:
    """To a login prompt, and to a shell that answers."""
    result = kvm_lab.run(["python3", "tests/lab/payload/root_debian.py"], timeout=600, directory=tmp_path / "back")
    succeeded(result)


@pytest.fixture(scope="module")
def storage_servers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NFS, SMB and iSCSI servers, unpacked from Debian's packages."""
    made = tmp_path_factory.mktemp("servers") / "srv"
    made.mkdir()
    fetched = subprocess.run(
        ["sh", str(TREE / "tests/lab/payload/fetch_servers.sh"), str(made)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if fetched.returncode:
        pytest.skip(f"no servers for shared storage: {(fetched.stderr.strip() or 'apt failed').splitlines()[-1]}")
    return made


@pytest.mark.lab
@pytest.mark.lab_full
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("share", ["nfs", "smb", "iscsi"])
def test_disks_and_machines_on_shared_storage(kvm_lab: Lab, storage_servers: Path, tmp_path: Path, share: str) -> None:
    """Mounted twice, as by two hosts: leases, handovers, a killed owner; and a writing guest that is teleported."""
    command = ["sh", "tests/lab/payload/mount_shares.sh", "machines", share]
    result = kvm_lab.run(command, timeout=900, directory=tmp_path / "back", files={"srv": storage_servers})
    succeeded(result)
