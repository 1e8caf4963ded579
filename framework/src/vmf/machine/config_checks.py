"""What each setting of a machine's definition must be: checks that raise `Bad` with the reason and the remedy.

`vmf.machine.config` puts one on every field; the key is the caller's to name. `show` and `kind` make what they say, and
the converters at the end make settings of files and of Python programs the same.
"""

from __future__ import annotations

import ipaddress
import os
import re
import uuid as uuidlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
AUTO_LEVEL = "auto"
"""`cpuid.portability_level` that is negotiated with the peers."""
CPU_VENDORS = ("GenuineIntel", "AuthenticAMD", "HygonGenuine", "CentaurHauls")
"""What CPUID leaf 0 spells on the x86-64 processors that there are."""


class Bad(ValueError):
    """What a check raises; the caller knows the key."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


Check = Callable[[Any], None]


def show(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    value = str(value) if isinstance(value, Path) else value
    text = repr(value) if not isinstance(value, str) else '"' + value.replace("\n", "\\n") + '"'
    return text if len(text) <= 80 else text[:77] + "..."


def text(limit: int, *, newlines: bool = False) -> Check:
    def check(value: Any) -> None:
        if not isinstance(value, str):
            raise Bad(f"is {kind(value)}, not a text", "Write it in quotes.")
        if len(value.encode("utf-8", "surrogatepass")) > limit:
            raise Bad(f"is longer than {limit} bytes", "Shorten it.")
        control = [char for char in value if ord(char) < 32 and not (newlines and char in "\n\t")] + (
            [char for char in value if 0xD800 <= ord(char) < 0xE000 or char == "\x7f"]
        )
        if control:
            raise Bad(f"contains the control character {control[0]!r}", "Remove it.")

    return check


def optional(check: Check) -> Check:
    def checked(value: Any) -> None:
        if value is not None:
            check(value)

    return checked


def kind(value: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number with a fraction", str: "a text"}
    names |= {list: "a list", dict: "a section"}
    return names.get(type(value), type(value).__name__)


def whole(low: int, high: int, unit: str) -> Check:
    def check(value: Any) -> None:
        if type(value) is not int:
            raise Bad(f"is {kind(value)}, not a whole number", f"Give {unit}, {low} to {high}.")
        if not low <= value <= high:
            raise Bad(f"is outside {low} to {high}", f"Give {unit}, {low} to {high}.")

    return check


def switch(value: Any) -> None:
    if type(value) is not bool:
        raise Bad(f"is {kind(value)}, neither true nor false", "Write true or false.")


def machine_name(value: Any) -> None:
    text(64)(value)
    if not NAME_PATTERN.fullmatch(value):
        raise Bad(
            "is not a machine name",
            "Use 1 to 64 of the characters A-Z a-z 0-9 . _ - beginning with a letter or digit.",
        )


def uuid(value: Any) -> None:
    text(36)(value)
    try:
        if str(uuidlib.UUID(value)) == value.lower():
            return
    except ValueError:
        pass
    raise Bad("is not a UUID", "Write 32 hexadecimal digits as 8-4-4-4-12, or leave it out to get a new one.")


def plugin_name(value: Any) -> None:
    text(64)(value)
    if not NAME_PATTERN.fullmatch(value):
        raise Bad("is not a plugin's name", "`vmf list plugins` shows the names.")


def device_names(value: Any) -> None:
    if not isinstance(value, list | tuple):
        raise Bad(f"is {kind(value)}, not a list", 'Write a list of device plugins, like ["pc"].')
    for name in value:
        plugin_name(name)
    if len(set(value)) != len(value):
        twice = next(name for name in value if list(value).count(name) > 1)
        raise Bad(f"names {twice!r} more than once", "Name each device plugin once.")
    if not value or len(value) > 64:
        raise Bad("is empty" if not value else "has more than 64 entries", 'The usual list is ["pc"].')


def device_options(value: Any) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(each, Mapping) for each in value.values()):
        raise Bad("is not a section of sections", "Write a [device_options.NAME] section for each device plugin.")


DRIVE_TYPES = ("hdd", "dvddrive", "floppy")
MAX_DRIVES = 16


def drive_type(value: Any) -> None:
    if value not in DRIVE_TYPES:
        raise Bad("is no kind of drive", f"Write one of {', '.join(DRIVE_TYPES)}.")


def medium(value: Any) -> None:
    text(4096)(value)
    if value and not os.path.isabs(value) and not re.match(r"[a-z][a-z0-9+.-]+:", value):
        raise Bad("is neither an absolute path nor a URI", "Write the whole path of the image, or SCHEME:...")


def path(value: Any) -> None:
    if value is None:
        return
    value = str(value) if isinstance(value, Path) else value
    text(4096)(value)
    if not value:
        raise Bad("is empty", "Give the file's path, or leave the key out.")
    if not os.path.isabs(value):
        raise Bad("is not an absolute path", f"Write the whole path, like {os.path.abspath(value)}.")


def allowed_names(value: Any) -> None:
    if not isinstance(value, list | tuple):
        raise Bad(f"is {kind(value)}, not a list", 'Write a list of names in certificates, like ["host.example"].')
    for name in value:
        text(255)(name)
        if not name.strip():
            raise Bad("has an empty name", "Write the name in the source's certificate.")
    if len(value) > 256:
        raise Bad("has more than 256 names", "Use an own CA for the hosts that may teleport here.")


def verifier(value: Any) -> None:
    """Its messages never quote the value: it may be a password that somebody wrote there."""
    if value is None:
        return
    remedy = "Set the password with `vmf modifyvm NAME --teleporter-password-file FILE`, or drop the key."
    if not isinstance(value, str):
        raise Bad(f"is {kind(value)}, not a text", remedy)
    from vmf.teleport.authentication import Verifier

    try:
        Verifier.parse(value)
    except ValueError:
        raise Bad("is no salted verifier (a password never stands here itself)", remedy) from None


def address(value: Any) -> None:
    text(255)(value)
    if not value:
        raise Bad("is empty", 'Write "0.0.0.0" to listen on every IPv4 address of this host.')
    try:
        bare = value[1:-1] if value.startswith("[") and value.endswith("]") else value
        ipaddress.ip_address(bare.partition("%")[0])
    except ValueError:
        if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?", value):
            raise Bad(
                "is neither an IP address nor a host name", "Give an address of this host, like 127.0.0.1 or ::1."
            ) from None


def cpuid_level(value: Any) -> None:
    if type(value) is not int and not isinstance(value, str):
        raise Bad(f"is {kind(value)}, neither a level nor a name", "Give 0 to 4, the name of a profile, or auto.")
    if value == AUTO_LEVEL:
        return
    from vmf.cpuid.features import CpuidError
    from vmf.cpuid.levels import parse_level

    try:
        parse_level(value)
    except CpuidError as error:
        raise Bad("is no portability level", error.remedy) from None


def cpu_vendor(value: Any) -> None:
    if value not in ("", *CPU_VENDORS):
        choices = ", ".join(CPU_VENDORS)
        raise Bad("is no CPU vendor", f'Give one of {choices}, or "" for the CPU backend\'s own.')


def cpu_features(value: Any) -> None:
    if not isinstance(value, list | tuple):
        raise Bad(f"is {kind(value)}, not a list", 'Write a list of CPU features, like ["aes"].')
    for name in value:
        text(64)(name)
    if not value:
        return  # what follows needs the tables of all features
    from vmf.cpuid.features import CpuidError, feature

    for name in value:
        try:
            feature(name)
        except CpuidError as error:
            raise Bad(f"names no CPU feature with {show(name)}", error.remedy) from None


def peers(value: Any) -> None:
    if not isinstance(value, list | tuple):
        raise Bad(f"is {kind(value)}, not a list", 'Write a list of hosts, like ["otherhost:6000"].')
    if len(value) > 64:
        raise Bad("has more than 64 entries", "Name only hosts that the machine is to teleport to.")
    for peer in value:
        text(300)(peer)
        host, port = split_peer(peer)
        address(host)
        if not 1 <= port <= 65535:
            raise Bad(f"has no TCP port in {show(peer)}", "Write HOST:PORT, with the port on which it waits.")


def split_peer(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`; an IPv6 address stands in brackets. Port 0 stands for none, or a wrong one."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not (host.startswith("[") and host.endswith("]"))):
        return text, 0
    number = int(port) if re.fullmatch(r"[0-9]{1,5}", port) else 0
    return host.removeprefix("[").removesuffix("]"), number


def level_text(level: Any) -> Any:
    """Levels are texts in memory and on disk; a file may have the number."""
    if type(level) is int:
        return str(level)
    return level.strip().lower() if isinstance(level, str) else level


def absolute(path: Any) -> Any:
    return Path(os.path.abspath(path)) if isinstance(path, str | Path) and str(path) else path


def frozen_list(names: Any) -> Any:
    return tuple(names) if isinstance(names, list | tuple) else names
