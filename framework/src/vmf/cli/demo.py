"""demo: a teleport to watch."""

from __future__ import annotations

import click

from vmf.errors import VmfError


@click.command()
def demo() -> None:
    """Watch a machine teleport between two hosts.

    \b
    Example:
      vmf demo
    """
    raise VmfError("The demonstration is not part of this build.", "See docs/tutorial for a teleport by hand.")
