"""createmedium, storageattach, showmediuminfo, media."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from vmf.machine.home import Home
from vmf.storage.media import parse_size
from vmf.storage.uri import file_path, file_uri


def test_make_attach_show_detach(here: Any, home: Home, tmp_path: Path) -> None:
    disk = tmp_path / "web.img"
    assert "4.0 MiB" in here("createmedium", "web.img", "--size", "4M").stdout
    assert disk.stat().st_size == 4 << 20
    here("createvm", "web", "--memory", 64)
    here("storageattach", "web", "--port", 3, "--type", "hdd", "--medium", "web.img")
    here("storageattach", "web", "--port", 1, "--type", "dvddrive", "--medium", "emptydrive")
    drives = home.load("web").drives
    assert [(each.port, each.type, each.medium) for each in drives] == [(1, "dvddrive", ""), (3, "hdd", str(disk))]
    shown = json.loads(here("showmediuminfo", "web.img", "--json").stdout)
    assert (shown["size"], shown["format"], shown["lease"]["standing"]) == (4 << 20, "raw", "none")
    assert [each["machine"] for each in shown["machines"]] == ["web"]
    assert "port 3, hdd" in here("showvminfo", "web").stdout
    listed = json.loads(here("media", "list", "--json").stdout)
    assert [(each["port"], each["size"]) for each in listed] == [(1, None), (3, 4 << 20)]
    disk.unlink()
    assert "there is no image" in here("media", "list").stdout
    for port in (1, 3):
        here("storageattach", "web", "--port", port, "--type", "hdd", "--medium", "none")
    assert home.load("web").drives == ()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["createmedium", "old.img", "--size", "4M"], 1, "is there already"),
        (["createmedium", "new.img", "--size", "1000"], 2, "multiple of 512"),
        (["createmedium", "gone/new.img", "--size", "4M"], 1, "No such file or directory"),
        (["storageattach", "web", "--port", "0", "--type", "hdd", "--medium", "gone.img"], 1, "createmedium"),
        (["storageattach", "web", "--port", "0", "--type", "hdd", "--medium", "odd.img"], 1, "is no disk"),
        (["storageattach", "web", "--port", "0", "--type", "hdd", "--medium", "emptydrive"], 2, "never empty"),
        (["storageattach", "web", "--port", "0", "--type", "hdd", "--medium", "pigeon://x"], 1, "plugin 'pigeon'"),
        (["storageattach", "web", "--port", "0", "--type", "hdd", "--medium", "none"], 1, "no drive at port 0"),
        (["storageattach", "web", "--port", "16", "--type", "hdd", "--medium", "old.img"], 2, "--port"),
        (["storageattach", "web", "--port", "0", "--type", "hdd", "--medium", "cow.img"], 1, "like a qcow2 image"),
        (["storageattach", "web", "--port", "0", "--type", "hdd", "--medium", "short-cow.img"], 1, "is a qcow2 image"),
        (["storageattach", "web", "--port", "0", "--type", "hdd", "--medium", "link.img"], 2, "at port 9 already"),
        (["createmedium", "", "--size", "4M"], 2, "is no medium"),
        (["storageattach", "web", "--port", "0", "--type", "hdd", "--medium", "file:old.img"], 2, "no absolute path"),
        (["showmediuminfo", "nbd://h/x#1?tls-dir=/x"], 2, "no option 'tls-dir'"),
        (["showmediuminfo", "gone.img"], 1, "there is no image"),
        (["media", "break-lock", "old.img"], 1, "nothing to break"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(here: Any, tmp_path: Path, arguments: list[str], status: int, said: str) -> None:
    here("createvm", "web", "--memory", 64)
    (tmp_path / "old.img").write_bytes(bytes(4096))
    (tmp_path / "odd.img").write_bytes(b"odd")
    (tmp_path / "cow.img").write_bytes(b"QFI\xfb".ljust(4096))
    (tmp_path / "short-cow.img").write_bytes(b"QFI\xfb".ljust(4100))
    (tmp_path / "nine.img").write_bytes(bytes(4096))
    (tmp_path / "link.img").symlink_to("nine.img")
    here("storageattach", "web", "--port", "9", "--type", "hdd", "--medium", "nine.img")
    done = here(*arguments, status=status)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_is_meant_so_can_be_done(here: Any, tmp_path: Path) -> None:
    cow = tmp_path / "cow.img"
    cow.write_bytes(b"QFI\xfb".ljust(4096))
    assert "looks like a qcow2" in here("showmediuminfo", str(cow)).stdout
    here("createvm", "web", "--memory", 64)
    attach = ("storageattach", "web", "--type", "hdd", "--medium", f"file:{cow}?format=raw", "--port")
    here(*attach, 0, "--read-only")
    here(*attach, 1, "--read-only")
    assert "could write it" in here(*attach, 2, status=2).stderr


def test_locks_are_shown_and_only_a_dead_owners_is_broken(here: Any, vmf: Any, tmp_path: Path) -> None:
    disk = str(tmp_path / "web.img")
    here("createmedium", disk, "--size", "1M")
    script = textwrap.dedent(f"""
        import sys
        from vmf.machine.config import DriveConfig, MachineConfig
        from vmf.machine.storage import MachineStorage
        from vmf.plugins.bridge import PluginRegistry
        config = MachineConfig(name="there", memory_mib=16, drives=(DriveConfig(port=0, medium={disk!r}),))
        storage = MachineStorage(config, PluginRegistry(), print)
        storage.open()
        print("open", flush=True)
        sys.stdin.read()
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        (lock,) = json.loads(here("media", "locks", disk, "--json").stdout)
        assert (lock["standing"], lock["alive"], lock["owner"]["machine"]) == ("held", True, "there")
        assert "machine there on host" in here("media", "break-lock", disk, "--yes", status=1).stderr
        process.kill()
    (lock,) = json.loads(here("media", "locks", disk, "--json").stdout)
    assert (lock["standing"], lock["alive"]) == ("held", False)
    refused = vmf("media", "break-lock", disk, status=130, text_in="n\n")
    assert "may destroy the image" in refused.stderr
    assert "is broken" in here("media", "break-lock", disk, "--yes").stdout
    (lock,) = json.loads(here("media", "locks", disk, "--json").stdout)
    assert (lock["standing"], lock["generation"]) == ("free", 2)
    assert "is free" in here("media", "break-lock", disk).stdout


def test_sizes() -> None:
    for text, size in (("4G", 4 << 30), ("512m", 512 << 20), ("1.5KiB", 1536), ("1T", 1 << 40), ("1024", 1024)):
        assert parse_size(text) == size


@pytest.mark.parametrize(
    "name",
    ["web:1.img", "c:1.img", "a b.img", "a+b.img", "a#1.img", "a?lease=x.img", "a%20b.img", "ä\n.img", "\udcff.img"],
)
def test_names_of_files_are_taken_as_they_are(here: Any, home: Home, tmp_path: Path, name: str) -> None:
    """Made, attached, looked at: each time the file of that name, and no other one."""
    here("createmedium", name, "--size", "4M")
    assert [each.name for each in tmp_path.glob("*.img")] == [name]
    here("createvm", "web", "--memory", 64)
    here("storageattach", "web", "--port", 0, "--type", "hdd", "--medium", name)
    medium = home.load("web").drives[0].medium
    assert file_path(medium) == str(tmp_path / name)
    shown = json.loads(here("showmediuminfo", medium, "--json").stdout)
    assert [each["machine"] for each in shown["machines"]] == ["web"]
    assert (
        "at port 0 already"
        in here(
            "storageattach", "web", "--port", 1, "--type", "hdd", "--medium", file_uri(str(tmp_path / name)), status=2
        ).stderr
    )
