"""Loopback speed of the TCP channel beside a plain Python socket pair, in the same run.

Two processes each time. The plain pair does `sendall` of 1-MiB slices and `recv_into` 1-MiB slices of one mapping,
which is the best a simple program gets. The channel sends the same amount of guest RAM by `send_ranges` and
`recv_ranges`, first as long runs, then as scattered single pages (every other page), in batches of 4 MiB.

    python benchmarks/bench_channel.py [--mib 512] [--repeat 5]
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np

from vmf.memory import pages
from vmf.memory.guest import MIB, GuestMemory
from vmf.transport.base import Address
from vmf_transport_tcp.channel import TcpChannel
from vmf_transport_tcp.transport import TcpTransport

BATCH = 4 * MIB
PLAIN_SLICE = 1 * MIB
KINDS = ("plain", "runs", "scattered")


def touched_memory(mib: int) -> GuestMemory:
    memory = GuestMemory(mib * MIB)
    np.frombuffer(memory.buffer, dtype=np.uint64)[:] = 0x5A5A_0000_1234_FFFF
    return memory


def page_set(kind: str, memory: GuestMemory) -> pages.PageRuns:
    if kind == "scattered":
        mask = np.zeros(memory.pages, dtype=bool)
        mask[::2] = True
        return pages.from_mask(mask)
    return pages.full(memory.pages)


def passes(kind: str) -> int:
    """How often the set is sent, so that every kind moves the same number of bytes."""
    return 2 if kind == "scattered" else 1


def plain_send(raw: socket.socket, memory: GuestMemory) -> None:
    for at in range(0, memory.size, PLAIN_SLICE):
        raw.sendall(memory.buffer[at : at + PLAIN_SLICE])


def plain_receive(raw: socket.socket, memory: GuestMemory) -> None:
    for at in range(0, memory.size, PLAIN_SLICE):
        view = memory.buffer[at : at + PLAIN_SLICE]
        done = 0
        while done < len(view):
            done += raw.recv_into(view[done:])


def channel_run(move: Callable[[memoryview, pages.ByteRanges], None], kind: str, memory: GuestMemory) -> None:
    for _ in range(passes(kind)):
        for batch in pages.batches(page_set(kind, memory), BATCH):
            move(memory.buffer, pages.to_byte_ranges(batch))


def receiver(pipe: Connection, mib: int) -> None:
    memory = touched_memory(mib)
    listener = TcpTransport().listen(Address("tcp", "127.0.0.1", 0))
    pipe.send(listener.address.port)
    while True:
        kind = pipe.recv()
        if kind is None:
            return
        channel = listener.accept(30)
        assert isinstance(channel, TcpChannel)
        if kind == "plain":
            plain_receive(channel._socket, memory)
        else:
            channel_run(channel.recv_ranges, kind, memory)
        channel.send(b"k")
        channel.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=receiver, args=(theirs, options.mib), daemon=True)
    process.start()
    port = ours.recv()
    memory = touched_memory(options.mib)
    best = dict.fromkeys(KINDS, 0.0)
    for _ in range(options.repeat):
        for kind in KINDS:
            ours.send(kind)
            if kind == "plain":
                with socket.create_connection(("127.0.0.1", port)) as raw:
                    began = time.perf_counter()
                    plain_send(raw, memory)
                    raw.recv(1)
                    elapsed = time.perf_counter() - began
            else:
                channel = TcpTransport().connect(Address("tcp", "127.0.0.1", port), 10)
                began = time.perf_counter()
                channel_run(channel.send_ranges, kind, memory)
                channel.recv_into(memoryview(bytearray(1)))
                elapsed = time.perf_counter() - began
                channel.close()
            best[kind] = max(best[kind], options.mib * MIB / elapsed / 1e9)
    ours.send(None)
    process.join(10)
    print(f"loopback, {options.mib} MiB, best of {options.repeat}:")
    texts = ("plain Python socket pair", "channel, long runs", "channel, scattered pages")
    for kind, text in zip(KINDS, texts, strict=True):
        print(f"  {text:26} {best[kind]:5.2f} GB/s   {best[kind] / best['plain']:.2f} of plain")


if __name__ == "__main__":
    main()
