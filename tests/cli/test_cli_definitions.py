"""createvm, modifyvm, unregistervm, list, showvminfo, help, completion: everything that needs no running machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from vmf.cli.app import COMMANDS, cli
from vmf.machine.home import Home


def test_define_modify_show_list_forget(here: Any, home: Home, image: Path) -> None:
    assert "defined" in here("createvm", "web", "--memory", 64, "--image", image.name).stdout
    here("createvm", "db", "--memory", 32, "--kernel", image, "--cmdline", "quiet", "--cpu-backend", "unicorn")
    here("modifyvm", "web", "--teleporter", "on", "--teleporter-port", 6000, "--teleporter-address", "localhost")
    here("modifyvm", "web", "--memory", 128, "--description", "front\nend")
    shown = json.loads(here("showvminfo", "web", "--json").stdout)
    assert shown["state"] == "poweredoff"
    assert shown["config"]["image"] == str(image), "relative paths are made absolute"
    assert shown["config"]["memory_mib"] == 128
    assert shown["config"]["teleporter"] == {
        "enabled": True,
        "port": 6000,
        "address": "localhost",
        "transport": "tcp",
    }
    assert "Teleporter:" in here("showvminfo", "web").stdout
    here("modifyvm", "web", "--teleporter", "off", "--image", "none")
    assert home.load("web").image is None
    assert home.load("web").teleporter.port == 6000, "what is not given stays"
    listed = json.loads(here("list", "vms", "--json").stdout)
    assert [(each["name"], each["state"]) for each in listed] == [("db", "poweredoff"), ("web", "poweredoff")]
    assert json.loads(here("list", "runningvms", "--json").stdout) == []
    here("unregistervm", "web")
    here("unregistervm", "db", "--delete")
    assert home.names() == []


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["createvm", "a/b", "--memory", "1"], 2, "is not a machine name"),
        (["createvm", "new", "--memory", "0"], 2, "memory_mib = 0"),
        (["createvm", "new", "--memory", "x"], 2, "--memory"),
        (["createvm", "new"], 2, "--memory"),
        (["createvm", "new", "--memory", "1", "--kernel", "gone"], 2, "--kernel gone: there is no such file"),
        (["createvm", "new", "--memory", "1", "--kernel", "."], 2, "not a regular file"),
        (["createvm", "new", "--memory", "1", "--cpu-backend", "abacus"], 1, "There is no cpu plugin 'abacus'"),
        (["createvm", "new", "--memory", "1", "--device", "pc", "--device", "pc"], 2, "more than once"),
        (["createvm", "old", "--memory", "1"], 2, "already"),
        (["modifyvm", "old"], 2, "Nothing to change"),
        (["modifyvm", "old", "--teleporter-port", "70000"], 2, "teleporter.port = 70000"),
        (["modifyvm", "old", "--teleporter", "maybe"], 2, "maybe"),
        (["modifyvm", "old", "--teleporter-transport", "pigeon"], 1, "There is no transport plugin 'pigeon'"),
        (["modifyvm", "odl", "--memory", "1"], 1, "Did you mean old?"),
        (["showvminfo", "odl"], 1, "There is no machine 'odl'"),
        (["startvm", "odl"], 1, "There is no machine 'odl'"),
        (["startvm", "old", "--detach", "--console"], 2, "exclude each other"),
        (["controlvm", "old", "pause"], 1, "not running"),
        (["controlvm", "old", "teleport", "--host", "h"], 2, "needs --port"),
        (["controlvm", "old", "teleport", "--host", "h", "--port", "0"], 2, "--port"),
        (["controlvm", "old", "juggle"], 2, "juggle"),
        (["console", "old"], 1, "not running"),
        (["startmv", "old"], 2, "Did you mean startvm?"),
        (["unregistervm", "odl"], 1, "There is no machine"),
        (["list", "vms", "--jsno"], 2, "--json"),
        (["completion", "tcsh"], 2, "tcsh"),
    ],
)
def test_mistakes_are_one_line_with_a_remedy(here: Any, arguments: list[str], status: int, said: str) -> None:
    here("createvm", "old", "--memory", 1)
    done = here(*arguments, status=status)
    assert done.stdout == ""
    assert done.stderr.startswith("vmf: error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


@pytest.mark.parametrize("words", [[], ["controlvm"], ["cpuid"], ["list"], ["media"]])
def test_half_a_command_shows_its_help(here: Any, words: list[str]) -> None:
    result = here(*words, status=2)
    assert (result.stdout + result.stderr).startswith("Usage: vmf ")
    assert len((result.stdout + result.stderr).splitlines()) > 5


def test_several_mistakes_are_a_line_each(here: Any) -> None:
    done = here("createvm", "new", "--memory", 0, "--cmdline", "x\ty", "--cpu-backend", "auto", status=2)
    assert [line.split(": ")[3].split(" =")[0] for line in done.stderr.splitlines()] == [
        "memory_mib",
        "cmdline",
        "cmdline",
    ]


def test_json_errors(here: Any) -> None:
    done = here("showvminfo", "none", "--json", status=1)
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "not-found"
    assert error["remedy"]


def test_damaged_definition_does_not_spoil_the_list(here: Any, home: Home) -> None:
    here("createvm", "good", "--memory", 1)
    here("createvm", "bad", "--memory", 1)
    home.paths("bad").definition.write_text("version = 1\nmemory = 5\n")
    listed = {each["name"]: each for each in json.loads(here("list", "vms", "--json").stdout)}
    assert listed["good"]["state"] == "poweredoff"
    assert listed["bad"]["state"] == "invalid"
    assert "memory" in listed["bad"]["error"]
    assert listed["bad"]["problem"] == listed["bad"]["error"]
    heading, row, _ = here("list", "vms").stdout.splitlines()
    assert row.split()[:2] == ["bad", "invalid"]
    uuid, problem = heading.index("UUID"), heading.index("PROBLEM")
    assert row[uuid:problem].strip() == ""
    assert listed["bad"]["problem"].startswith(row[problem:].strip().rstrip("…"))


def test_read_only_home_is_said(here: Any) -> None:
    done = here("createvm", "vm", "--memory", 1, status=1, VMF_HOME="/proc/nowhere")
    assert "VMF_HOME" in done.stderr


def test_list_plugins(vmf: Any) -> None:
    records = {(each["kind"], each["name"]): each for each in json.loads(vmf("list", "plugins", "--json").stdout)}
    for bundled in (("cpu", "unicorn"), ("device", "pc"), ("transport", "tcp")):
        assert records[bundled]["usable"], records[bundled]
        assert records[bundled]["distribution"].startswith("vmf-")
    text = vmf("list", "plugins").stdout
    assert "vmf-transport-tcp" in text


def walk(command: click.Command, path: str) -> list[tuple[str, click.Command]]:
    found = [(path, command)]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            found += walk(child, f"{path} {name}")
    return found


def test_every_command_has_help_with_an_example() -> None:
    commands = walk(cli, "vmf")
    assert len(commands) > len(COMMANDS) + 5
    for path, command in commands:
        assert "Example" in (command.help or ""), path
        for parameter in command.params:
            if isinstance(parameter, click.Option) and parameter.name != "help":
                assert parameter.help, f"{path} {parameter.name}"
    for name, (_, _, line) in COMMANDS.items():
        assert line.endswith("."), name


def test_start_is_light(vmf: Any, environment: dict[str, str]) -> None:
    """Help and listing import neither plugins nor what only running machines need."""
    vmf("createvm", "web", "--memory", 1)
    heavy = "numpy unicorn stevedore rich cattrs filelock asyncio vmf_cpu_unicorn vmf_device_pc vmf_transport_tcp"
    program = (
        "import sys; from vmf.cli.app import run\n"
        "status = run(sys.argv[1:]); sys.stdout.flush()\n"
        "print(status, *[m for m in sys.argv[0].split() if m in sys.modules], file=sys.stderr)"
    )
    for arguments in (["--help"], ["controlvm", "--help"], ["startvm", "--help"], ["--version"], ["list", "vms"]):
        if arguments == ["list", "vms"]:
            heavy = heavy.replace("cattrs", "")  # definitions are read
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.argv[0] = {heavy!r}\n{program}", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == "0\n", arguments


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(here: Any, shell: str) -> None:
    assert "_VMF_COMPLETE" in here("completion", shell).stdout


def test_completion_knows_the_machines(vmf: Any) -> None:
    vmf("createvm", "webserver", "--memory", 1)
    done = vmf(_VMF_COMPLETE="bash_complete", COMP_WORDS="vmf startvm we", COMP_CWORD="2")
    assert "webserver" in done.stdout


def test_debug_shows_the_traceback(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from vmf.cli import main; main()", "showvminfo", "none"],
        env=environment | {"VMF_DEBUG": "1"},
        capture_output=True,
        text=True,
    )
    assert "Traceback" in done.stderr
    assert done.returncode == 1


def test_reader_that_leaves_early_is_no_error(environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c 'from vmf.cli import main; main()' list plugins --json | head -c 1"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
