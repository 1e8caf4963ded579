"""The one bridge between discovery and hooks: what stevedore loaded is registered with pluggy and checked here.

Theory of operation. Each plugin gets a PluginManager of its own that knows all of vmf's hook specifications. That
keeps plugins apart by construction: one that does not validate spoils no shared registry, one module may serve two
names, and "call this plugin's hook and no other's" needs no filtering. A plugin passes when

- its `vmf_api_version` equals `API_VERSION`;
- pluggy accepts its implementations' signatures, and every hook name is one that vmf specifies (`check_pending`);
- its hooks belong to its entry-point group: a driver has the hook of its kind and no other, an observer at least one
  of the observers' (a misplaced hook would otherwise never be called, in silence);
- what the hook returns is of the type the specification says, and answers to the name it was found by.

Plugins are set aside one by one: `problems` lists the errors, everything else goes on. Hot paths never come here;
they hold the driver object that was returned once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import pluggy

from vmf.errors import BackendUnavailable, PluginError, VmfError
from vmf.plugins import discovery, hookspecs, seams
from vmf.plugins.containment import Culprit, contain, explain, interrupted, log, remember
from vmf.plugins.discovery import PluginEntry
from vmf.plugins.hooks import Hooks
from vmf.plugins.hookspecs import API_VERSION, GROUPS, PROJECT

if TYPE_CHECKING:
    from vmf.cpu.backend import CpuBackend
    from vmf.device.base import Device, DeviceEnvironment
    from vmf.storage.base import StorageDriver
    from vmf.transport.base import Transport

DRIVER_HOOKS = {
    "cpu": "vmf_cpu_backend",
    "device": "vmf_create_device",
    "storage": "vmf_storage_driver",
    "transport": "vmf_transport",
}
"""Plugin kind to the one hook that its plugins implement; every other hook belongs to kind "hooks"."""


@attrs.frozen
class BackendRefusal:
    """Why "auto" passed a CPU backend over.

    Attributes:
        backend: its name.
        usable: it works on this host, but does not suit the machine.
        reason, remedy: one line each; the remedy may be "".
    """

    backend: str
    usable: bool
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        verdict = "does not suit this machine" if self.usable else "cannot be used here"
        return f"{self.backend} {verdict}: {self.reason.rstrip('.')}"


class LoadedPlugin:
    """An imported plugin that passed all checks that need no call of it."""

    def __init__(self, entry: PluginEntry, plugin: Any) -> None:
        self.entry = entry
        self.culprit = Culprit.of(entry)
        self._manager = _validated(entry, plugin)
        remember(entry, self.culprit)
        self.hooks = frozenset(caller.name for caller in self._manager.get_hookcallers(plugin) or ())

    def call(self, hook: str, **arguments: Any) -> Any:
        """Call the plugin's own implementation; whatever it raises becomes a PluginError naming it."""
        try:
            return getattr(self._manager.hook, hook)(**arguments)
        except VmfError:
            raise  # it was written for people already: which setting is wrong, what is missing here
        except BaseException as error:
            if interrupted(error):
                raise
            raise self.culprit.fault(f"its hook {hook}", error) from error


explain(LoadedPlugin.call.__code__, lambda values: (values["self"].culprit, f"its hook {values['hook']}"))


def _validated(entry: PluginEntry, plugin: Any) -> pluggy.PluginManager:
    version = getattr(plugin, "vmf_api_version", None)
    if version != API_VERSION:
        said = "does not say for which version (vmf_api_version)" if version is None else f"is for version {version!r}"
        raise PluginError(
            f"The {entry} {said} of vmf's plugin interface, and this vmf has version {API_VERSION}.",
            f"Install a version of {entry.distribution or 'it'} made for plugin interface {API_VERSION}.",
        )
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    authors = f"Report this to the authors of {entry.distribution or entry.target}, or uninstall it."
    try:
        manager.register(plugin, name=f"{GROUPS[entry.kind]}:{entry.name}")
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(
            f"The {entry} does not fit vmf's hook specifications: {' '.join(str(error).split())}.", authors
        ) from error
    present = {caller.name for caller in manager.get_hookcallers(plugin) or ()}
    observers = {name for name in dir(hookspecs) if name.startswith("vmf_")} - set(DRIVER_HOOKS.values())
    required = DRIVER_HOOKS.get(entry.kind)
    allowed = observers if required is None else {required}
    if required is None and not present & observers:
        raise PluginError(f"The {entry} implements none of the hooks {', '.join(sorted(observers))}.", authors)
    if required is not None and required not in present:
        raise PluginError(f"The {entry} does not implement the hook {required}.", authors)
    if misplaced := present - allowed:
        kinds = {hook: kind for kind, hook in DRIVER_HOOKS.items()}
        groups = sorted({GROUPS[kinds.get(hook, "hooks")] for hook in misplaced})
        raise PluginError(
            f"The {entry} implements {', '.join(sorted(misplaced))}, which is never called in the group"
            f" {GROUPS[entry.kind]}; it belongs to an entry point of its own in {', '.join(groups)}.",
            authors,
        )
    return manager


class PluginRegistry:
    """Plugins by kind and name, each imported when it is first asked for and once only. Thread-safe.

    Attributes:
        problems: what was set aside since this registry was made, as errors that name the plugin.
        on_problem: called with each of them as it happens (default: log a warning).
    """

    def __init__(self, on_problem: Callable[[PluginError], None] | None = None) -> None:
        self.problems: list[PluginError] = []
        self._on_problem = on_problem
        self._lock = threading.RLock()
        self._loaded: dict[tuple[str, str], LoadedPlugin] = {}
        self._drivers: dict[tuple[str, str], Any] = {}
        self._hooks: Hooks | None = None

    # -- drivers, one by name ------------------------------------------------------------------------------------

    def cpu_backend(self, name: str) -> CpuBackend:
        """The CPU backend of that name, whether or not it can work here. Raises PluginError."""
        from vmf.cpu.backend import CpuBackend

        backend: CpuBackend = self._driver("cpu", name, CpuBackend, "name")
        return backend

    def cpu_backends(self) -> list[CpuBackend]:
        """Every installed CPU backend that loads, the most preferred first; the others land in `problems`."""
        backends: list[CpuBackend] = []
        for name in sorted({entry.name for entry in discovery.installed("cpu")}):
            try:
                backends.append(self.cpu_backend(name))
            except PluginError as error:
                self.report(error)
        return sorted(backends, key=lambda backend: (-backend.preference, backend.name))

    def choose_cpu_backend(self, name: str, accept: Callable[[CpuBackend], str] | None = None) -> CpuBackend:
        """The backend for a machine's setting: a name, or "auto" for the most preferred one that works here.

        Args:
            accept: for "auto", gives the reason why a usable backend does not suit this machine, or "".

        Raises BackendUnavailable naming every candidate's reason and remedy, or PluginError.
        """
        if name != "auto":
            backend = self.cpu_backend(name)
            here = backend.availability()
            if not here.usable:
                raise BackendUnavailable(
                    f"The CPU backend '{name}' cannot work here: {here.reason.rstrip('.')}.", here.remedy
                )
            return backend
        chosen, refusals = self.rank_cpu_backends(accept)
        if chosen is not None:
            return chosen
        raise self.no_cpu_backend(refusals)

    def no_cpu_backend(self, refusals: Sequence[BackendRefusal]) -> BackendUnavailable:
        """The error for "auto" when nobody was left."""
        reasons = [f"{item.backend}: {item.reason.rstrip('.')}. {item.remedy}".strip() for item in refusals]
        reasons += [str(problem) for problem in self.problems if " cpu plugin " in f" {problem.message}"]
        if any(item.usable for item in refusals):
            return BackendUnavailable("No CPU backend here suits this machine. " + " ".join(reasons))
        return BackendUnavailable(
            "No CPU backend can work here. " + " ".join(reasons), "Install one: pip install vmf-cpu-unicorn."
        )

    def rank_cpu_backends(
        self, accept: Callable[[CpuBackend], str] | None = None
    ) -> tuple[CpuBackend | None, list[BackendRefusal]]:
        """The most preferred backend that works here and that `accept` (see above) has nothing against, or None; and
        why each of those before it was passed over."""
        refusals: list[BackendRefusal] = []
        for backend in self.cpu_backends():
            try:
                here = backend.availability()
            except PluginError as error:
                self.report(error)
                refusals.append(BackendRefusal(backend.name, False, error.message, error.remedy))
                continue
            reason = (accept(backend) if accept is not None else "") if here.usable else here.reason
            if not reason:
                return backend, refusals
            refusals.append(BackendRefusal(backend.name, here.usable, reason, here.remedy))
        return None, refusals

    def transport(self, scheme: str) -> Transport:
        """The transport for `scheme:host:port`. Raises PluginError."""
        from vmf.transport.base import Transport

        transport: Transport = self._driver("transport", scheme, Transport, "scheme")
        return transport

    def storage(self, scheme: str) -> StorageDriver:
        """The storage driver for `scheme:...`. Raises PluginError."""
        from vmf.storage.base import StorageDriver

        driver: StorageDriver = self._driver("storage", scheme, StorageDriver, "scheme")
        return driver

    def devices(
        self,
        environment: DeviceEnvironment,
        names: Iterable[str],
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> list[Device]:
        """Make the devices of these plugins, in this order, for one machine.

        Args:
            options: by plugin name, what that plugin finds in `environment.options`.

        Raises PluginError; devices made before the error have been closed.
        """
        from vmf.device.base import Device

        made: list[Device] = []
        hook = DRIVER_HOOKS["device"]
        try:
            for name in names:
                plugin = self.load("device", name)
                given = (options or {}).get(name, {})
                own = environment.of_plugin(plugin.culprit, given)
                result = plugin.call(hook, environment=own)
                if isinstance(result, str) or not isinstance(result, Sequence):
                    raise plugin.culprit.wrong(hook, result, "a list of Device objects")
                # Before any of them is looked at: what was made is closed, whatever is wrong with the others.
                raw = [device for device in result if isinstance(device, Device)]
                bare = [contain(Device, device, plugin.culprit) for device in raw]
                made += bare
                for device in result:
                    if not isinstance(device, Device):
                        raise plugin.culprit.wrong(hook, device, "a list of Device objects only")
                made[len(made) - len(raw) :] = [seams.contained_device(device, plugin.culprit, given) for device in raw]
        except BaseException:
            for device in made:
                device.close()
            raise
        return made

    @property
    def hooks(self) -> Hooks:
        """The observers and policies of kind "hooks"; loaded at first use, the broken ones set aside."""
        with self._lock:
            if self._hooks is None:
                plugins = []
                for name in sorted({entry.name for entry in discovery.installed("hooks")}):
                    try:
                        plugins.append(self.load("hooks", name))
                    except PluginError as error:
                        self.report(error)
                self._hooks = Hooks(plugins, self.report)
            return self._hooks

    # -- the machinery -------------------------------------------------------------------------------------------

    def load(self, kind: str, name: str) -> LoadedPlugin:
        """Find, import and check one plugin. Raises PluginError."""
        with self._lock:
            key = (kind, name)
            if key not in self._loaded:
                entry = discovery.find(kind, name)
                self._loaded[key] = LoadedPlugin(entry, discovery.load(entry))
            return self._loaded[key]

    def report(self, error: PluginError) -> None:
        """Note a plugin that was set aside."""
        with self._lock:
            if any(error.message == known.message for known in self.problems):
                return
            self.problems.append(error)
        if self._on_problem is not None:
            self._on_problem(error)
        else:
            log.warning("%s", error)

    def _driver(self, kind: str, name: str, expected: type[Any], attribute: str) -> Any:
        with self._lock:
            key = (kind, name)
            if key not in self._drivers:
                plugin = self.load(kind, name)
                hook = DRIVER_HOOKS[kind]
                driver = plugin.call(hook)
                if not isinstance(driver, expected):
                    raise plugin.culprit.wrong(f"its hook {hook}", driver, f"a {expected.__name__}")
                try:
                    answered = getattr(driver, attribute, None)
                    contained = _CONTAINED[kind](driver, plugin.culprit)
                except BaseException as error:
                    if interrupted(error) or isinstance(error, VmfError):
                        raise
                    raise plugin.culprit.fault(f"the attributes of its {expected.__name__}", error) from error
                if answered != name:
                    raise PluginError(
                        f"The {plugin.entry} calls itself {attribute}={answered!r:.100}, but its entry point '{name}'.",
                        f"Report this to the authors of {plugin.entry.distribution or plugin.entry.target}.",
                    )
                self._drivers[key] = contained
            return self._drivers[key]


_CONTAINED: Mapping[str, Callable[[Any, Culprit], Any]] = {
    "cpu": seams.contained_backend,
    "storage": seams.contained_storage,
    "transport": seams.contained_transport,
}
