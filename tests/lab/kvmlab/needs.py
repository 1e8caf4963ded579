"""What the lab needs of the machine it runs on, and running the tools that it uses."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from kvmlab.errors import LabError, LabUnavailable

PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mkfs.ext4": "e2fsprogs",
    "debootstrap": "debootstrap",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
}
"""The Debian package of each command."""

RUNNING = ("qemu-system-x86_64", "mkfs.ext4")
BUILDING = ("debootstrap", "apt-get", "dpkg-deb")


def release() -> tuple[str, str]:
    """This machine's distribution and the code name of its release, e.g. ("debian", "bookworm"); "" if unknown."""
    try:
        fields = platform.freedesktop_os_release()
    except OSError:
        return "", ""
    return fields.get("ID", ""), fields.get("VERSION_CODENAME", "")


def missing(*, base_is_built: bool) -> list[str]:
    """All that is missing here, one line each; empty when the lab can work.

    Args:
        base_is_built: the Debian image is in the cache; then neither root nor apt is needed.
    """
    lacks = []
    if platform.machine() != "x86_64":
        lacks.append(f"an x86-64 machine (this is {platform.machine()})")
    if not base_is_built:
        if os.geteuid() != 0:
            lacks.append("root (debootstrap)")
        if release()[0] != "debian":
            lacks.append(f"Debian with its apt sources (this is {release()[0] or 'unknown'})")
    commands = RUNNING if base_is_built else (*RUNNING, *BUILDING)
    return lacks + [f"{name} (apt install {PACKAGES[name]})" for name in commands if which(name) is None]


def require(*, base_is_built: bool) -> None:
    """Raise LabUnavailable naming everything that is missing."""
    lacks = missing(base_is_built=base_is_built)
    if lacks:
        raise LabUnavailable(
            f"the KVM lab needs {', '.join(lacks)}.", "See tests/lab/README.md for what it needs and why."
        )


def which(command: str) -> str | None:
    """The command's path; the administrator's directories are searched whatever PATH says."""
    return shutil.which(command, path=os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin")


def call(arguments: Sequence[str | Path], *, what: str, cwd: Path | None = None, timeout: float = 600.0) -> str:
    """Run a tool; its standard output. Raises LabError with the end of what it printed when it fails.

    Args:
        what: what it was to do, for the error: "the lab could not `what`".
        timeout: seconds.
    """
    command = [str(argument) for argument in arguments]
    command[0] = which(command[0]) or command[0]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    environment["PATH"] = environment.get("PATH", "") + ":/usr/sbin:/sbin"
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, timeout=timeout, capture_output=True, text=True, errors="replace",
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise LabUnavailable(f"the lab could not {what}: {arguments[0]} is not installed.") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"the lab could not {what}: {arguments[0]} was still busy after {timeout:.0f} s.") from error
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise LabError(f"the lab could not {what}: {arguments[0]} ended with status {done.returncode}:\n{tail}")
    return done.stdout
