"""What the benchmarks share: tables, and reading what processes used."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import platform
import select
import socket
import statistics
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path

_IN_MODIFY = 2  # <sys/inotify.h>


def machine_line() -> str:
    """Which computer this ran on, one line."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return f"{model}, {os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print Markdown, so that a result can be pasted into the documentation."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for number, row in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(flush=True)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def resident_mib(pid: int) -> float:
    """What of a process is in memory, in MiB (proc(5))."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def guest_ram_mib(pid: int, size_mib: int) -> float:
    """What of its guest RAM, a mapping of that size, is in memory."""
    found, inside = 0.0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in line.split(" ", 1)[0]:  # the header of a mapping
            first, _, last = line.split(" ", 1)[0].partition("-")
            inside = int(last, 16) - int(first, 16) >= size_mib << 20
        elif inside and name == "Rss":
            found += int(value.split()[0]) / 1024
    return found


def warm_host_memory(mib: int) -> None:
    """Touch that much memory and free it again, in a process that ends.

    On a virtual machine whose host takes free memory back, the first touch of a page costs several times its transfer
    (measured: 2 GiB in 8.3 s against 2.6 s). Done right before every run of either side, it takes that out of the
    comparison. In huge pages, as both sides' guest RAM.
    """
    child = os.fork()
    if child == 0:
        memory = mmap.mmap(-1, mib << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(mmap.MADV_POPULATE_WRITE if hasattr(mmap, "MADV_POPULATE_WRITE") else 23)
        os._exit(0)
    os.waitpid(child, 0)


class MemoryWatch:
    """Samples what a machine's process holds on top of its guest RAM, until stopped."""

    def __init__(self, pid: int, guest_mib: int) -> None:
        self._pid = pid
        self._guest_mib = guest_mib
        self._stop = threading.Event()
        self._ram = guest_ram_mib(pid, guest_mib)
        self._peak = 0.0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            try:
                self._peak = max(self._peak, resident_mib(self._pid))
            except (FileNotFoundError, ProcessLookupError):
                return

    def stop(self) -> float:
        """The most that it held, in MiB."""
        self._stop.set()
        self._thread.join()
        try:
            self._ram = max(self._ram, guest_ram_mib(self._pid, self._guest_mib))
        except (FileNotFoundError, ProcessLookupError):
            pass  # a source that has left
        return self._peak - self._ram


class StillWatch:
    """How long a guest stood still on its way between two hosts, seen from outside, the same way for any program.

    The guest writes a byte every millisecond. A process of its own is told by the kernel (inotify) when either host's
    serial log grows; what counts is from the last growth of the source's to the first of the target's.
    """

    def __init__(self, source: Path, target: Path) -> None:
        """Both files are there."""
        self._ours, theirs = socket.socketpair()
        self._child = os.fork()
        if self._child == 0:
            try:
                self._ours.close()
                theirs.sendall(struct.pack("d", self._look(source, target, theirs)))
            finally:
                os._exit(0)
        theirs.close()

    def _look(self, source: Path, target: Path, control: socket.socket) -> float:
        libc = ctypes.CDLL(None, use_errno=True)
        queue = libc.inotify_init1(0)
        watches = [libc.inotify_add_watch(queue, os.fsencode(path), _IN_MODIFY) for path in (source, target)]
        if min(queue, *watches) < 0:
            return math.nan
        last = time.perf_counter()
        poll = select.poll()
        for descriptor in (queue, control.fileno()):
            poll.register(descriptor, select.POLLIN)
        while True:
            ready = [descriptor for descriptor, _ in poll.poll()]
            now = time.perf_counter()
            if queue not in ready:
                return math.nan
            seen = {event[0] for event in struct.iter_unpack("iIII", os.read(queue, 4096))}
            if watches[1] in seen:
                return now - last
            last = now

    def wait(self, timeout: float = 10) -> float:
        """Seconds; not a number when the target's log did not grow within `timeout`."""
        self._ours.settimeout(timeout)
        try:
            (answer,) = struct.unpack("d", self._ours.recv(8))
        except TimeoutError:
            answer = math.nan
        self._ours.close()
        os.waitpid(self._child, 0)
        return float(answer)


def loopback_ceiling(total_bytes: int = 2 << 30, piece: int = 1 << 20, *, pairs: int = 1, fresh: bool = False) -> float:
    """Bytes per second of plain Python socket pairs over loopback TCP between processes: the ceiling.

    Nothing is allocated and the same piece is sent and received over and over, so it is a generous one. With `fresh`
    what is sent lies all over a memory of that size, and what receives it is memory that was never touched, in huge
    pages, as RAM at the source and the target of a teleport.
    """
    share = total_bytes // pairs
    listener = socket.create_server(("127.0.0.1", 0))
    children = []
    for _ in range(pairs):
        child = os.fork()
        if child == 0:
            data = _huge(share if fresh else piece)
            data[:] = os.urandom(piece) * (len(data) // piece)
            peer = socket.create_connection(listener.getsockname())
            peer.recv(1)
            for start in range(0, share, piece):
                peer.sendall(data[start % len(data) :][:piece])
            peer.recv(1)
            os._exit(0)
        children.append(child)
    channels = [listener.accept()[0] for _ in range(pairs)]
    if fresh:
        warm_host_memory(total_bytes >> 20)

    def drain(channel: socket.socket) -> None:
        buffer = _huge(share if fresh else piece)
        channel.sendall(b"x")
        done = 0
        while done < share:
            at = done % len(buffer)
            done += channel.recv_into(buffer[at : at + piece])

    started = time.perf_counter()
    threads = [threading.Thread(target=drain, args=(channel,)) for channel in channels]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - started
    for channel in channels:
        channel.close()
    listener.close()
    for child in children:
        os.waitpid(child, 0)
    return total_bytes / elapsed


def _huge(size: int) -> memoryview:
    """Memory that was never touched, in huge pages where it is large."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)
