"""Plugins: hook specifications, discovery, and the bridge between them."""

from vmf.plugins.hookspecs import API_VERSION, GROUPS, hookimpl, hookspec

__all__ = ["API_VERSION", "GROUPS", "hookimpl", "hookspec"]
