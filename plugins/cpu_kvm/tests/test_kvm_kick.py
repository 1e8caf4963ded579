"""Kicks: never lost, prompt, from any thread; deadlines beside them."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import pytest

from vmf.cpu.backend import ExitReason

LOOP = b"\xeb\xfe"
IN_LOOP = b"\x66\xba\x10\x05\xec\xeb\xfd"  # mov dx, 0x510; 1: in al, dx; jmp 1b


@pytest.mark.parametrize("code", [LOOP, IN_LOOP], ids=["computing", "port access"])
def test_ten_thousand_kicks_none_lost(rig: Any, code: bytes) -> None:
    """Two threads in lock-step: each kick must end one run, whenever it comes; a lost one would hang."""
    rig.load(code)
    count, latencies = 10_000 if code is LOOP else 3_000, []
    kicked_at = 0
    go, failed = threading.Semaphore(0), threading.Event()

    def vcpu_thread() -> None:
        for _ in range(count):
            go.release()
            exit_ = rig.vcpu.run(time.monotonic_ns() + 10_000_000_000)
            latencies.append(time.monotonic_ns() - kicked_at)
            if exit_.reason is not ExitReason.KICKED or latencies[-1] > 5_000_000_000:
                failed.set()
                return

    thread = threading.Thread(target=vcpu_thread)
    thread.start()
    for i in range(count):
        go.acquire()
        if i % 4 == 0:
            time.sleep(0.0001)  # let it get inside KVM_RUN; otherwise hit it on its way there
        kicked_at = time.monotonic_ns()
        rig.vcpu.kick()
    thread.join(30)
    assert not thread.is_alive()
    assert not failed.is_set()
    latencies.sort()
    print(f"kick: median {latencies[count // 2] / 1e3:.0f} us, 99 % {latencies[count * 99 // 100] / 1e3:.0f} us")


def test_kick_before_run_ends_the_next_run(rig: Any) -> None:
    rig.load(LOOP)
    rig.run(0.001)
    rig.vcpu.kick()
    started = time.monotonic()
    assert rig.run(5).reason is ExitReason.KICKED
    assert time.monotonic() - started < 1
    started = time.monotonic()
    rig.run(0.05)
    assert time.monotonic() - started >= 0.05  # and only that one


def test_kick_survives_save_and_restore(rig: Any) -> None:
    rig.load(LOOP)
    rig.vcpu.kick()
    rig.vcpu.restore(rig.vcpu.save())
    started = time.monotonic()
    assert rig.run(5).reason is ExitReason.KICKED
    assert time.monotonic() - started < 1


def test_kick_of_a_halted_vcpu(rig: Any) -> None:
    rig.load(b"\xf4")
    rig.run_to_halt()
    rig.vcpu.kick()
    assert rig.run(1).reason is ExitReason.KICKED
    assert rig.run(1).reason is ExitReason.HALTED


def test_vcpu_may_change_its_thread(rig: Any) -> None:
    rig.load(LOOP)
    for _ in range(30):
        thread = threading.Thread(target=lambda: rig.run(0.01))
        thread.start()
        thread.join()
    assert rig.run(0.01).reason is ExitReason.KICKED


def test_stray_signal_is_harmless(rig: Any) -> None:
    """The kick signal sent by somebody else ends nothing and kills nobody."""
    rig.load(LOOP)
    number = rig.vcpu._kicker.number
    stop = threading.Event()

    def shoot() -> None:
        while not stop.wait(0.001):
            signal.pthread_kill(main, number)

    main = threading.main_thread().ident
    thread = threading.Thread(target=shoot)
    thread.start()
    try:
        started = time.monotonic()
        rig.run(0.2)
        assert time.monotonic() - started >= 0.2
    finally:
        stop.set()
        thread.join()


def test_close_while_kicked(make_rig: Any) -> None:
    rig = make_rig()
    rig.load(LOOP)
    stop = threading.Event()

    def kick() -> None:
        while not stop.is_set():
            rig.vcpu.kick()

    thread = threading.Thread(target=kick)
    thread.start()
    try:
        for _ in range(20):
            rig.run(1)
        rig.vcpu.close()
    finally:
        stop.set()
        thread.join()
    rig.vcpu.kick()
    rig.vcpu.close()
