"""Every `vmf` command line in the documentation and in the remedies of errors is one that vmf understands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from vmf.cli.app import cli

TREE = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [TREE / "README.md", *TREE.glob("docs/**/*.md"), *TREE.glob("plugins/*/README.md"), *TREE.glob("changelog.d/*.md")]
)
SOURCES = sorted(TREE.glob("framework/src/**/*.py")) + sorted(TREE.glob("plugins/*/src/**/*.py"))

BLOCK_LINE = re.compile(r"^(?:    |\$ )?(?:\w+=\S+ )*(?:sudo )?(vmf [a-z].*)$")
INLINE = re.compile(r"`(vmf [a-z][^`]*)`")
CUT = re.compile(r"\s+(#|\||>|<|&&|2>|&$|;)(\s|$)")
"""Where the shell takes over."""


def commands(page: Path) -> Iterator[str]:
    text = page.read_text()
    lines, fenced = re.sub(r"\\\n\s*", " ", text).splitlines(), False
    for line in lines:
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif (fenced or line.startswith("    ")) and (match := BLOCK_LINE.match(line)):
            yield match[1]
    for match in INLINE.finditer(re.sub(r"\s*\n\s*", " ", text)):
        yield match[1]


def remedies(source: Path) -> Iterator[str]:
    """Command lines in error messages; what is filled in there is a word here."""
    text = re.sub(r'"\s*\n\s*f?"', "", source.read_text())
    for match in INLINE.finditer(text):
        yield re.sub(r"\{[^}]*\}", "1", match[1])


def problem_with(line: str) -> str:
    """What vmf would say of it, leaving aside what depends on files and on what a placeholder stands for."""
    line = CUT.split(line.rstrip(" \\").replace("[OPTIONS]", "").replace("--1", "--help"))[0]
    words = [re.split(r"[|]", word.strip("[]").replace("...", "").replace("…", ""))[0] for word in shlex.split(line)]
    words = [word for word in words[1:] if word]
    context = click.Context(cli, info_name="vmf")
    command: click.Command = cli
    while isinstance(command, click.Group):
        if not words or words[0].startswith("-"):
            return ""
        found = command.get_command(context, words[0])
        if found is None:
            return f"there is no command {words[0]!r}" if words[0].islower() else ""
        command, name, words = found, words[0], words[1:]
        context = click.Context(command, parent=context, info_name=name)
        if isinstance(command, click.Group) and command.params:
            takes = [p for p in command.params if isinstance(p, click.Argument)]
            words = words[len(takes) :]
    try:
        command.make_context(context.info_name, words, parent=context.parent)
    except click.NoSuchOption as error:
        return error.format_message()
    except (click.MissingParameter, click.BadParameter, click.BadOptionUsage):
        return ""
    except click.UsageError as error:
        return error.format_message()
    except click.exceptions.Exit:
        return ""
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TREE)))
def test_commands_of_a_page(page: Path) -> None:
    wrong = {line: said for line in commands(page) if (said := problem_with(line))}
    assert not wrong


def test_commands_that_errors_recommend() -> None:
    found = [(source, line) for source in SOURCES for line in remedies(source)]
    assert len(found) > 50, "the search finds nothing any more"
    wrong = {(source.name, line): said for source, line in found if (said := problem_with(line))}
    assert not wrong


def test_a_wrong_command_would_be_found() -> None:
    assert "no command" in problem_with("vmf strtvm box")
    assert "No such option" in problem_with("vmf startvm box --detatch")
    assert problem_with("vmf startvm box --detach") == ""
    assert sum(1 for page in PAGES for _ in commands(page)) > 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TREE)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    assert not [link for link in links if not re.match(r"[a-z]+:", link) and not (page.parent / link).exists()]
