"""examples/third_party_cpu_backend: installed by pip, it runs a machine, and takes one over from Unicorn and back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party_cpu_backend"

PROGRAM = """
import json
from vmf.errors import TeleportBlocked
from vmf.machine.config import CpuidConfig, MachineConfig
from vmf.machine.machine import Machine, wait_until
from vmf.plugins import list_plugins
from vmf.testing import guests
from vmf.testing.serial_check import check

record = next(r for r in list_plugins() if (r.kind, r.name) == ("cpu", "stepper"))
answer = {"usable": record.usable, "used": []}

def run(config, route):
    output = bytearray()
    with Machine(config) as machine:
        machine.console.add_listener(output.extend)
        machine.start()
        for backend in route:
            if backend:
                machine.switch_backend(backend)
            wanted = output.count(b"tick ") + 3
            assert wait_until(lambda: output.count(b"tick ") >= wanted, 100), (machine.failure, bytes(output))
            answer["used"].append(machine.info()["cpu_backend_used"])
        report = check(bytes(output[: output.rindex(b"\\n") + 1]))
        assert report.problems == (), report

image = guests.builtin_guest()
run(MachineConfig(name="born", memory_mib=8, image=image, cpu_backend="stepper"), [""])
suits = CpuidConfig("4", remove=("tsc", "de", "pse36"))
config = MachineConfig(name="guest", memory_mib=8, image=image, cpu_backend="unicorn", cpuid=suits)
run(config, ["", "stepper", "unicorn", "stepper"])
with Machine(MachineConfig(name="rich", memory_mib=8, image=image, cpu_backend="unicorn")) as machine:
    machine.start(paused=True)
    try:
        machine.switch_backend("stepper")
    except TeleportBlocked as error:
        answer["blockers"] = [blocker.field for blocker in error.blockers]
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which pip has installed the example."""
    base = tmp_path_factory.mktemp("third-party-cpu")
    source = base / "source"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*command, "--target", str(base / "site"), str(source)], check=True, env=environment)
    return base / "site"


def test_the_example_runs_a_machine_and_takes_one_over(site: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["usable"] is True
    assert answer["used"] == ["stepper", "unicorn", "stepper", "unicorn", "stepper"]
    assert {"CPU feature tsc", "CPU feature popcnt"} <= set(answer["blockers"])
