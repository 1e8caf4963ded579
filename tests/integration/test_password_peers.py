"""Teleport peers with a password: asked before a start, and by `vmf cpuid`."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

from vmf.machine.config import CpuidConfig, MachineConfig
from vmf.teleport.authentication import Verifier
from vmf.testing.hosts import Host

SECRET = "a rather long corridor"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    path.chmod(0o600)
    return path


def test_peers_with_a_password(hosts: tuple[Host, Host], builtin: MachineConfig, secret: Path) -> None:
    source, target = hosts
    target.define(builtin)
    port = target.wait("box", password_verifier=str(Verifier.of(SECRET)))
    peer = f"127.0.0.1:{port}"
    source.define(evolve(builtin, cpuid=CpuidConfig(portability_level="auto", peers=(peer,))))

    done = source.vmf("startvm", "box", "--detach")
    assert done.returncode == 1
    assert "asks for a password" in done.stderr
    assert "startvm box --peer-password-file FILE" in done.stderr
    done = source.vmf("startvm", "box", "--detach", "--peer-password-file", str(secret))
    assert done.returncode == 0, done.stderr
    source.wait_for_output("box", b"tick 2 ")
    pid = source.pid("box")
    assert pid is not None
    for name in ("cmdline", "environ"):
        assert SECRET.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
    assert SECRET not in source.home.paths("box").vmm_log.read_text()

    done = source.vmf("cpuid", "compare", peer)
    assert done.returncode == 1
    assert "asks for a password" in done.stderr
    done = source.vmf("cpuid", "compare", peer, "--password-file", str(secret))
    assert done.returncode == 0, done.stderr
    assert target.state("box") == "teleportingin"
