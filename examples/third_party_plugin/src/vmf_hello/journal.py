"""A hooks plugin: an observer that keeps a journal of state changes."""

from __future__ import annotations

import os

from vmf.plugins import hookimpl

vmf_api_version = 1


@hookimpl
def vmf_machine_state_changed(name: str, old: str, new: str) -> None:
    """Append a line to the journal, if there is one. Should that fail, vmf says so and goes on without us."""
    path = os.environ.get("VMF_HELLO_JOURNAL")
    if path:
        with open(path, "a", encoding="utf-8") as journal:
            journal.write(f"{name}: {old} -> {new}\n")
