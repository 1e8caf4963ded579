"""`vmf tls` comes from a plugin: found without importing it, missed with a clear error."""

from __future__ import annotations

import subprocess
import sys
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
    monkeypatch.setitem(app.COMMANDS, "tls", ("vmf_transport_missing.commands", "tls", "Certificates."))
    assert app.run(["tls", "show"]) == 1
    said = capsys.readouterr().err
    assert said == (
        "vmf: error: The command 'tls' is part of the distribution vmf-transport-tls, which is not installed. "
        "Install it: pip install vmf-transport-tls\n"
    )


def test_a_plugin_that_misses_something_else_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(app.COMMANDS, "tls", ("vmf.no_such_module", "tls", "Certificates."))
    assert app.run(["tls", "show"]) == app.EXIT_INTERNAL


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
