"""Raw images: what is written is read, errors are errors of one request, discard gives space back."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmf.errors import ConfigError, ImageInUse, NotFoundError, StorageError
from vmf.memory.guest import GuestMemory
from vmf.memory.scattered import RamRanges
from vmf_storage_file import image as image_module
from vmf_storage_file import kernel
from vmf_storage_file.driver import FileDriver

MIB = 1 << 20


@pytest.fixture
def driver() -> FileDriver:
    return FileDriver()


@pytest.fixture
def path(tmp_path: Path, driver: FileDriver) -> str:
    name = str(tmp_path / "disk.img")
    driver.create(name, 4 * MIB)
    return name


def test_created_images_are_sparse_and_read_as_zeroes(driver: FileDriver, path: str) -> None:
    info = driver.probe(path)
    assert (info.size, info.allocated, info.writable) == (4 * MIB, 0, True)
    image = driver.open(path, True)
    data = bytearray(b"x" * 4096)
    image.readv(MIB, [memoryview(data)])
    assert data == bytes(4096)
    image.close()


sector_runs = st.tuples(st.integers(0, 60), st.lists(st.integers(1, 4), min_size=1, max_size=4))


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from(["write", "zero", "keep-zero", "discard"]), sector_runs), max_size=12))
def test_it_is_a_disk(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, tuple[int, list[int]]]]) -> None:
    """Against a model in memory: any writes, zeroes and discards, in buffers of any sizes."""
    driver = FileDriver()
    name = str(tmp_path_factory.mktemp("model") / "disk")
    size = 128 * 512
    driver.create(name, size)
    image = driver.open(name, False)
    model = bytearray(size)
    unknown = bytearray(size)  # 1 where discarded
    for number, (what, (first, lengths)) in enumerate(steps, 1):
        offset, total = first * 512, sum(lengths) * 512
        if what == "write":
            data = bytes([number % 255 + 1]) * total
            views, at = [], 0
            for length in lengths:
                views.append(memoryview(bytearray(data[at : at + length * 512])))
                at += length * 512
            image.writev(offset, views)
            model[offset : offset + total] = data
        elif what == "discard":
            image.discard(offset, total)
        else:
            image.write_zeroes(offset, total, may_unmap=what == "zero")
            model[offset : offset + total] = bytes(total)
        unknown[offset : offset + total] = (b"\1" if what == "discard" else b"\0") * total
    back = bytearray(size)
    image.readv(0, [memoryview(back)[: size // 2], memoryview(back)[size // 2 :]])
    image.close()
    assert all(u or a == b for u, a, b in zip(unknown, model, back, strict=True))


def test_more_buffers_than_a_call_takes(driver: FileDriver, path: str) -> None:
    image = driver.open(path, False)
    data = os.urandom(3000 * 512)
    pieces = [memoryview(bytearray(data[at : at + 512])) for at in range(0, len(data), 512)]
    image.writev(512, pieces)
    back = bytearray(len(data))
    image.readv(512, [memoryview(back)[at : at + 512] for at in range(0, len(data), 512)])
    assert back == data
    image.close()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 8)), min_size=1, max_size=40),
    first=st.integers(0, 2000),
    piece=st.integers(1, 1 << 16),
    vectored=st.booleans(),
)
def test_pieces_of_guest_ram(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int]], first: int, piece: int, vectored: bool
) -> None:
    """The kernel is given their addresses: the same as views, also when it moves only a part in a call."""
    driver = FileDriver()
    name = str(tmp_path_factory.mktemp("pieces") / "disk")
    driver.create(name, 4 * MIB)
    memory = GuestMemory(MIB)
    memory.buffer[:] = random.Random(1).randbytes(MIB)
    ranges = RamRanges(memory, np.array(rows, dtype=np.uint64) * np.uint64(512))
    image = driver.open(name, False)
    with pytest.MonkeyPatch.context() as patch:
        if not vectored:  # a libc without these calls
            patch.setattr(kernel, "_preadv2", None)
            patch.setattr(kernel, "_pwritev2", None)
        patch.setattr(image_module, "IOV_MAX", max(1, piece % 8))
        image.writev(first * 512, ranges)
        data = b"".join(ranges)
        back = bytearray(len(data))
        image.readv(first * 512, [memoryview(back)])
        assert back == data
        apart = RamRanges(
            memory, np.array([(512 * 8 * n, 512 * length) for n, (_, length) in enumerate(rows)], np.uint64)
        )
        memory.buffer[:] = bytes(MIB)
        image.readv(first * 512, apart)
        assert b"".join(apart) == data
        assert sum(map(bool, memory.buffer)) <= len(data), "nothing beside them"
    image.close()
    memory.close()


def test_a_shortened_image_is_noticed_with_guest_ram(driver: FileDriver, path: str) -> None:
    memory = GuestMemory(MIB)
    ranges = RamRanges(memory, np.array([(0, 4096), (8192, 4096)], dtype=np.uint64))
    image = driver.open(path, False)
    os.truncate(path, 4096)
    with pytest.raises(StorageError, match="ends at byte 4096"):
        image.readv(0, ranges)
    assert not image.readv_at_once(0, ranges)
    image.close()
    with pytest.raises(StorageError, match="closed"):
        image.writev(0, ranges)
    memory.close()


def test_zeroes_without_help_of_the_file_system(driver: FileDriver, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(kernel, "fallocate", refuse)
    image = driver.open(path, False)
    image.writev(0, [memoryview(b"\xff" * 3 * MIB)])
    image.write_zeroes(512, 2 * MIB)
    image.discard(0, 512)  # a hint, which may do nothing
    back = bytearray(3 * MIB)
    image.readv(0, [memoryview(back)])
    assert back == b"\xff" * 512 + bytes(2 * MIB) + b"\xff" * (MIB - 512)
    image.close()


def test_discard_gives_space_back(driver: FileDriver, path: str) -> None:
    image = driver.open(path, False)
    image.writev(0, [memoryview(b"x" * 2 * MIB)])
    image.flush()
    before = driver.probe(path).allocated
    image.discard(0, MIB)
    after = driver.probe(path).allocated
    assert before is not None
    assert after is not None
    assert after <= before - MIB
    image.close()


@pytest.mark.parametrize(("offset", "length"), [(4 * MIB, 512), (4 * MIB - 512, 1024), (-512, 512)])
def test_nothing_outside_of_the_disk(driver: FileDriver, path: str, offset: int, length: int) -> None:
    image = driver.open(path, False)
    with pytest.raises(StorageError, match="not within"):
        image.writev(offset, [memoryview(bytes(length))])
    with pytest.raises(StorageError, match="not within"):
        image.readv(offset, [memoryview(bytearray(length))])
    image.close()
    assert os.path.getsize(path) == 4 * MIB


def test_an_image_that_shrinks_gives_errors_not_a_hang(driver: FileDriver, path: str) -> None:
    image = driver.open(path, True)
    os.truncate(path, MIB)
    with pytest.raises(StorageError, match="truncated it"):
        image.readv(2 * MIB, [memoryview(bytearray(4096))])
    image.close()


def test_a_full_disk_is_an_error_of_that_write(driver: FileDriver, path: str) -> None:
    """By the process's limit on file sizes; the image is larger than it, and the write beyond it fails with EFBIG."""
    script = f"""
import resource, signal
from vmf_storage_file.driver import FileDriver
from vmf.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({MIB}, {MIB}))
image = FileDriver().open({path!r}, False)
image.writev(0, [memoryview(b"a" * 4096)])
try:
    image.writev(2 * {MIB}, [memoryview(b"a" * 4096)])
except StorageError as error:
    assert {path!r} in str(error), error
    image.writev(4096, [memoryview(b"b" * 4096)])
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "refused\n", done.stderr


@pytest.mark.parametrize("content", [b"", b"x" * 511, b"x" * 1000])
def test_what_is_no_disk_is_refused(driver: FileDriver, tmp_path: Path, content: bytes) -> None:
    odd = tmp_path / "odd"
    odd.write_bytes(content)
    with pytest.raises(StorageError, match="multiple of 512"):
        driver.probe(str(odd))


def test_missing_directories_and_wrong_kinds(driver: FileDriver, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="createmedium"):
        driver.probe(str(tmp_path / "nothing"))
    with pytest.raises(StorageError, match="neither a file nor a block device"):
        driver.probe(str(tmp_path))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StorageError, match="neither a file nor a block device"):
        driver.probe(str(tmp_path / "fifo"))
    with pytest.raises(ConfigError, match="multiple"):
        driver.create(str(tmp_path / "new"), 1000)
    (tmp_path / "there").touch()
    with pytest.raises(StorageError, match="already"):
        driver.create(str(tmp_path / "there"), 4096)


def test_uris(driver: FileDriver, path: str) -> None:
    for uri in (f"file:{path}", f"file://{path}", f"file://localhost{path}", f"file:{path}?lease={path}.other"):
        assert driver.probe(uri).size == 4 * MIB
    with pytest.raises(ConfigError, match="absolute"):
        driver.probe("file:relative.img")
    with pytest.raises(ConfigError, match="no option 'leese'"):
        driver.probe(f"file:{path}?leese=x")
    store = driver.lease_store(f"file:{path}?lease={path}.other", create=True)
    assert store is not None
    assert store.place == f"{path}.other"
    store.close()


def test_one_writer_or_many_readers(driver: FileDriver, path: str) -> None:
    first, second = driver.open(path, True), driver.open(path, True)
    with pytest.raises(ImageInUse):
        driver.open(path, False)
    first.close()
    second.close()
    writer = driver.open(path, False)
    for read_only in (True, False):
        with pytest.raises(ImageInUse):
            driver.open(path, read_only)
    writer.close()
    driver.open(path, False).close()


def test_two_names_of_one_image_have_one_lease(driver: FileDriver, path: str, tmp_path: Path) -> None:
    link = tmp_path / "link.img"
    link.symlink_to(path)
    first, second = driver.lease_store(path, create=True), driver.lease_store(str(link), create=True)
    assert first is not None
    assert second is not None
    assert first.lock()
    assert not second.lock()
    assert second.locked_elsewhere()
    first.close()
    assert second.lock()
    second.close()


def test_a_deleted_lease_is_noticed(driver: FileDriver, path: str) -> None:
    store = driver.lease_store(path, create=True)
    assert store is not None
    assert store.lock()
    assert store.still_locked()
    os.unlink(store.place)
    assert not store.still_locked()
    store.close()


def test_marks(driver: FileDriver, path: str, tmp_path: Path) -> None:
    """A mark is seen on the same image by any name, and not on a copy of it."""
    link = tmp_path / "hard.img"
    os.link(path, link)
    copy = tmp_path / "copy.img"
    driver.copy(path, str(copy))
    mark = driver.mark(path)
    assert driver.recognises(str(link), mark.token)
    assert not driver.recognises(str(copy), mark.token)
    for odd in ("lock:-1", "lock:x", f"lock:{1 << 41}", "content:00", ""):
        assert not driver.recognises(path, odd)
    mark.close()
    assert not driver.recognises(str(link), mark.token)


def test_copies_are_sparse_and_equal(driver: FileDriver, path: str, tmp_path: Path) -> None:
    image = driver.open(path, False)
    image.writev(MIB, [memoryview(b"hello" * 512 * 8)])
    image.close()
    told: list[tuple[int, int]] = []
    driver.copy(path, str(tmp_path / "copy"), lambda done, total: told.append((done, total)))
    assert (tmp_path / "copy").read_bytes() == Path(path).read_bytes()
    assert os.stat(tmp_path / "copy").st_blocks * 512 < MIB
    assert not told or told[-1] == (4 * MIB, 4 * MIB)


def test_locks_go_with_a_killed_process(driver: FileDriver, path: str) -> None:
    script = f"""
import time
from vmf_storage_file.driver import FileDriver
image = FileDriver().open({path!r}, False)
print("open", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        with pytest.raises(ImageInUse):
            driver.open(path, False)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        driver.open(path, False).close()


def test_no_descriptors_are_left(driver: FileDriver, path: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > before
    for _ in range(5):
        driver.open(path, False).close()
        driver.mark(path).close()
        driver.probe(path)
        store = driver.lease_store(path, create=True)
        assert store is not None
        store.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_cannot_be_read_is_the_storages_fault(driver: FileDriver) -> None:
    with pytest.raises(StorageError, match=r"/proc/self/mem cannot be read: "):
        driver.probe("/proc/self/mem")
