"""Plugins: hook specifications, discovery, and the bridge between them.

Importing this package is cheap; stevedore and the bridge are imported by those who use them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmf.plugins.hookspecs import API_VERSION, GROUPS, hookimpl, hookspec

if TYPE_CHECKING:
    from vmf.plugins.bridge import PluginRegistry as PluginRegistry
    from vmf.plugins.listing import PluginRecord as PluginRecord
    from vmf.plugins.listing import list_plugins as list_plugins

__all__ = ["API_VERSION", "GROUPS", "PluginRecord", "PluginRegistry", "hookimpl", "hookspec", "list_plugins"]


def __getattr__(name: str) -> Any:
    if name == "PluginRegistry":
        from vmf.plugins.bridge import PluginRegistry

        return PluginRegistry
    if name in ("PluginRecord", "list_plugins"):
        from vmf.plugins import listing

        return getattr(listing, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
