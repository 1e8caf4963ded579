"""`vmf tls` comes from a plugin: found without importing it, missed with a clear error."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from vmf.cli import app
from vmf.testing.hosts import Host


def test_help_names_it_and_imports_nothing_of_it() -> None:
    code = (
        "import sys; from vmf.cli.app import run; status = run(['--help']); "
        "sys.exit(status or any(name.startswith(('vmf_', 'cryptography', 'ssl')) for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "  tls " in done.stdout


def test_without_the_plugin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(app, "plugin_commands", dict)
    assert app.run(["tls", "show"]) == 1
    said = capsys.readouterr().err
    assert said == (
        "vmf: error: The command 'tls' is part of the distribution vmf-transport-tls, which is not installed. "
        "Install it: pip install vmf-transport-tls\n"
    )


@pytest.mark.parametrize(
    ("target", "reason"),
    [("vmf.no_such_module:tls", "ModuleNotFoundError"), ("vmf.errors:VmfError", "is no click command but a type")],
)
def test_a_broken_command_of_a_plugin_is_named(
    target: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    point = EntryPoint("tls", target, app.PLUGIN_GROUP)
    monkeypatch.setattr(app, "plugin_commands", lambda: {"tls": point})
    assert app.run(["tls", "show"]) == 1
    said = capsys.readouterr().err
    assert "command 'tls' of the plugin" in said
    assert reason in said
    assert app.run(["list", "vms"]) == 0


def test_a_plugin_cannot_replace_a_command_of_vmf(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("list", "evil:x", app.PLUGIN_GROUP), EntryPoint("more", "good:x", app.PLUGIN_GROUP)]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)
    assert list(app.plugin_commands()) == ["more"]


def test_the_allow_list_is_kept_and_cleared(tmp_path: Path) -> None:
    with Host(tmp_path) as host:

        def ok(*arguments: str) -> str:
            done = host.vmf(*arguments)
            assert done.returncode == 0, done.stderr
            return done.stdout

        ok("createvm", "box", "--memory", "16")
        refused = host.vmf("modifyvm", "box", "--teleporter-allow", "alpha")
        assert refused.returncode == 2
        assert "--teleporter-transport tls" in refused.stderr
        directory = str(tmp_path / "certificates")
        ok("modifyvm", "box", "--teleporter-transport", "tls", "--teleporter-tls-dir", directory)
        ok("modifyvm", "box", "--teleporter-allow", "alpha", "--teleporter-allow", "beta")
        ok("modifyvm", "box", "--teleporter-allow", "beta", "--teleporter-allow", "gamma")
        teleporter = host.home.load("box").teleporter
        assert teleporter.allow == ("alpha", "beta", "gamma")
        assert str(teleporter.tls_dir) == directory
        ok("modifyvm", "box", "--teleporter-allow", "none", "--teleporter-tls-dir", "none")
        teleporter = host.home.load("box").teleporter
        assert (teleporter.allow, teleporter.tls_dir) == ((), None)
        ok("modifyvm", "box", "--teleporter", "on")
        done = host.vmf("startvm", "box", "--detach")
        assert done.returncode == 1
        assert "no usable certificates" in done.stderr
        assert "vmf tls init" in done.stderr
        assert "--teleporter-tls-dir" in done.stderr
