"""The reference pages agree with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import attrs

from vmf.control.server import METHODS
from vmf.machine.config import MachineConfig, parse

DOCS = Path(__file__).parents[2] / "docs"


def test_cli_page_is_current() -> None:
    done = subprocess.run(
        [sys.executable, str(DOCS / "generate_cli_reference.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_setting_is_documented_with_its_default() -> None:
    page = (DOCS / "reference" / "configuration.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([a-z_.]+)` \| (.+?) \|", page, re.MULTILINE))
    rows = {key: value for key, value in rows.items() if not key.startswith("device_options.")}  # the plugins' own
    known = {"version": "required"}
    for field in attrs.fields(MachineConfig):
        section = field.metadata.get("section") or field.metadata.get("sections")
        for inner in attrs.fields(section) if section else [field]:
            key = f"{field.name}.{inner.name}" if section else inner.name
            known[key] = "required" if inner.default is attrs.NOTHING else inner.default
    assert set(rows) == set(known)
    for key, default in known.items():
        if isinstance(default, str) and default != "required" and default:
            assert rows[key] == f'`"{default}"`', key
        elif isinstance(default, bool | int):
            assert rows[key] == f"`{str(default).lower()}`", key
        elif default == "required":
            assert rows[key] == "required", key


def test_the_example_definition_is_right() -> None:
    page = (DOCS / "reference" / "configuration.md").read_text("utf-8")
    example = re.search(r"```toml\n(.*?)```", page, re.DOTALL)
    assert example is not None
    config = parse(example[1], "configuration.md")
    assert config.teleporter.enabled
    assert config.device_options["hello"]["greeting"] == "Good evening!"


def test_every_control_method_is_documented() -> None:
    page = (DOCS / "reference" / "control-socket.md").read_text("utf-8")
    for method, parameters in METHODS.items():
        for word in (method, *parameters):
            assert f"`{word}`" in page, word
