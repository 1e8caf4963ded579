"""A machine waits for teleports where other hosts reach it only with TLS, a password, or the user's word."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from vmf.errors import ConfigError, TransportError
from vmf.machine.home import Home
from vmf.machine.teleporter import check_exposure
from vmf.transport.base import Address, Transport


class Plain(Transport):
    """Neither encrypts nor knows who is there."""

    scheme = "plain"
    listen = connect = None  # type: ignore[assignment]


class Sealed(Plain):
    authenticates = True


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.4.5", "::1", "localhost"])
def test_on_loopback_anything_goes(host: str) -> None:
    check_exposure("box", Plain(), Address("plain", host, 6000))


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "*", "192.0.2.7", "2001:db8::7", "fe80::1%1", "::ffff:192.0.2.7"]
)
def test_elsewhere_it_takes_a_reason(host: str) -> None:
    with pytest.raises(ConfigError, match="neither TLS nor a password") as caught:
        check_exposure("box", Plain(), Address("plain", host, 6000))
    for remedy in (
        "--teleporter-password-file stdin",
        "--teleporter-transport tls",
        "localhost",
        "startvm box --insecure",
    ):
        assert remedy in caught.value.remedy
    check_exposure("box", Sealed(), Address("plain", host, 6000))


def test_a_name_of_this_host_that_others_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several addresses is enough."""
    answers = [(socket.AF_INET, 0, 0, "", ("127.0.0.1", 0)), (socket.AF_INET, 0, 0, "", ("192.0.2.7", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **keywords: answers)
    with pytest.raises(ConfigError, match=r"wait on both\.example with"):
        check_exposure("box", Plain(), Address("plain", "both.example", 6000))
    answers.pop()
    check_exposure("box", Plain(), Address("plain", "both.example", 6000))


def test_an_unknown_name_is_told_as_one() -> None:
    with pytest.raises(TransportError, match="unknown host"):
        check_exposure("box", Plain(), Address("plain", "no-such-host.invalid", 6000))


def test_startvm(vmf: Any, home: Home, image: Path, tmp_path: Path) -> None:
    """With the default address, in the four ways."""
    secret = tmp_path / "secret"
    secret.write_text("a quiet evening by the lake\n")
    secret.chmod(0o600)
    hardware = ("--memory", 16, "--image", image, "--cpu-backend", "unicorn")
    vmf("createvm", "box", *hardware, "--teleporter", "on", "--teleporter-port", 0)
    assert home.load("box").teleporter.enabled

    def waits(*options: str) -> bool:
        answer = json.loads(vmf("startvm", "box", "--detach", "--json", *options).stdout)
        vmf("controlvm", "box", "poweroff")
        return bool(answer["state"] == "teleportingin")

    done = vmf("startvm", "box", "--detach", status=2)
    assert (
        "machine box would wait on 0.0.0.0, every address of this host, with neither TLS nor a password" in done.stderr
    )
    assert len(done.stderr.splitlines()) == 1
    assert json.loads(vmf("showvminfo", "box", "--json").stdout)["state"] == "poweredoff"
    assert waits("--insecure")
    vmf("startvm", "box", "--detach", status=2)  # it was for once
    vmf("modifyvm", "box", "--teleporter-insecure", "on")
    assert "insecure = true" in home.paths("box").definition.read_text()
    assert waits()
    vmf("modifyvm", "box", "--teleporter-insecure", "off")
    assert "insecure" not in home.paths("box").definition.read_text()
    vmf("modifyvm", "box", "--teleporter-password-file", secret)
    assert waits()
    vmf("modifyvm", "box", "--teleporter-password-file", "none", "--teleporter-address", "localhost")
    assert waits()


def test_createvm_takes_every_option_of_the_teleporter(here: Any, home: Home, image: Path, tmp_path: Path) -> None:
    import click

    from vmf.cli.define import createvm, modifyvm

    def options(command: click.Command) -> set[str]:
        return {name for each in command.params for name in each.opts if name.startswith("--teleporter")}

    assert options(createvm) == options(modifyvm)
    assert len(options(createvm)) >= 9
    here(
        "createvm", "box", "--memory", 16, "--image", image, "--teleporter", "on", "--teleporter-port", 6000,
        "--teleporter-address", "::1", "--teleporter-transport", "tls", "--teleporter-tls-dir", tmp_path,
        "--teleporter-allow", "alpha", "--teleporter-allow", "beta", "--teleporter-password", "by the lake, at dawn",
        "--teleporter-insecure", "on",
    )  # fmt: skip
    made = home.load("box").teleporter
    assert (made.enabled, made.port, made.address, made.transport) == (True, 6000, "::1", "tls")
    assert (made.tls_dir, made.allow, made.insecure) == (tmp_path, ("alpha", "beta"), True)
    assert made.password_verifier is not None
