"""Where a user's directories are, also for a user who has none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmf import directories
from vmf.errors import ConfigError
from vmf.machine.home import Home

VARIABLES = ("HOME", "VMF_HOME", "VMF_CACHE", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR")
NOBODY = 54321
"""A user id that no passwd file has."""


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def unknown_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)


def test_xdg_variables_count_only_when_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("relative", "./x", "~/x", " "):
        for variable in VARIABLES[3:]:
            monkeypatch.setenv(variable, value)
        assert directories.data_directory() == tmp_path / ".local/share/vmf"
        assert directories.config_directory() == tmp_path / ".config/vmf"
        assert directories.cache_directory() == tmp_path / ".cache/vmf"
        base = directories.runtime_base()
        assert base is None or base.is_relative_to("/run/user")
    monkeypatch.setenv("XDG_DATA_HOME", "/srv/data")
    assert directories.data_directory() == Path("/srv/data/vmf")


def test_a_user_without_a_home_is_told_what_to_set(unknown_user: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for home in (None, "", "not/absolute"):
        if home is not None:
            monkeypatch.setenv("HOME", home)
        for look in (
            directories.data_directory,
            directories.config_directory,
            directories.cache_directory,
            Home.default,
        ):
            with pytest.raises(ConfigError, match=str(NOBODY)) as caught:
                look()
            assert "VMF_HOME" in caught.value.remedy
        with pytest.raises(ConfigError):
            directories.absolute("~/file")
        assert directories.optional_cache_directory() is None
    monkeypatch.setenv("VMF_HOME", "/srv/vmf")
    assert Home.default().data == Path("/srv/vmf")


def test_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert directories.absolute("~") == tmp_path
    assert directories.absolute("~/a/../b") == tmp_path / "b"
    assert directories.absolute("~root/b").is_absolute()
    with pytest.raises(ConfigError, match="no user 'nobody-of-this-name'"):
        directories.absolute("~nobody-of-this-name/b")
    (tmp_path / "~odd").touch()
    assert directories.absolute("~odd") == tmp_path / "~odd"


@pytest.mark.parametrize(
    "arguments",
    [
        ("list", "vms"),
        ("list", "runningvms"),
        ("createvm", "a", "--memory", "4"),
        ("startvm", "a"),
        ("startvm", "a", "--detach"),
        ("showvminfo", "a"),
        ("tls", "show"),
        ("tls", "init"),
        ("media", "list"),
        ("snapshot", "a", "list"),
    ],
)
def test_commands_of_a_user_without_a_home(
    unknown_user: None,
    arguments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, status 2, and no directory called "~"."""
    from vmf.cli import app

    monkeypatch.chdir(tmp_path)
    assert app.run(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"user {NOBODY}" in line
    assert "VMF_HOME" in line
    assert list(tmp_path.iterdir()) == []
