"""For every test of the workspace: what must not depend on who runs them, or on how busy the host is."""

from __future__ import annotations

import signal
import threading

from hypothesis import HealthCheck, settings

settings.register_profile("vmf", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vmf")


def pytest_configure() -> None:
    """Signals that whoever started pytest has ignored (nohup, a script's `&`) reach the machines that tests start.

    A handler of ours, unlike an ignored signal, is not inherited by the programs that are executed.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
