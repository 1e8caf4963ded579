"""The `vmf` command as users run it: a process, a home, a small guest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from vmf.machine.home import Home

ECHO_GUEST = bytes.fromhex(
    "66baf803 b052 ee b00a ee"  # write "R\n" to the serial port
    "66bafd03 ec a801 74f7"  # wait for a byte
    "66baf803 ec 3c71 7403 ee ebeb"  # echo it and go on, but
    "66ba0406 66b80020 66ef ebfe"  # at "q" power off
)

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """The home that `vmf` uses here; what still runs at the end is killed."""
    made = Home(tmp_path / "home", tmp_path / "home" / "run")
    yield made
    for name in made.names():
        record = made.process(name)
        if record is not None:
            os.kill(record.pid, signal.SIGKILL)


@pytest.fixture
def environment(home: Home) -> dict[str, str]:
    return os.environ | {"VMF_HOME": str(home.data), "COLUMNS": "120"}


@pytest.fixture
def vmf(environment: dict[str, str], tmp_path: Path) -> Run:
    """`vmf(*arguments, status=0)` runs the command and checks its exit status."""

    def run(
        *arguments: object, status: int = 0, text_in: str | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-c", "from vmf.cli import main; main()", *map(str, arguments)],
            env=environment | more,
            input=text_in,
            stdin=subprocess.DEVNULL if text_in is None else None,
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
        )
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture
def here(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., SimpleNamespace]:
    """The same in this process, for what needs no process of its own; faster."""
    monkeypatch.setenv("VMF_HOME", str(home.data))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, status: int | None = 0, **more: str) -> SimpleNamespace:
        from vmf.cli import app

        with monkeypatch.context() as patched:
            for key, value in more.items():
                patched.setenv(key, value)
            returned = app.run([str(each) for each in arguments])
        out, err = capsys.readouterr()
        assert returned == status or status is None, (returned, out, err)
        return SimpleNamespace(stdout=out, stderr=err)

    return run


@pytest.fixture
def image(tmp_path: Path) -> Path:
    made = tmp_path / "echo.bin"
    made.write_bytes(ECHO_GUEST)
    return made
