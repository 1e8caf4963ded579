"""Definitions: what is right comes back unchanged, what is wrong is named completely."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmf.errors import ConfigError
from vmf.machine.config import (
    FORMAT_VERSION,
    ConfigErrors,
    MachineConfig,
    Problem,
    TeleporterConfig,
    check_name,
    dump,
    load,
    parse,
)

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40)
paths = st.none() | texts.filter(lambda text: "\0" not in text).map(lambda text: Path("/" + text))
plain = st.recursive(
    st.booleans() | st.integers(-(1 << 62), 1 << 62) | texts, lambda inner: st.lists(inner, max_size=3), max_leaves=4
)


@st.composite
def configs(draw: st.DrawFn) -> MachineConfig:
    kernel = draw(paths)
    devices = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    return MachineConfig(
        name=draw(names),
        memory_mib=draw(st.integers(1, 1 << 20)),
        description=draw(texts) + draw(st.sampled_from(["", "\nsecond line\twith a tab"])),
        cpu_backend=draw(names),
        kernel=kernel,
        initrd=draw(paths) if kernel else None,
        cmdline=draw(st.none() | texts) if kernel else None,
        image=None if kernel else draw(paths),
        devices=tuple(devices),
        device_options=draw(st.dictionaries(st.sampled_from(devices), st.dictionaries(names, plain, max_size=3))),
        teleporter=TeleporterConfig(
            draw(st.booleans()), draw(st.integers(0, 65535)), draw(st.sampled_from(["::1", "h"]))
        ),
    )


@given(configs())
def test_every_definition_survives_the_file(config: MachineConfig) -> None:
    assert parse(dump(config), "test") == config


@given(st.dictionaries(st.sampled_from([*(f.name for f in attrs.fields(MachineConfig)), "nam"]), plain))
def test_any_data_parses_or_raises_one_config_error(data: dict[str, Any]) -> None:
    problems: tuple[Problem, ...] = ()
    try:
        config = MachineConfig.from_dict(data, "test")
    except ConfigErrors as error:
        problems = error.problems
    else:
        assert MachineConfig.from_dict(config.to_dict(), "test") == config
    for problem in problems:
        assert problem.key
        assert problem.reason
        assert problem.remedy


def test_all_problems_come_at_once_with_key_value_reason_remedy() -> None:
    text = f"""
version = {FORMAT_VERSION}
memroy_mib = 64
memory_mib = 0
cmdline = 5
kernel = "vmlinuz"
devices = ["pc", "pc"]
uuid = "123"
[teleporter]
port = 70000
enabled = "yes"
adress = "::1"
"""
    with pytest.raises(ConfigErrors) as caught:
        parse(text, "/there/machine.toml")
    problems = {problem.key: problem for problem in caught.value.problems}
    assert set(problems) == {
        *("name", "memroy_mib", "memory_mib", "cmdline", "kernel", "devices", "uuid"),
        *("teleporter.port", "teleporter.enabled", "teleporter.adress"),
    }
    assert str(caught.value).startswith("/there/machine.toml: 10 settings are wrong:")
    assert problems["memroy_mib"].remedy == "Did you mean memory_mib?"
    assert problems["teleporter.adress"].remedy == "Did you mean teleporter.address?"
    assert problems["teleporter.port"].value == "70000"
    assert "0 to 65535" in problems["teleporter.port"].reason
    assert os.getcwd() in problems["kernel"].remedy


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"kernel": "/k", "image": "/i"}, "image"),
        ({"initrd": "/i"}, "initrd"),
        ({"cmdline": "quiet"}, "cmdline"),
        ({"device_options": {"disk": {}}}, "device_options.disk"),
        ({"devices": ()}, "devices"),
        ({"memory_mib": True}, "memory_mib"),
        ({"memory_mib": 1.5}, "memory_mib"),
        ({"name": "../up"}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"name": "a\n"}, "name"),
        ({"description": "\x1b[2J"}, "description"),
        ({"kernel": ""}, "kernel"),
        ({"kernel": "/a\0b"}, "kernel"),
        ({"teleporter": 5}, "teleporter"),
    ],
)
def test_wrong_settings_are_refused_in_python_too(settings: dict[str, Any], key: str) -> None:
    good: dict[str, Any] = {"name": "vm", "memory_mib": 64}
    with pytest.raises(ConfigErrors) as caught:
        MachineConfig(**(good | settings))
    assert [problem.key for problem in caught.value.problems] == [key]


@pytest.mark.parametrize("address", ["", "a b", "::1::", "-x-", "300.1.1.1 "])
def test_impossible_teleporter_addresses_are_refused(address: str) -> None:
    with pytest.raises(ConfigErrors, match=r"teleporter\.address"):
        MachineConfig(name="vm", memory_mib=1, teleporter=TeleporterConfig(address=address))


def test_relative_paths_become_absolute_in_python() -> None:
    assert MachineConfig(name="vm", memory_mib=1, kernel="k").kernel == Path.cwd() / "k"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = ", "not valid TOML"),
        ('name = "vm"\nmemory_mib = 1', "version: is missing"),
        ("version = 99", "version = 99: is not a version that this vmf reads"),
        ("version = true", "version = true"),
    ],
)
def test_unreadable_files_say_why(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_strange_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load(path)
    path.write_bytes(b"#" * (1 << 21))
    with pytest.raises(ConfigError, match="larger than"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")


def test_names() -> None:
    for good in ("a", "A.b-c_9", "x" * 64):
        check_name(good)
    for bad in ("", ".", "..", "a/b", "-a", ".a", "ü", "a b", 5, None):
        with pytest.raises(ConfigError):
            check_name(bad)


def test_teleporter_settings_of_the_transport() -> None:
    teleporter = TeleporterConfig(transport="tls", tls_dir=Path("/srv/tls"), allow=["alpha", "beta.example"])
    config = MachineConfig(name="vm", memory_mib=1, teleporter=teleporter)
    assert parse(dump(config), "vm") == config
    assert teleporter.transport_options() == {"tls_dir": "/srv/tls", "allow": ("alpha", "beta.example")}
    plain = MachineConfig(name="vm", memory_mib=1)
    assert "allow" not in dump(plain)
    assert "tls_dir" not in dump(plain)
    assert parse(dump(plain), "vm") == plain
    assert plain.teleporter.transport_options() == {}


@pytest.mark.parametrize("settings", [{"allow": ("alpha",)}, {"tls_dir": Path("/srv/tls")}])
def test_protection_that_the_transport_cannot_give_is_refused(settings: dict[str, Any]) -> None:
    key = next(iter(settings))
    with pytest.raises(ConfigErrors, match=rf"teleporter\.{key}.*needs a transport that knows who is there"):
        MachineConfig(name="vm", memory_mib=1, teleporter=TeleporterConfig(**settings))
    written = {"name": "vm", "memory_mib": 1, "teleporter": {key: ["a"] if key == "allow" else "/srv/tls"}}
    with pytest.raises(ConfigErrors, match="--teleporter-transport tls"):
        MachineConfig.from_dict(written, "vm.toml")


@pytest.mark.parametrize("allow", ["alpha", [""], [5], ["a\nb"], ["x"] * 257])
def test_impossible_allow_lists_are_refused(allow: Any) -> None:
    with pytest.raises(ConfigErrors, match=r"teleporter\.allow"):
        MachineConfig(name="vm", memory_mib=1, teleporter=TeleporterConfig(transport="tls", allow=allow))
