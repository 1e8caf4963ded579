"""For every test of the workspace: what must not depend on who runs them, or on how busy the host is."""

from __future__ import annotations

import os
import re
import signal
import threading
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("vmf", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vmf")

ABSENT = Path(__file__).parent / "tests" / "absent.toml"


def pytest_configure(config: pytest.Config) -> None:
    """Signals that whoever started pytest has ignored (nohup, a script's `&`) reach the machines that tests start.

    A handler of ours, unlike an ignored signal, is not inherited by the programs that are executed.
    """
    if os.environ.get("CI") == "true" and not hasattr(config, "workerinput"):
        config.pluginmanager.register(NoSilentSkips(), "no-silent-skips")
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    if signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN:
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)


class NoSilentSkips:
    """On CI a test that skips fails the run, unless tests/absent.toml says that what it needs may be absent."""

    def __init__(self) -> None:
        self._allowed = [re.compile(each["skip"]) for each in tomllib.loads(ABSENT.read_text()).get("absent", ())]
        self.unexpected: list[str] = []

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not any(each.fullmatch(reason) for each in self._allowed):
            self.unexpected.append(f"{report.nodeid}: {reason}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unexpected and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.unexpected:
            terminalreporter.section("skipped on CI, and not in tests/absent.toml", red=True)
            for line in self.unexpected:
                terminalreporter.line(line)
            terminalreporter.line("Let .ci/run install what they need, or allow it in tests/absent.toml with a reason.")
