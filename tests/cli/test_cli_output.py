"""Output that cannot be written fails no command, and every error of one that was given --json is JSON too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmf.machine.home import Home

Shell = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def shell(environment: dict[str, str], tmp_path: Path) -> Shell:
    """`shell("$VMF list vms >&-")` with the streams as a shell arranges them."""
    command = f'exec {sys.executable} -c "from vmf.cli import main; main()" "$@"'
    program = tmp_path / "vmf"
    program.write_text(f"#!/bin/sh\n{command}\n")
    program.chmod(0o755)

    def run(script: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", script],
            env=environment | {"VMF": str(program)} | more,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.mark.parametrize("streams", [">&-", "<&- >&-", "<&- >&- 2>&-"])
def test_closed_streams_count_as_the_null_device(shell: Shell, streams: str) -> None:
    done = shell(f"$VMF list vms {streams}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("what", ["list vms --json", "--help", "createvm made --memory 16 --image /dev/null"])
def test_a_full_device_is_told_after_the_work_is_done(shell: Shell, what: str) -> None:
    done = shell(f"$VMF {what} >/dev/full")
    assert done.returncode == (2 if "null" in what else 74)
    assert done.stderr.count("\n") == 1
    if done.returncode == 74:
        assert done.stderr.startswith("vmf: error: standard output cannot be written: No space left on device.")
    assert shell("$VMF list vms >/dev/full 2>/dev/full").returncode == 74


def test_what_was_done_is_done_although_nobody_hears_of_it(shell: Shell, home: Home, image: Path) -> None:
    done = shell(f"$VMF createvm made --memory 16 --image {image} >/dev/full")
    assert done.returncode == 74
    assert home.names() == ["made"]


def test_a_reader_that_has_gone_ends_nothing(shell: Shell, home: Home, image: Path) -> None:
    script = f"$VMF createvm made --memory 16 --image {image} | true; echo ${{PIPESTATUS[0]}}"
    assert shell(f"sleep 0.1; {script}").stdout.strip() in ("0", "141")
    assert home.names() == ["made"]


def test_characters_that_the_encoding_lacks_are_escaped(shell: Shell, image: Path) -> None:
    assert shell(f"$VMF createvm one --memory 16 --image {image} --description 1→2").returncode == 0
    done = shell("$VMF showvminfo one", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0
    assert "1\\u21922" in done.stdout


def test_a_machine_starts_with_closed_streams(shell: Shell, home: Home, image: Path) -> None:
    assert shell(f"$VMF createvm one --memory 16 --image {image} --cpu-backend unicorn").returncode == 0
    assert shell("$VMF startvm one --detach <&- >&- 2>&-").returncode == 0
    assert home.process("one") is not None
    assert shell("$VMF controlvm one poweroff >&-").returncode == 0


def test_an_embedding_program_with_closed_streams_starts_one_too(shell: Shell, home: Home, image: Path) -> None:
    assert shell(f"$VMF createvm one --memory 16 --image {image} --cpu-backend unicorn").returncode == 0
    script = (
        "import os; from vmf.machine.home import Home; from vmf.control.process import spawn_detached\n"
        "for each in (0, 1, 2): os.close(each)\n"
        "spawn_detached(Home.default(), 'one')"
    )
    assert shell(f'{sys.executable} -c "{script}"').returncode == 0
    assert home.process("one") is not None


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (("list", "vms", "--nonsense", "--json"), 2, "usage"),
        (("showvminfo", "--json"), 2, "usage"),
        (("nonsense", "--json"), 2, "usage"),
        (("startvm", "a", "--detach", "--console", "--json"), 2, "usage"),
        (("showvminfo", "nothing", "--json"), 1, "not-found"),
    ],
)
def test_errors_are_json_where_json_was_wanted(here: Any, arguments: tuple[str, ...], status: int, code: str) -> None:
    done = here(*arguments, status=status)
    error = json.loads(done.stdout)["error"]
    assert set(error) == {"code", "message", "remedy"}
    assert code in error["code"] or code == "not-found"
    assert done.stderr.startswith("vmf: error: ")


def test_what_stands_behind_two_dashes_is_no_option(here: Any) -> None:
    assert here("showvminfo", "--", "--json", status=2).stdout == ""


@pytest.mark.parametrize(
    ("text", "mib"), [("1G", 1024), ("1.5GiB", 1536), ("512M", 512), ("64", 64), ("64 MB", 64), ("65536k", 64)]
)
def test_memory_may_have_a_unit(here: Any, home: Home, image: Path, text: str, mib: int) -> None:
    here("createvm", "one", "--memory", text, "--image", image)
    assert home.load("one").memory_mib == mib


@pytest.mark.parametrize("text", ["1X", "G", "", "-1", "0.3M", "1e3", "64 65", "nan", "9" * 30])
def test_memory_that_is_no_size_is_refused(here: Any, home: Home, image: Path, text: str) -> None:
    done = here("createvm", "one", "--memory", text, "--image", image, status=2)
    assert done.stderr.startswith("vmf: error: ")
    assert home.names() == []


def test_plugins_reasons_stand_below_the_table(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmf.plugins import listing

    long = "this host's KVM does not keep a machine's CPU contract: " + "; ".join(["one of many reasons"] * 30)
    records = [
        listing.PluginRecord("cpu", "kvm", "1", "vmf-cpu-kvm", usable=False, reason=long, remedy="Use another."),
        listing.PluginRecord("cpu", "unicorn", "1", "vmf-cpu-unicorn", usable=True, detail="2.1.4"),
    ]
    monkeypatch.setattr(listing, "list_plugins", lambda: records)
    lines = here("list", "plugins").stdout.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[1].endswith("no, see below")
    assert lines[4] == "cpu kvm:"
    assert " ".join(line.strip() for line in lines[5:]) == f"{long}. Use another."


def test_standard_input_is_read_to_the_end_of_the_line_only(tmp_path: Path) -> None:
    from vmf.reading import read_descriptor

    reader, writer = os.pipe()
    os.write(writer, b"secret\nand what others read")
    assert read_descriptor(reader, 100, line=True) == b"secret\n"
    assert os.read(reader, 100) == b"and what others read"
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("given", ["nan", "inf", "1e300", "-1", "0", "soon"])
def test_a_time_limit_is_a_number_that_can_be_counted(shell: Shell, given: str) -> None:
    done = shell(f"$VMF controlvm web teleport --host localhost --port 1 --timeout {given}")
    assert done.returncode == 2
    assert "--timeout" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("files", [11, 14, 20])
def test_too_few_descriptors_are_no_bug(shell: Shell, home: Home, image: Path, files: int) -> None:
    assert shell(f"$VMF createvm one --memory 16 --image {image} --cpu-backend unicorn").returncode == 0
    done = shell(f"ulimit -n {files}; $VMF startvm one --detach --json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "shortage"
    assert done.stderr.startswith("vmf: error: The limit of open files of this process is reached")
    assert done.stderr.count("\n") == 1
    assert home.process("one") is None


def test_a_plugins_command_that_ends_the_process_is_told(shell: Shell, tmp_path: Path) -> None:
    info = tmp_path / "ends-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ends\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vmf.command]\nends = ends_at_once\n")
    (tmp_path / "ends_at_once.py").write_text("import sys\nsys.exit(0)\n")
    done = shell("$VMF ends --json", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("vmf: error: The command 'ends' of the plugin ends cannot be imported: SystemExit")
    assert json.loads(done.stdout)["error"]["code"] == "plugin"


def test_choices_of_a_missing_option_stand_on_one_line(shell: Shell) -> None:
    done = shell("$VMF storageattach one --port 0 --medium x")
    assert done.returncode == 2
    assert "Missing option '--type'. Choose from: hdd, dvddrive, floppy" in done.stderr
