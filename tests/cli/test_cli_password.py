"""Passwords of teleports on the command line: where they may come from, and where they must not be seen."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vmf.machine.home import Home
from vmf.teleport.authentication import Verifier

SECRET = "a quiet evening by the lake"
DEFINE = ("createvm", "web", "--memory", 16)


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    path.chmod(0o600)
    return path


def verifier(home: Home) -> str | None:
    return home.load("web").teleporter.password_verifier


def test_only_a_verifier_is_stored(here: Any, home: Home, image: Path, secret_file: Path) -> None:
    said = here(*DEFINE, "--image", image, "--teleporter", "on", "--teleporter-password-file", secret_file)
    stored = verifier(home)
    assert stored is not None
    assert Verifier.parse(stored).iterations >= 600_000
    text = home.paths("web").definition.read_text()
    assert SECRET not in text
    assert stored in text
    assert home.paths("web").definition.stat().st_mode & 0o077 == 0
    shown, as_json = here("showvminfo", "web"), here("showvminfo", "web", "--json")
    assert "Teleport password:" in shown.stdout
    assert json.loads(as_json.stdout)["config"]["teleporter"]["password_verifier"] == "(hidden)"
    for each in (said, shown, as_json):
        assert SECRET not in each.stdout + each.stderr
        assert stored not in each.stdout + each.stderr
    assert stored not in repr(home.load("web"))
    here("modifyvm", "web", "--memory", 32)
    assert verifier(home) == stored
    here("modifyvm", "web", "--teleporter-password-file", secret_file)
    assert verifier(home) != stored  # a new salt
    here("modifyvm", "web", "--teleporter-password-file", "none")
    assert verifier(home) is None
    assert "Teleport password" not in here("showvminfo", "web").stdout


def test_an_argument_is_taken_with_a_warning(here: Any, home: Home, image: Path) -> None:
    here(*DEFINE, "--image", image)
    said = here("modifyvm", "web", "--teleporter-password", SECRET)
    assert "can be seen by others" in said.stderr
    assert "--teleporter-password-file" in said.stderr
    assert SECRET not in said.stdout + said.stderr
    assert verifier(home) is not None
    here("modifyvm", "web", "--teleporter-password", "")
    assert verifier(home) is None
    assert "is it a password" in here("modifyvm", "web", "--teleporter-password", "none", status=2).stderr
    assert "fewer than 12" in here("modifyvm", "web", "--teleporter-password", "short").stderr
    encrypted = ("--teleporter-transport", "tls", "--teleporter-password", "short")
    assert "fewer than 12" not in here("modifyvm", "web", *encrypted).stderr
    both = ("--teleporter-password", SECRET, "--teleporter-password-file", "x")
    assert "exclude each other" in here("modifyvm", "web", *both, status=2).stderr


def test_from_standard_input(vmf: Any, home: Home, image: Path) -> None:
    vmf(*DEFINE, "--image", image)
    vmf("modifyvm", "web", "--teleporter-password-file", "stdin", text_in=SECRET + "\nnot this\n")
    assert verifier(home) is not None
    for text, status in (("", 2), ("\n", 2), ("a\0b\n", 1)):
        done = vmf("modifyvm", "web", "--teleporter-password-file", "stdin", text_in=text, status=status)
        assert done.stderr.startswith("vmf: error: ")


def test_typed_on_a_terminal(environment: dict[str, str], vmf: Any, home: Home, image: Path) -> None:
    """Twice, and not echoed."""
    vmf(*DEFINE, "--image", image)
    controller, terminal = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "vmf.cli", "modifyvm", "web", "--teleporter-password-file", "stdin"],
        env=environment, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    shown = b""

    def until(word: bytes) -> None:
        nonlocal shown
        while word not in shown:
            shown += os.read(controller, 1000)

    until(b"Password:")
    os.write(controller, SECRET.encode() + b"\n")
    until(b"Repeat")
    os.write(controller, SECRET.encode() + b"\n")
    until(b"is modified")
    assert child.wait(30) == 0
    os.close(controller)
    assert SECRET.encode() not in shown
    assert verifier(home) is not None


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (b"ok password here", 0o644, "can be read or changed by other users (mode 0644)"),
        (b"ok password here", 0o620, "can be read or changed"),
        (b"", 0o600, "the file is empty"),
        (b"\n", 0o600, "the file is empty"),
        (b"one of two\nlines\n", 0o600, "more than one line"),
        (b"\xff\xfe lake", 0o600, "not UTF-8"),
        (b"x" * 5000, 0o600, "longer than 4096 bytes"),
        (b"x" * 2000, 0o600, "longer than 1024 bytes"),
        ("\N{SLEEPING FACE} by the lake".encode(), 0o600, "SASLprep"),
    ],
)
def test_files_that_are_refused(
    here: Any,
    home: Home,
    image: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    mode: int,
    said: str,
) -> None:
    here(*DEFINE, "--image", image)
    path = tmp_path / "bad"
    path.write_bytes(content)
    path.chmod(mode)
    from vmf.cli import app

    status = app.run(["modifyvm", "web", "--teleporter-password-file", str(path)])
    assert status in (1, 2)
    assert said in capsys.readouterr().err
    assert verifier(home) is None


def test_what_is_said_about_bad_files(here: Any, home: Home, image: Path, tmp_path: Path) -> None:
    here(*DEFINE, "--image", image)
    path = tmp_path / "bad"
    path.write_text(SECRET)
    path.chmod(0o644)
    error = here("modifyvm", "web", "--teleporter-password-file", path, status=2).stderr
    assert f"chmod 600 {path}" in error
    assert "mode 0644" in error
    path.write_text(SECRET + "\nmore\n")
    path.chmod(0o600)
    error = here("modifyvm", "web", "--teleporter-password-file", path, status=2).stderr
    assert "more than one line" in error
    assert SECRET not in error
    error = here("modifyvm", "web", "--teleporter-password-file", tmp_path / "gone", status=2).stderr
    assert "cannot be read" in error


def test_a_definition_with_a_password_in_the_clear_is_refused_and_not_quoted(
    here: Any, home: Home, image: Path
) -> None:
    here(*DEFINE, "--image", image)
    path = home.paths("web").definition
    text = path.read_text()
    for key in ("password_verifier", "password"):
        path.write_text(text.replace("[teleporter]", f'[teleporter]\n{key} = "{SECRET}"'))
        done = here("showvminfo", "web", status=2)
        assert SECRET not in done.stderr
        assert f"teleporter.{key} = (hidden)" in done.stderr


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.parametrize("form", [("--password", SECRET), (f"--password={SECRET}",), ("--teleporter-password", SECRET)])
def test_the_process_list_soon_does_not_have_it(
    vmf: Any, environment: dict[str, str], image: Path, form: tuple[str, ...]
) -> None:
    """A teleport to somebody who says nothing, so that the command lasts."""
    vmf(*DEFINE, "--image", image, "--cpu-backend", "unicorn")
    vmf("startvm", "web", "--detach")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        port = str(silent.getsockname()[1])
        child = subprocess.Popen(
            [sys.executable, "-m", "vmf.cli", "controlvm", "web", "teleport", "--host", "127.0.0.1", "--port", port,
             *form],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            peer, _ = silent.accept()  # it is at work now
            peer.recv(4096)
            assert b"teleport" in command_line(child.pid)
            assert SECRET.encode() not in command_line(child.pid)
            everybody = [each for each in Path("/proc").iterdir() if each.name.isdigit()]
            for each in everybody:
                try:
                    if int(each.name) != os.getpid():
                        assert SECRET.encode() not in (each / "cmdline").read_bytes()
                except OSError:
                    pass  # gone
        finally:
            peer.close()
            _, error = child.communicate(timeout=30)
        assert child.returncode == 1
        assert SECRET.encode() not in error


def test_a_secret_beside_other_arguments(tmp_path: Path) -> None:
    """`hide` overwrites the whole value, every time, and nothing else."""
    program = (
        "import sys; from vmf.cli.password import hide; hide(sys.argv); "
        "sys.stdout.buffer.write(open('/proc/self/cmdline', 'rb').read())"
    )

    def run(*arguments: str) -> bytes:
        return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, check=True).stdout

    assert run("--password", "abc", "abcd", "--host", "abc").split(b"\0")[3:-1] == [
        b"--password", b"***", b"abcd", b"--host", b"***",
    ]  # fmt: skip
    assert run("--teleporter-password=ü x", "y").split(b"\0")[3:-1] == [b"--teleporter-password=****", b"y"]
    assert run("--password-file", "abc").split(b"\0")[3:-1] == [b"--password-file", b"abc"]
    assert run("--password").split(b"\0")[3:-1] == [b"--password"]


def test_no_time_is_lost_without_a_password() -> None:
    """The command that has none does not import what passwords need."""
    program = "import sys, vmf.cli.app; vmf.cli.app.hide(sys.argv); print('scramp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_pipe_is_read_while_its_writer_takes_its_time(here: Any, home: Home, image: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    writer = subprocess.Popen(["sh", "-c", f"sleep 0.3; printf '%s\\n' '{SECRET}' >{fifo}"])
    here(*DEFINE, "--image", image, "--teleporter-password-file", fifo)
    assert writer.wait(10) == 0
    assert verifier(home) is not None


def test_a_pipe_that_stays_silent_is_not_waited_for_without_end(
    here: Any, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmf.reading.PIPE_SECONDS", 0.2)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    done = here(*DEFINE, "--image", image, "--teleporter-password-file", fifo, status=2)
    assert "nothing came within" in done.stderr
    assert str(fifo) in done.stderr


@pytest.mark.parametrize("option", ["--kernel", "--initrd", "--image"])
def test_an_image_that_is_a_pipe_is_refused(here: Any, image: Path, tmp_path: Path, option: str) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    kernel = () if option != "--initrd" else ("--kernel", image)
    done = here(*DEFINE, *kernel, option, fifo, status=None)
    assert done.stderr.startswith("vmf: error: ")
    assert str(fifo) in done.stderr
