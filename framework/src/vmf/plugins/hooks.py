"""The many-to-one hooks: observers, checks and policies, each of which fails for itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from vmf.errors import PluginError, VmfError
from vmf.plugins.containment import interrupted
from vmf.plugins.seams import listed, one_line

if TYPE_CHECKING:
    from vmf.cpuid.table import CpuidTable
    from vmf.plugins.bridge import LoadedPlugin
    from vmf.teleport.check import Blocker

CHECK_SECONDS = 60.0
"""Longest time for all preflight checks of one side together; shorter than a source waits for the target's check."""
SLOW_SECONDS = 1.0
"""After which a check that is waited for is named to those who watch the teleport."""
_POLL_S = 0.05


class Hooks:
    """The many-to-one hooks. Callable from any thread; calls of one observer are not serialised.

    Observers (state changes, teleport phases) that raise are reported by name and never called again. Policies and
    checks that raise are not skipped: they were installed to forbid something, so their failure forbids it. A check
    that does not answer within `CHECK_SECONDS` forbids it, too; it is left to end on a thread of its own.
    """

    def __init__(self, plugins: Iterable[LoadedPlugin], report: Callable[[PluginError], None]) -> None:
        self._plugins = tuple(plugins)
        self._report = report

    def machine_state_changed(self, name: str, old: str, new: str) -> None:
        """Tell the observers; never raises."""
        self._observe("vmf_machine_state_changed", name=name, old=old, new=new)

    def teleport_phase(self, name: str, role: str, phase: str) -> None:
        """Tell the observers; never raises."""
        self._observe("vmf_teleport_phase", name=name, role=role, phase=phase)

    def preflight_check(
        self,
        name: str,
        role: str,
        description: Mapping[str, object],
        look_around: Callable[[], None] | None = None,
        slow: Callable[[str], None] | None = None,
    ) -> list[Blocker]:
        """Everything that speaks against a teleport now; a check that fails is itself a blocker.

        Args:
            look_around: called several times a second meanwhile; what it raises ends the wait.
            slow: called once for each plugin that has not answered after a second, with the plugin in words.
        """
        from vmf.teleport.check import Blocker

        blockers: list[Blocker] = []
        end = time.monotonic() + CHECK_SECONDS
        for plugin in self._implementing("vmf_preflight_check"):
            try:
                arguments = {"name": name, "role": role, "description": description}
                for results in _within(plugin, "vmf_preflight_check", arguments, end, look_around, slow):
                    blockers += [_blocker(plugin, each) for each in _blockers(plugin, results)]
            except PluginError as error:
                reason = f"failed ({error.message})"
                values = (reason, "-") if role == "source" else ("-", reason)
                blockers.append(Blocker(f"preflight check '{plugin.entry.name}'", *values, error.remedy))
        return blockers

    def cpuid_policy(self, name: str, contract: CpuidTable) -> list[CpuidTable]:
        """The restricted contracts that the policies answered; the caller intersects them. Raises PluginError."""
        from vmf.cpuid.table import CpuidTable

        answers: list[CpuidTable] = []
        for plugin in self._implementing("vmf_cpuid_policy"):
            for answer in plugin.call("vmf_cpuid_policy", name=name, contract=contract):
                if not isinstance(answer, CpuidTable):
                    raise plugin.culprit.wrong("its hook vmf_cpuid_policy", answer, "a CpuidTable or None")
                answers.append(answer)
        return answers

    def call(self, hook: str, **arguments: Any) -> list[Any]:
        """Call a hook by its specified name, under the same rules; the answers, one per plugin that gave one."""
        if hook == "vmf_preflight_check":
            return [self.preflight_check(**arguments)]
        if hook == "vmf_cpuid_policy":
            return list(self.cpuid_policy(**arguments))
        self._observe(hook, **arguments)
        return []

    def _implementing(self, hook: str) -> list[LoadedPlugin]:
        return [plugin for plugin in self._plugins if hook in plugin.hooks]

    def _observe(self, hook: str, **arguments: Any) -> None:
        for plugin in self._implementing(hook):
            try:
                plugin.call(hook, **arguments)
            except BaseException as error:
                if interrupted(error):
                    raise
                self._plugins = tuple(each for each in self._plugins if each is not plugin)
                fault = plugin.culprit.fault(f"its hook {hook}", error)
                self._report(PluginError(f"{fault.message} It is not called any more.", fault.remedy))


def _within(
    plugin: LoadedPlugin,
    hook: str,
    arguments: Mapping[str, Any],
    end: float,
    look_around: Callable[[], None] | None,
    slow: Callable[[str], None] | None,
) -> Iterable[Any]:
    """What the hook returns, called on a thread of its own. Raises PluginError, also when it takes too long."""
    answers: list[Any] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            answers.extend(plugin.call(hook, **arguments))
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
            errors.append(error)

    thread = threading.Thread(target=call, name=f"vmf-{hook}", daemon=True)
    thread.start()
    slow_at = time.monotonic() + SLOW_SECONDS
    thread.join(_POLL_S)
    while thread.is_alive():
        if look_around is not None:
            look_around()
        if slow is not None and time.monotonic() > slow_at:
            slow(str(plugin.entry))
            slow = None
        if time.monotonic() > end:
            raise PluginError(
                f"The {plugin.entry} has not answered its hook {hook} within the {CHECK_SECONDS:g} s that all checks"
                " together may take.",
                f"Report this to the authors of {plugin.culprit.authors}, or do without it.",
            )
        thread.join(_POLL_S)
    if not errors:
        return answers
    error = errors[0]
    if isinstance(error, PluginError):
        raise error
    message = error.message if isinstance(error, VmfError) else str(error)
    raise PluginError(
        f"The {plugin.entry} refuses: {message}", error.remedy if isinstance(error, VmfError) else ""
    ) from error


def _blockers(plugin: LoadedPlugin, results: Any) -> Iterable[Any]:
    try:
        return listed(results, "a list of Blocker objects")
    except ValueError as error:
        raise plugin.culprit.wrong("its hook vmf_preflight_check", results, str(error)) from None


def _blocker(plugin: LoadedPlugin, result: Any) -> Blocker:
    from vmf.teleport.check import Blocker

    if not isinstance(result, Blocker):
        raise plugin.culprit.wrong("its hook vmf_preflight_check", result, "a list of Blocker objects only")
    try:
        return Blocker(*(one_line(text) for text in (result.field, result.source, result.target, result.remedy)))
    except ValueError:
        raise plugin.culprit.wrong("its hook vmf_preflight_check", result, "a Blocker of four texts") from None
