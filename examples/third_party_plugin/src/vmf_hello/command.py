"""A command of its own: `vmf hello`. Any click command or group can be one."""

from __future__ import annotations

import click


@click.command()
@click.option("--whom", default="world", show_default=True, help="Who is greeted.")
def hello(whom: str) -> None:
    """Greet somebody.

    \b
    Example:
      vmf hello --whom you
    """
    click.echo(f"hello, {whom}")
