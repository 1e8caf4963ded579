"""What somebody new does first: the demonstration, the example programs, an installation without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[2]


def run(*command: str, timeout: float = 120, **environment: str) -> str:
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_demonstration_with_the_built_in_guest() -> None:
    command = (sys.executable, "-m", "vmf.cli", "demo", "--guest", "builtin", "--hops", "2", "--stay", "0.5")
    shown = run(*command)
    assert "across 2 teleports: none missing, none twice" in shown
    assert "amber | tick" in shown
    assert "blue | tick" in shown


def test_two_machines_in_one_program() -> None:
    shown = run(sys.executable, str(TREE / "examples" / "teleport_in_one_script.py"))
    assert "--- teleported ---" in shown
    assert "downtime_ns" in shown


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pip_install_without_a_compiler_gives_a_working_teleport(tmp_path: Path) -> None:
    """The workspace's `pip install .`, with a C compiler that always fails: the slower gate does the whole job."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True, symlinks=True)
    python = str(home / "bin" / "python")
    tree = tmp_path / "tree"
    run("git", "clone", "--quiet", str(TREE), str(tree))
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "install", str(tree), timeout=500, CC="/bin/false")
    plugins = run(str(home / "bin" / "vmf"), "list", "plugins")
    assert "python gate" in plugins, plugins
    shown = run(str(home / "bin" / "vmf"), "demo", "--guest", "builtin", "--hops", "1", "--stay", "0.5")
    assert "none missing, none twice" in shown
