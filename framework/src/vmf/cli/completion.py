"""completion: the script that makes a shell complete vmf's commands, options and machine names."""

from __future__ import annotations

import click

from vmf.cli.common import say


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    Examples:
      eval "$(vmf completion bash)"
      vmf completion fish > ~/.config/fish/completions/vmf.fish
    """
    from click.shell_completion import get_completion_class

    maker = get_completion_class(shell)
    assert maker is not None
    say(maker(ctx.find_root().command, {}, "vmf", "_VMF_COMPLETE").source())
