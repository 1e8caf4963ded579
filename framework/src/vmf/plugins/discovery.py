"""Which plugins are installed, and loading one of them by kind and name.

Theory of operation. What is installed is read from the metadata of the installed distributions, which imports
nothing. Loading is stevedore's: it imports the one entry point asked for. stevedore keeps a cache of all entry
points on disk, keyed by modification times rounded to about two minutes; a plugin installed or reinstalled a moment
ago would be overlooked, and a read-only home complained about. So its table in memory (`ENTRY_POINT_CACHE`) is
filled here from the metadata first, and the one on disk is never consulted.

Two distributions that provide the same name in the same group are a conflict nobody but the user can settle: neither
is loaded, both are named.
"""

from __future__ import annotations

import importlib.metadata
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from attrs import frozen

from vmf.errors import PluginError, shortage
from vmf.plugins.hookspecs import GROUPS

LOAD_SECONDS = 60.0
"""Longest import of one plugin. Importing a large engine on a busy machine takes a few seconds."""


@frozen
class PluginEntry:
    """One installed entry point; nothing is known yet about whether it works.

    Attributes:
        kind: a key of `GROUPS`.
        name: the entry point's name, as users write it.
        target: what it names, `module` or `module:attribute`.
        distribution: name of the distribution that brings it, "" when unknown.
        version: of that distribution, "" when unknown.
    """

    kind: str
    name: str
    target: str
    distribution: str
    version: str

    def __str__(self) -> str:
        brought = f"{self.distribution} {self.version}".strip() or self.target
        return f"{self.kind} plugin '{self.name}' (of {brought})"


def _entry(kind: str, point: importlib.metadata.EntryPoint) -> PluginEntry:
    distribution = point.dist
    if distribution is None:
        return PluginEntry(kind, point.name, point.value, "", "")
    # A damaged METADATA file has neither; the plugin may work all the same.
    metadata = distribution.metadata
    return PluginEntry(kind, point.name, point.value, metadata["Name"] or "", metadata["Version"] or "")


def _points(kind: str) -> list[importlib.metadata.EntryPoint]:
    return list(importlib.metadata.entry_points(group=GROUPS[kind]))


def installed(kind: str | None = None) -> list[PluginEntry]:
    """Every installed plugin (of one kind), sorted by kind and name; imports none of them."""
    kinds = GROUPS if kind is None else (kind,)
    entries = [_entry(each, point) for each in kinds for point in _points(each)]
    order = {each: position for position, each in enumerate(GROUPS)}
    return sorted(entries, key=lambda entry: (order[entry.kind], entry.name, entry.distribution))


def find(kind: str, name: str) -> PluginEntry:
    """The one installed plugin of that kind and name. Raises PluginError when there is none or more than one."""
    entries = installed(kind)
    matches = [entry for entry in entries if entry.name == name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise conflict(matches)
    known = sorted({entry.name for entry in entries})
    have = f"Installed: {', '.join(known)}." if known else f"No {kind} plugin is installed."
    raise PluginError(
        f"There is no {kind} plugin '{name}'. {have}",
        f"Choose an installed one, or install the distribution that provides '{name}' in the entry-point group"
        f" {GROUPS[kind]}; `vmf list plugins` shows what is there.",
    )


def conflict(entries: Sequence[PluginEntry]) -> PluginError:
    """The error that names all the distributions which provide the same plugin."""
    first = entries[0]
    distributions = " and ".join(f"{entry.distribution or entry.target} {entry.version}".strip() for entry in entries)
    return PluginError(
        f"The {first.kind} plugin '{first.name}' comes more than once, from {distributions}; none of them is used.",
        f"Uninstall all but one (pip uninstall {entries[-1].distribution or 'DISTRIBUTION'}).",
    )


def load(entry: PluginEntry) -> Any:
    """Import the plugin and return its module or object.

    Raises PluginError, naming plugin, distribution and reason, whatever the import raised: SystemExit included,
    so that a plugin that calls sys.exit() does not end vmf. An import that takes longer than `LOAD_SECONDS` is given up
    and left on its thread. Raises ShortageError when it is this process that lacks memory or descriptors.
    """
    loaded: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            loaded.append(_import(entry))
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, name=f"vmf-load-{entry.name}", daemon=True)
    thread.start()
    thread.join(LOAD_SECONDS)
    remedy = f"Reinstall or update the distribution {entry.distribution or 'that provides it'}, or uninstall it."
    if thread.is_alive():
        raise PluginError(f"The {entry} cannot be imported: that did not end within {LOAD_SECONDS:g} s.", remedy)
    if not errors:
        return loaded[0]
    error = errors[0]
    if (lack := shortage(error)) is not None:
        raise lack from error
    raise PluginError(f"The {entry} cannot be imported: {describe(error)}.", remedy) from error


def _import(entry: PluginEntry) -> Any:
    from stevedore.driver import DriverManager

    group = GROUPS[entry.kind]
    # Only the entry that was chosen: stevedore would otherwise import every namesake before it noticed the conflict.
    chosen = [point for point in _points(entry.kind) if (point.name, point.value) == (entry.name, entry.target)]
    DriverManager.ENTRY_POINT_CACHE[group] = chosen[:1]
    try:
        manager: DriverManager[Any] = DriverManager(group, entry.name, on_load_failure_callback=_raise)
    finally:
        DriverManager.ENTRY_POINT_CACHE.pop(group, None)
    return manager.extensions[0].plugin


def _raise(manager: Any, point: importlib.metadata.EntryPoint, error: BaseException) -> None:
    raise error


def describe(error: BaseException) -> str:
    """One line for people: type, text, and the place in the plugin's code where it was raised."""
    text = " ".join(str(error).split())
    if len(text) > 300:
        text = text[:297] + "..."
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if frames and not isinstance(error, ImportError | SyntaxError):
        line += f" (at {frames[-1].filename}:{frames[-1].lineno})"
    return line
