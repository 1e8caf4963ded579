"""The `vmf` command.

Nothing here is imported by the rest of vmf: what the command does is a Python call first. Each command lives in a
module that is imported when the command is used, so that `vmf --help` stays fast; `COMMANDS` says where.
"""

from __future__ import annotations

from vmf.cli.app import main

__all__ = ["main"]
