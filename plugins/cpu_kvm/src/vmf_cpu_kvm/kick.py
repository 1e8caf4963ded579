"""Getting a vCPU thread out of KVM_RUN: on request from any thread, and at a deadline.

Theory of operation
    KVM_RUN returns EINTR when `kvm_run.immediate_exit` is set at entry, or when a signal is pending that the thread
    does not block *inside* KVM_RUN. Both are needed. `immediate_exit` catches a kick that comes while the thread is
    outside KVM_RUN; only a signal reaches it inside.

    The signal is blocked in the vCPU thread all the time except inside KVM_RUN (KVM_SET_SIGNAL_MASK switches the
    mask atomically). A signal that arrives a moment before KVM_RUN therefore stays pending and ends it at once: there
    is no window in which a deadline is lost, and no signal handler ever runs (one that does nothing is installed all
    the same, so that a stray signal cannot kill the process). What is pending is taken away with sigtimedwait.

    Deadlines: a POSIX timer on CLOCK_MONOTONIC that sends the same signal to the vCPU thread (SIGEV_THREAD_ID). It is
    left armed across runs with the same deadline; a stale signal costs one empty KVM_RUN.

    The signal is the highest real-time signal that nobody uses when the first vCPU is made.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import threading
from collections.abc import Callable
from typing import Final

from vmf.errors import BackendUnavailable, MachineError
from vmf_cpu_kvm import abi

_SYS_TIMER_CREATE: Final = 222  # x86-64
_SYS_TIMER_SETTIME: Final = 223
_SYS_TIMER_DELETE: Final = 226
_SYS_TGKILL: Final = 234
_CLOCK_MONOTONIC: Final = 1
_TIMER_ABSTIME: Final = 1
_SIGEV_THREAD_ID: Final = 4
_SIGEVENT: Final = struct.Struct("<QiiI44x")
"""sigev_value, sigev_signo, sigev_notify, sigev_notify_thread_id."""
_ITIMERSPEC: Final = struct.Struct("<4q")
"""it_interval, it_value: seconds and nanoseconds each."""
_SIGACTION_SIZE: Final = 152
"""At least sizeof(struct sigaction) of any C library on x86-64; the handler is its first field."""
_KERNEL_SIGSET_SIZE: Final = 8

_lock = threading.Lock()
_signal_number = 0


def _handler_of(number: int) -> int:
    action = abi.buffer(_SIGACTION_SIZE)
    if abi.sigaction(number, None, action):
        return -1
    handler: int = struct.unpack_from("<Q", action)[0]
    return handler


def claim_signal() -> int:
    """The number of the signal that kicks, with a handler that does nothing. Raises BackendUnavailable."""
    global _signal_number
    with _lock:
        if _signal_number and _handler_of(_signal_number) == abi.NO_OP_HANDLER:
            return _signal_number
        for number in range(signal.SIGRTMAX - 1, signal.SIGRTMIN, -1):
            if _handler_of(number) == 0:
                action = abi.buffer(_SIGACTION_SIZE)
                struct.pack_into("<Q", action, 0, abi.NO_OP_HANDLER)
                if abi.sigaction(number, action, None) == 0:
                    _signal_number = number
                    return number
    raise BackendUnavailable(
        "every real-time signal of this process is taken, and the KVM backend needs one.",
        "Run the machine in a process of its own (`vmf startvm`).",
    )


class Kicker:
    """Belongs to one vCPU. `bind`, `arm`, `drain` and `close` on the vCPU thread; `signal` on any."""

    def __init__(self, set_signal_mask: Callable[[abi.Buffer], None]) -> None:
        """`set_signal_mask` performs KVM_SET_SIGNAL_MASK on the vCPU."""
        self._set_signal_mask = set_signal_mask
        self.number = claim_signal()
        self._only = {self.number}
        self.thread = 0
        """threading.get_native_id() of the thread that `bind` was called on; `get_ident` is used again too soon."""
        self._pid = 0
        self._timer = -1
        self._armed: int | None = None
        self._spec = abi.buffer(_ITIMERSPEC.size)
        self._spec_at = ctypes.addressof(self._spec)

    def bind(self) -> None:
        """Make the calling thread the vCPU thread."""
        self.close()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._only)
        inside = sum(1 << (number - 1) for number in before if number != self.number)
        mask = abi.buffer(4 + _KERNEL_SIGSET_SIZE)
        struct.pack_into("<IQ", mask, 0, _KERNEL_SIGSET_SIZE, inside)
        self._set_signal_mask(mask)
        self._pid, thread = os.getpid(), threading.get_native_id()
        event, timer = abi.buffer(_SIGEVENT.size), ctypes.c_int(-1)
        _SIGEVENT.pack_into(event, 0, 0, self.number, _SIGEV_THREAD_ID, thread)
        if abi.syscall(_SYS_TIMER_CREATE, _CLOCK_MONOTONIC, ctypes.addressof(event), ctypes.addressof(timer), 0):
            code = ctypes.get_errno()
            raise MachineError(
                f"cannot make the vCPU's timer: {os.strerror(code)}.",
                "Raise the limit on pending signals (ulimit -i)." if code == errno.EAGAIN else "",
            )
        self._timer, self._armed = timer.value, None
        self.thread = thread

    def arm(self, deadline_ns: int | None) -> None:
        """Send the signal at that `time.monotonic_ns()`; None: never. Replaces the deadline before."""
        if deadline_ns == self._armed:
            return
        value = 0 if deadline_ns is None else max(deadline_ns, 1)
        _ITIMERSPEC.pack_into(self._spec, 0, 0, 0, *divmod(value, 1_000_000_000))
        if abi.syscall(_SYS_TIMER_SETTIME, self._timer, _TIMER_ABSTIME, self._spec_at, 0):
            raise MachineError(f"cannot set the vCPU's timer: {os.strerror(ctypes.get_errno())}.")
        self._armed = deadline_ns

    def fired(self) -> None:
        """The deadline has passed: the timer is not armed any more."""
        self._armed = None

    def drain(self) -> None:
        """Take away the signals that are pending."""
        while signal.sigtimedwait(self._only, 0) is not None:
            pass

    def signal(self) -> None:
        """Send the signal to the vCPU thread."""
        abi.syscall(_SYS_TGKILL, self._pid, self.thread, self.number, 0)

    def close(self) -> None:
        """Free the timer; idempotent."""
        if self._timer >= 0:
            abi.syscall(_SYS_TIMER_DELETE, self._timer, 0, 0, 0)
            self._timer = -1
            self._armed = None
