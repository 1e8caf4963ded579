"""examples/third_party_plugin: built and installed by pip like any distribution, then used by a machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party_plugin"

GUEST = bytes.fromhex(
    "66baa005"  # loop: mov dx, 0x5a0
    "ec"  #       in al, dx
    "66baf803"  #       mov dx, 0x3f8
    "ee"  #       out dx, al
    "ebf4"  #       jmp loop
)
"""Copies the greeting to the serial port for ever."""

PROGRAM = """
import json, sys, threading
from vmf.machine.config import MachineConfig
from vmf.machine.machine import Machine
from vmf.plugins import list_plugins

records = {f"{r.kind}:{r.name}": [r.usable, r.version, r.distribution, r.reason] for r in list_plugins()}
assert "vmf_hello" not in sys.modules, "listing imports nothing"
config = MachineConfig(
    name="greeter", memory_mib=8, image=sys.argv[1], devices=["pc", "hello"],
    device_options={"hello": {"greeting": "Good evening, guest!\\n"}},
)
seen, enough = bytearray(), threading.Event()

def listen(data):
    seen.extend(data)
    if seen.count(b"\\n") > 2:
        enough.set()

with Machine(config) as machine:
    machine.console.add_listener(listen)
    machine.start()
    assert enough.wait(60), seen
print(json.dumps({"records": records, "seen": seen.decode()}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which pip has installed the example."""
    base = tmp_path_factory.mktemp("third-party")
    source = base / "source"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*command, "--target", str(base / "site"), str(source)], check=True, env=environment)
    return base / "site"


def test_example_is_installed_listed_and_used(site: Path, tmp_path: Path) -> None:
    image, journal = tmp_path / "guest.bin", tmp_path / "journal"
    image.write_bytes(GUEST)
    environment = os.environ | {"PYTHONPATH": str(site), "VMF_HELLO_JOURNAL": str(journal)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(image)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["records"]["device:hello"] == [True, "1.0.0", "vmf-hello", ""]
    assert answer["records"]["hooks:hello-journal"] == [True, "1.0.0", "vmf-hello", ""]
    assert answer["seen"].startswith("Good evening, guest!\nGood evening, guest!\n")
    lines = journal.read_text().splitlines()
    assert lines[:2] == ["greeter: poweredoff -> starting", "greeter: starting -> running"]
    assert lines[-1] == "greeter: stopping -> poweredoff"


def test_wrong_setting_names_the_key(site: Path, tmp_path: Path) -> None:
    image = tmp_path / "guest.bin"
    image.write_bytes(GUEST)
    program = PROGRAM.replace('"Good evening, guest!\\n"', "5")
    done = subprocess.run(
        [sys.executable, "-c", program, str(image)],
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "device_options.hello.greeting = 5" in done.stderr


def test_its_command_is_one_of_vmf(site: Path) -> None:
    def vmf(*arguments: str) -> str:
        command = [sys.executable, "-m", "vmf.cli", *arguments]
        environment = os.environ | {"PYTHONPATH": str(site)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout

    assert "hello  An example of a third party's plugins" in vmf("--help")
    assert vmf("hello", "--whom", "you") == "hello, you\n"
