"""The NBD client against QEMU's server, and against servers that misbehave."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmf.errors import ConfigError, NotFoundError, StorageError, VmfError
from vmf.storage.uri import format_options
from vmf_storage_nbd import protocol as p
from vmf_storage_nbd.address import parse
from vmf_storage_nbd.driver import NbdDriver

MIB = 1 << 20
SIZE = 16 * MIB
needs_qemu = pytest.mark.skipif(
    not (shutil.which("qemu-storage-daemon") and shutil.which("qemu-img")),
    reason="qemu-storage-daemon is not installed (Debian: apt install qemu-utils)",
)


class Server:
    """A qemu-storage-daemon below a directory."""

    def __init__(self, directory: Path, *more: str, tls: str = "") -> None:
        self.directory = directory
        self.socket = directory / "nbd.sock"
        self.tls = tls
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", directory / "disk.qcow2", str(SIZE)], check=True, timeout=60
        )
        (directory / "lease").write_bytes(bytes(8192))
        self.start(*more)

    def start(self, *more: str) -> None:
        self.socket.unlink(missing_ok=True)
        where = f"addr.type=unix,addr.path={self.socket}"
        if self.tls:
            probe = socket.create_server(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
            probe.close()
            where = f"addr.type=inet,addr.host=127.0.0.1,addr.port={self.port},tls-creds=tls"
        self.process = subprocess.Popen(
            [
                "qemu-storage-daemon",
                *(
                    ["--object", f"tls-creds-x509,id=tls,endpoint=server,dir={self.tls},verify-peer=on"]
                    if self.tls
                    else []
                ),
                *("--blockdev", f"driver=file,filename={self.directory / 'disk.qcow2'},node-name=f,discard=unmap"),
                *("--blockdev", "driver=qcow2,file=f,node-name=disk,discard=unmap"),
                *("--blockdev", f"driver=file,filename={self.directory / 'lease'},node-name=lf"),
                *("--blockdev", "driver=raw,file=lf,node-name=lease"),
                *("--nbd-server", f"{where},max-connections=0"),
                *("--export", "type=nbd,id=a,node-name=disk,name=disk,writable=on"),
                *("--export", "type=nbd,id=b,node-name=lease,name=disk.vmf-lease,writable=on"),
                *more,
            ]
        )
        end = time.monotonic() + 60
        while not self._answers():
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < end, "the server does not start"
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            if self.tls:
                socket.create_connection(("127.0.0.1", self.port), 5).close()
            else:
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.connect(str(self.socket))
            return True
        except OSError:
            return False

    def uri(self, export: str = "disk", options: str = "") -> str:
        if self.tls:
            return f"nbds://localhost:{self.port}/{export}?tls-dir={self.tls}{options}"
        return f"nbd+unix:///{export}?socket={self.socket}{options}"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(20)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def driver() -> NbdDriver:
    return NbdDriver("nbd+unix")


@needs_qemu
def test_a_qcow2_disk(server: Server, driver: NbdDriver) -> None:
    info = driver.probe(server.uri())
    assert (info.size, info.writable) == (SIZE, True)
    image = driver.open(server.uri(), False)
    data = os.urandom(3 * MIB)
    pieces = [memoryview(data)[at : at + 65536] for at in range(0, len(data), 65536)]
    image.writev(MIB + 512, pieces)
    image.flush()
    back = bytearray(5 * MIB)
    image.readv(0, [memoryview(back)[: 2 * MIB], memoryview(back)[2 * MIB :]])
    assert back == bytes(MIB + 512) + data + bytes(MIB - 512)
    image.write_zeroes(2 * MIB, MIB)
    image.write_zeroes(3 * MIB, 4096, may_unmap=False)
    image.discard(0, MIB)
    image.readv(2 * MIB, [memoryview(back)[: MIB + 4096]])
    assert not any(back[: MIB + 4096])
    with pytest.raises(StorageError, match="not within"):
        image.readv(SIZE - 512, [memoryview(bytearray(1024))])
    image.close()
    with pytest.raises(StorageError):
        image.readv(0, [memoryview(bytearray(512))])


@needs_qemu
def test_longer_than_one_request(tmp_path: Path, driver: NbdDriver) -> None:
    server = Server(tmp_path)
    try:
        image = driver.open(server.uri(), False)
        image._connection.first = image._connection._client.export = __import__("attrs").evolve(  # type: ignore
            image._connection.first, max_payload=8192
        )
        data = os.urandom(100 * 512)
        image.writev(512, [memoryview(data)[:1536], memoryview(data)[1536:]])
        back = bytearray(len(data))
        image.readv(512, [memoryview(back)])
        assert back == data
        image.close()
    finally:
        server.stop()


@needs_qemu
def test_many_threads(server: Server, driver: NbdDriver) -> None:
    """Each writes and reads its own part, on one connection; replies find their requests."""
    image = driver.open(server.uri(), False)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for round_ in range(60):
                data = bytes([number * 16 + round_ % 16]) * 8192
                image.writev(number * MIB, [memoryview(data)])
                back = bytearray(8192)
                image.readv(number * MIB, [memoryview(back)])
                assert back == data
                if round_ % 20 == 0:
                    image.flush()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    image.close()


@needs_qemu
def test_a_server_that_dies_and_comes_back(server: Server, driver: NbdDriver) -> None:
    image = driver.open(server.uri(), False)
    image.writev(0, [memoryview(b"a" * 512)])
    image.flush()
    image.writev(512, [memoryview(b"b" * 512)])
    server.stop()
    with pytest.raises(StorageError):
        image.readv(0, [memoryview(bytearray(512))])
    with pytest.raises(StorageError, match="cannot be reached"):
        image.readv(0, [memoryview(bytearray(512))])
    server.start()
    back = bytearray(512)
    image.readv(0, [memoryview(back)])
    assert back == b"a" * 512
    with pytest.raises(StorageError, match="broke before"):
        image.flush()
    image.flush()
    image.close()


@needs_qemu
def test_exports_that_are_not_there_or_not_writable(tmp_path: Path, driver: NbdDriver) -> None:
    server = Server(tmp_path, "--export", "type=nbd,id=c,node-name=disk,name=ro,writable=off")
    try:
        with pytest.raises(NotFoundError, match="no export 'other'"):
            driver.probe(server.uri("other"))
        assert not driver.probe(server.uri("ro")).writable
        with pytest.raises(StorageError, match="lets nobody write"):
            driver.open(server.uri("ro"), False)
        driver.open(server.uri("ro"), True).close()
        assert driver.lease_store(server.uri("ro"), create=True) is None
        with pytest.raises(NotFoundError):
            driver.lease_store(server.uri("disk", "&lease=gone"), create=True)
    finally:
        server.stop()


@needs_qemu
def test_a_machine_moves(server: Server) -> None:
    """The storage of two machines, with the lease in its export. Nothing excludes there, so a crash needs a person."""
    from vmf.machine.config import DriveConfig, MachineConfig
    from vmf.machine.storage import MachineStorage
    from vmf.plugins.bridge import PluginRegistry
    from vmf.storage.media import break_lease, lease_of

    registry = PluginRegistry()

    def side(name: str) -> MachineStorage:
        drives = (DriveConfig(port=0, medium=server.uri()),)
        return MachineStorage(MachineConfig(name=name, memory_mib=16, drives=drives), registry, print)

    source, target, third = side("source"), side("target"), side("third")
    source.open()
    source.drives[0].writev(0, [memoryview(b"x" * 512)])
    target.prepare()
    assert target.check(source.describe(publish=True)) == []
    assert not source.leased, "only people can decide here"
    source.pass_leases("ab" * 16)
    target.take_leases("ab" * 16)
    back = bytearray(512)
    target.drives[0].readv(0, [memoryview(back)])
    assert back == b"x" * 512
    with pytest.raises(VmfError, match="machine target"):
        source.take_leases("ab" * 16)
    with pytest.raises(VmfError, match="machine target"):
        third.open()
    assert lease_of(registry, server.uri()).standing == "held"
    break_lease(registry, server.uri())
    time.sleep(0.3)  # the fence looks so often
    with pytest.raises(VmfError, match="nobody holds it"):
        target.drives[0].writev(0, [memoryview(b"y" * 512)])
    third.open()
    for each in (source, target, third):
        each.close()
    assert lease_of(registry, server.uri()).standing == "free"


@needs_qemu
def test_tls(tmp_path: Path) -> None:
    trustme = pytest.importorskip("trustme")
    ca = trustme.CA()
    good, evil = tmp_path / "tls", tmp_path / "evil"
    for directory, authority in ((good, ca), (evil, trustme.CA())):
        directory.mkdir()
        authority.cert_pem.write_to_path(directory / "ca-cert.pem")
        for role in ("server", "client"):
            issued = authority.issue_cert("localhost")
            issued.private_key_pem.write_to_path(directory / f"{role}-key.pem")
            issued.cert_chain_pems[0].write_to_path(directory / f"{role}-cert.pem")
    server = Server(tmp_path, tls=str(good))
    driver = NbdDriver("nbds")
    try:
        image = driver.open(server.uri(), False)
        data = os.urandom(3 * MIB)
        image.writev(0, [memoryview(data)])
        results = []

        def read() -> None:
            back = bytearray(len(data))
            image.readv(0, [memoryview(back)])
            results.append(back == data)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert results == [True] * 4
        image.close()
        with pytest.raises(StorageError, match=r"nbds://"):
            NbdDriver("nbd").probe(f"nbd://localhost:{server.port}/disk")
        with pytest.raises(StorageError, match="not accepted"):
            driver.probe(f"nbds://localhost:{server.port}/disk?tls-dir={evil}")
        with pytest.raises(StorageError, match="not accepted"):
            driver.probe(f"nbds://127.0.0.1:{server.port}/disk?tls-dir={good}")
        driver.probe(f"nbds://127.0.0.1:{server.port}/disk?tls-dir={good}&tls-hostname=localhost")
        with pytest.raises(StorageError, match="cannot be used"):
            driver.probe(f"nbds://localhost:{server.port}/disk?tls-dir={tmp_path}")
    finally:
        server.stop()


def test_uris() -> None:
    address = parse("nbd://[::1]:1234/a%20b?lease=x+y%2B#1")
    assert (address.host, address.port, address.export, address.lease) == ("::1", 1234, "a b", "x+y+#1")
    assert address.server == "[::1]:1234"
    assert parse("nbd://storage/web").port == 10809
    assert parse("nbd://storage/web#1+2").export == "web#1+2"
    assert parse("nbd://storage//a/?lease=b?c").export == "/a/"
    assert parse("nbd://storage//a/?lease=b?c").lease == "b?c"
    assert parse("nbd://storage").export == ""
    assert parse("nbd+unix:///w?socket=/run/a%3Fb").socket == "/run/a?b"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("nbd:x", "no // behind"), ("nbd:/h/x", "no // behind"), ("nbds:///e", "no host"), ("nbd://", "no host"),
        ("nbd://:10809/e", "no host"), ("nbd://h:x/e", "no TCP port"), ("nbd://h:/e", "no TCP port"),
        ("nbd://h:0/e", "no TCP port"), ("nbd://h:65536/e", "no TCP port"), ("nbd://h:+80/e", "no TCP port"),
        ("nbd://h:1:2/e", "no host and port"), ("nbd://::1/e", "brackets"), ("nbd://[::1/e", "brackets"),
        ("nbd://[h]/e", "no IPv6 address"), ("nbd://[]/e", "no host"), ("nbd://me@h/e", "names a user"),
        ("nbd+unix:///e", "no socket"), ("nbd+unix:///e?socket=rel", "no socket"),
        ("nbd+unix://h/e?socket=/s", "stands where a host would"), ("nbd+unix:///e?socket=/s%00", "%00"),
        ("nbd://h/e?leese=1", "no option 'leese'"), ("nbd://h/e?tls-dir=/x", "no option 'tls-dir'"),
        ("nbd://h/e?socket=/x", "no option 'socket'"), ("nbds://h/e?socket=/x", "no option 'socket'"),
        ("nbd://h/e?lease=a&lease=b", "twice"), ("nbd://h/e?lease=a&lease=a", "twice"), ("nbd://h/e?lease", "no value"),
        ("nbd://h/e?lease=", "no value"), ("nbd://h/e?lease=a&", "no option ''"), ("nbd://h/e?lease=e", "overwrite"),
        ("nbd://h/%65?lease=e", "overwrite"),
        ("nbd://h/e?format=qcow2", "is a raw disk"),
        ("nbd://h/100%", "%25"), ("nbd://h/%zz", "%25"), ("nbd://h/%ff", "UTF-8"),
        ("nbd://h/a\nb", "control character"), ("nbd://h/" + 4097 * "x", "4096"),
    ],
)  # fmt: skip
def test_wrong_uris(uri: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(uri)
    assert said in f"{caught.value.message} {caught.value.remedy}"


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)


@given(export=NAMES, lease=NAMES.filter(bool), socket_=NAMES, port=st.integers(1, 65535))
def test_what_is_escaped_comes_back(export: str, lease: str, socket_: str, port: int) -> None:
    if lease == export:
        lease += "x"
    options = {"lease": lease, "socket": "/" + socket_}
    over_unix = parse(f"nbd+unix:///{quote(export, safe='')}{format_options(options)}")
    assert (over_unix.export, over_unix.lease, over_unix.socket) == (export, lease, "/" + socket_)
    over_tcp = parse(f"nbd://h:{port}/{quote(export)}{format_options({'lease': lease})}")
    assert (over_tcp.export, over_tcp.lease, over_tcp.port) == (export, lease, port)


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".example"])
def test_a_host_that_no_resolver_takes(driver: NbdDriver, host: str) -> None:
    with pytest.raises(VmfError, match=r"no host name|cannot be reached"):
        driver.probe(f"nbd://{host}/web")


def test_a_socket_that_is_not_there(driver: NbdDriver, tmp_path: Path) -> None:
    for path in (tmp_path / "s", tmp_path / ("s" * 200), tmp_path / ("s" * 300)):
        with pytest.raises(StorageError) as caught:
            driver.probe(f"nbd+unix:///web?socket={path}")
        assert str(path) in caught.value.message
        assert "network" not in caught.value.remedy


@needs_qemu
def test_an_image_that_its_server_does_not_read(driver: NbdDriver, tmp_path: Path) -> None:
    """The server exports the file of a qcow2 image as if it were a disk."""
    more = ("--blockdev", f"driver=file,filename={tmp_path / 'cow'},node-name=c", "--export",
            "type=nbd,id=c,node-name=c,name=cow")  # fmt: skip
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "cow", "4M"], check=True, timeout=60)
    server = Server(tmp_path, *more)
    try:
        assert driver.probe(server.uri("cow")).looks_like == "qcow2"
        assert driver.probe(server.uri("cow", "&format=raw")).looks_like == ""
        assert driver.probe(server.uri()).looks_like == "", "a disk in a qcow2 image"
    finally:
        server.stop()


@needs_qemu
def test_a_socket_with_a_long_path(driver: NbdDriver, tmp_path: Path) -> None:
    """The kernel takes 107 bytes in a call; what was made by a shorter name is reached by its long one."""
    short = tmp_path / "d"
    short.mkdir()
    server = Server(short)
    try:
        deep = tmp_path.joinpath(*(50 * "x" for _ in range(4)))
        deep.parent.mkdir(parents=True)
        short.rename(deep)
        long = deep / ("s" * 150)
        (deep / "nbd.sock").rename(long)
        assert driver.probe(f"nbd+unix:///disk?socket={long}").size == SIZE
    finally:
        server.stop()


# -- servers that misbehave ----------------------------------------------------------------------------------

HELLO = b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 3)


def option_reply(option: int, kind: int, body: bytes = b"") -> bytes:
    return struct.pack(">QIII", p.OPTION_REPLY_MAGIC, option, kind, len(body)) + body


EXPORT = option_reply(7, p.REP_INFO, struct.pack(">HQH", 0, SIZE, 1 | 4)) + option_reply(7, p.REP_ACK)


def serve(directory: Path, script: Callable[[socket.socket], None]) -> str:
    """A server that runs `script` on its one connection, then closes it."""
    path = directory / "bad.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def run() -> None:
        connection, _ = listener.accept()
        try:
            script(connection)
        except OSError:
            pass
        finally:
            connection.close()
            listener.close()

    threading.Thread(target=run, daemon=True).start()
    return f"nbd+unix:///e?socket={path}"


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"NBDMAGIC" + struct.pack(">Q", 0x420281861253),
        b"NBDMAGIC" + b"IHAVEOPT" + b"\0\0",
        HELLO,
        HELLO + b"\0" * 20,
        HELLO + option_reply(8, 1) + struct.pack(">QIII", p.OPTION_REPLY_MAGIC, 7, 3, 1 << 31),
        HELLO + option_reply(8, 1) + option_reply(7, 1),
        HELLO + option_reply(8, 1) + option_reply(7, 3, b"\0\0") * 100,
    ],
)
def test_rubbish_in_the_handshake(tmp_path: Path, driver: NbdDriver, said: bytes) -> None:
    def script(connection: socket.socket) -> None:
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass

    with pytest.raises(StorageError):
        driver.probe(serve(tmp_path, script))


def structured(kind: int, body: bytes, cookie: int = 1, flags: int = 1) -> bytes:
    return struct.pack(">IHHQI", p.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(body)) + body


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (b"\0" * 16, "nonsense"),
        (struct.pack(">IIQ", p.SIMPLE_REPLY_MAGIC, 0, 77), "was not made"),
        (struct.pack(">IIQ", p.SIMPLE_REPLY_MAGIC, 28, 1), "No space left"),
        (structured(1, p.OFFSET.pack(0) + b"x" * 4096), "more than was asked"),
        (structured(1, p.OFFSET.pack(1 << 40) + b"x" * 512), "more than was asked"),
        (structured(2, p.HOLE.pack(0, 1 << 31)), "more than was asked"),
        (structured(7, b""), "unknown kind"),
        (structured(0, b""), "left out part"),
        (structured(0x8001, p.ERROR_CHUNK.pack(5, 6) + b"broken"), "broken"),
        (structured(0x8001, p.ERROR_CHUNK.pack(5, 600) + b"\x1b[2J"), r"\[2J"),
        (structured(1, p.OFFSET.pack(0) + b"x" * 100)[:50], "closed"),
    ],
)
def test_rubbish_instead_of_data(tmp_path: Path, driver: NbdDriver, reply: bytes, said: str) -> None:
    def script(connection: socket.socket) -> None:
        connection.sendall(HELLO + option_reply(8, 1) + EXPORT)
        got = b""
        while not got.endswith(p.REQUEST.pack(p.REQUEST_MAGIC, 0, 0, 1, 0, 512)):
            got += connection.recv(1 << 16)
        connection.sendall(reply)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass

    image = driver.open(serve(tmp_path, script), True)
    with pytest.raises(StorageError, match=said) as caught:
        image.readv(0, [memoryview(bytearray(512))])
    assert "\x1b" not in str(caught.value)
    image.close()
