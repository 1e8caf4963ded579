"""`vmf tls`: certificates that work, files that nobody else can read, nothing replaced by accident."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from vmf.errors import ConfigError, TransportError, VmfError
from vmf.transport.base import Address
from vmf_transport_tls import files, issue
from vmf_transport_tls.commands import tls
from vmf_transport_tls.transport import TlsTransport


def run(*arguments: str) -> Result:
    done = CliRunner().invoke(tls, list(arguments))
    if isinstance(done.exception, VmfError):
        raise done.exception
    return done


def ok(*arguments: str) -> str:
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VMF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def private(directory: Path) -> None:
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for path in directory.iterdir():
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def move(source: Path, target: Path, **options: object) -> tuple[str, ...]:
    """A connection between two hosts with these directories; the target's names as the source sees them."""
    listener = TlsTransport().listen(Address("tls", "127.0.0.1", 0, {"tls_dir": str(target)}))
    try:
        address = Address("tls", "127.0.0.1", listener.address.port, {"tls_dir": str(source)} | options)
        channel = TlsTransport().connect(address, 10)
        listener.accept(10).close()
        channel.close()
        return channel.peer  # type: ignore[attr-defined, no-any-return]
    finally:
        listener.close()


def test_two_people_are_encrypted_in_two_commands(home: Path) -> None:
    ok("init")
    said = ok("issue", "otherhost")
    other = home / "tls" / "issued" / "otherhost"
    assert str(other) in said
    private(home / "tls")
    private(other)
    assert not (other / "ca-key.pem").exists()
    assert "otherhost" in move(home / "tls", other, tls_hostname="otherhost")
    assert "localhost" in move(other, home / "tls", tls_hostname="localhost")
    with pytest.raises(TransportError, match="not for '127"):
        move(home / "tls", other)


def test_names_and_roles(home: Path, tmp_path: Path) -> None:
    ok("init", "--name", "ca.example")
    ok("issue", "laptop", "--client", "--out", str(tmp_path / "laptop"), "--days", "9")
    assert sorted(path.name for path in (tmp_path / "laptop").iterdir()) == [
        "ca-cert.pem",
        "client-cert.pem",
        "client-key.pem",
    ]
    assert "ca.example" in move(tmp_path / "laptop", home / "tls", tls_hostname="ca.example")
    ok("issue", "web", "--name", "127.0.0.1", "--server", "--out", str(tmp_path / "web"))
    assert "127.0.0.1" in move(tmp_path / "laptop", tmp_path / "web")
    # A client certificate does not make a target, nor the other way round.
    for one, two in (("client", "server"), ("server", "client")):
        host = tmp_path / ("laptop" if one == "client" else "web")
        for kind in ("cert", "key"):
            os.link(host / f"{one}-{kind}.pem", host / f"{two}-{kind}.pem")
    with pytest.raises(TransportError, match="issued for another purpose"):
        move(home / "tls", tmp_path / "laptop", tls_hostname="laptop")
    with pytest.raises(TransportError, match="issued for another purpose"):
        move(tmp_path / "web", home / "tls", tls_hostname="ca.example")


def test_nothing_is_replaced_without_force(home: Path) -> None:
    ok("init")
    before = {path: path.read_bytes() for path in (home / "tls").iterdir()}
    with pytest.raises(ConfigError, match=r"ca-cert\.pem is there already.*--force"):
        run("init")
    ok("issue", "a")
    with pytest.raises(ConfigError, match=r"server-cert\.pem is there already"):
        run("issue", "a")
    assert all(path.read_bytes() == data for path, data in before.items())
    ok("issue", "a", "--force")
    ok("init", "--force")
    assert all(path.read_bytes() != data for path, data in before.items())
    (home / "tls" / "issued" / "a" / "client-cert.pem").unlink()
    (home / "tls" / "issued" / "a" / "client-key.pem").unlink()
    with pytest.raises(ConfigError, match="of another CA"):
        run("issue", "a", "--client")
    ok("issue", "a", "--client", "--out", str(home / "elsewhere"))
    with pytest.raises(TransportError, match="same CA"):
        move(home / "tls", home / "tls" / "issued" / "a", tls_hostname="a")


def test_mistakes_are_named(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no CA in .*vmf tls init"):
        run("issue", "a")
    assert "vmf tls init" in ok("show")
    ok("init")
    for bad in ("../evil", "a b", "", "-x.example", "x" * 300, "a..b"):
        with pytest.raises(ConfigError, match="neither a host name nor an IP address"):
            issue.check_host(bad)
    with pytest.raises(ConfigError, match="neither a host name"):
        run("issue", "../evil")
    assert run("issue", "a", "--client", "--server").exit_code == 2
    (home / "tls" / "ca-key.pem").write_text("nonsense")
    with pytest.raises(ConfigError, match="cannot be read as a key"):
        run("issue", "a")
    other = tmp_path / "other"
    issue.make_ca(other)
    (home / "tls" / "ca-key.pem").write_bytes((other / "ca-key.pem").read_bytes())
    with pytest.raises(ConfigError, match="is not the key of"):
        run("issue", "a")


def test_show_says_what_there_is(home: Path) -> None:
    ok("init", "--name", "here.example")
    said = ok("show")
    assert str(home / "tls") in said
    assert "as a target: here.example" in said
    assert "expires in 82" in said
    assert "problem" not in said
    os.chmod(home / "tls" / "client-key.pem", 0o644)
    assert "problem" in ok("show")


def test_a_certificate_never_outlives_its_ca(tmp_path: Path) -> None:
    issue.make_ca(tmp_path, days=10)
    issue.issue(tmp_path, tmp_path, ["a"], days=100)
    assert files.days_left(files.read_certificate(tmp_path / "server-cert.pem")) <= 10


def test_a_read_only_place_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VmfError, match="not a directory"):
        issue.make_ca(tmp_path / "file" / "tls")


@pytest.mark.parametrize(
    ("names", "allow", "expected"),
    [
        (("a.example",), (), True),
        (("a.example", "b"), ("b",), True),
        (("A.Example",), ("a.example.",), True),
        (("0:0:0:0:0:0:0:1",), ("::1",), True),
        (("192.0.2.1",), ("192.0.2.10",), False),
        (("a.example",), ("example",), False),
        (("*.example",), ("a.example",), False),
        ((), ("a",), False),
    ],
)
def test_allow_list(names: tuple[str, ...], allow: tuple[str, ...], expected: bool) -> None:
    assert files.is_allowed(names, allow) is expected
