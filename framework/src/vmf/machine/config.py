"""What a machine is: its definition as the user wrote it, checked completely before anything is made of it.

The form on disk is TOML with one table per section; the form in memory is `MachineConfig`, immutable and always
valid. Every field carries the check that its value must pass, so that a file, the command line and a Python program
are judged by the same rules, and all problems are found in one go: `ConfigErrors.problems` lists each with its key,
the value, the reason and the remedy.

To add a setting: a field made with `_setting`, and its check in `vmf.machine.config_checks`. To add a section: a frozen
class of such fields, and a field of that class in `MachineConfig`; reading, writing, unknown keys and error messages
follow from it.
"""

# ruff: noqa: RUF009 - `_setting` and `_section` make attrs fields, not values

from __future__ import annotations

import difflib
import tomllib
import uuid as uuidlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from vmf.errors import ConfigError
from vmf.machine import config_checks as checks
from vmf.machine.config_checks import AUTO_LEVEL as AUTO_LEVEL
from vmf.machine.config_checks import MAX_DRIVES
from vmf.machine.config_checks import NAME_PATTERN as NAME_PATTERN
from vmf.machine.config_checks import split_peer as split_peer
from vmf.reading import open_regular

FORMAT_VERSION = 1
"""Of the TOML file. Readers refuse newer ones."""

MAX_MEMORY_MIB = 1 << 20
MAX_FILE_BYTES = 1 << 20


@frozen
class Problem:
    """One wrong setting.

    Attributes:
        key: as written in the file, sections with a dot ("teleporter.port").
        value: as written, shortened; "" for a missing key.
        reason: why it cannot be.
        remedy: what to do.
    """

    key: str
    value: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        value = f" = {self.value}" if self.value else ""
        return f"{self.key}{value}: {self.reason}. {self.remedy}"


class ConfigErrors(ConfigError):
    """Every problem of one definition, together."""

    def __init__(self, message: str, remedy: str = "", problems: tuple[Problem, ...] = ()) -> None:
        super().__init__(message, remedy)
        self.problems = problems

    @classmethod
    def of(cls, where: str, problems: list[Problem]) -> ConfigErrors:
        """The error for one or more problems in `where`."""
        if len(problems) == 1:
            only = problems[0]
            value = f" = {only.value}" if only.value else ""
            return cls(f"{where}: {only.key}{value}: {only.reason}.", only.remedy, (only,))
        listed = " ".join(f"({number}) {problem}" for number, problem in enumerate(problems, 1))
        return cls(f"{where}: {len(problems)} settings are wrong: {listed}", "", tuple(problems))


def _setting(check: checks.Check, *, secret: bool = False, **arguments: Any) -> Any:
    """A field; the value of a secret one is neither shown in messages nor by `repr`."""
    return attrs.field(metadata={"check": check, "secret": secret}, repr=not secret, **arguments)


def _section(section: type[Any]) -> Any:
    return attrs.field(factory=section, metadata={"section": section})


def _sections(section: type[Any]) -> Any:
    """A list of sections, `[[name]]` in TOML."""
    return attrs.field(factory=tuple, converter=checks.frozen_list, metadata={"sections": section})


def check_name(value: Any) -> None:
    """Raise ConfigError unless it can be a machine's name."""
    try:
        checks.machine_name(value)
    except checks.Bad as bad:
        raise ConfigErrors.of("machine name", [Problem("name", checks.show(value), bad.reason, bad.remedy)]) from None


# -- the definition ------------------------------------------------------------------------------------------


@frozen
class TeleporterConfig:
    """Section `teleporter`: whether the machine, when started, waits for a teleport, and where.

    Attributes:
        enabled: wait instead of booting.
        port: 0 to 65535; 0 takes a free one.
        address: of this host; where to listen.
        transport: name of the transport plugin.
        tls_dir: directory with this host's certificates; None for vmf's usual one.
        allow: names of the sources (in their certificates) that may teleport here; none allows all that the
            transport lets in.
        password_verifier: what a source's password is checked against, see `vmf.teleport.authentication.Verifier`;
            None for no password.
        insecure: listen although every host that reaches the address could send a machine here, see
            `vmf.machine.teleporter.check_exposure`.
    """

    enabled: bool = _setting(checks.switch, default=False)
    port: int = _setting(checks.whole(0, 65535, "a TCP port"), default=0)
    address: str = _setting(checks.address, default="0.0.0.0")
    transport: str = _setting(checks.plugin_name, default="tcp")
    tls_dir: Path | None = _setting(checks.path, default=None, converter=checks.absolute)
    allow: tuple[str, ...] = _setting(checks.allowed_names, default=(), converter=checks.frozen_list)
    password_verifier: str | None = _setting(checks.verifier, secret=True, default=None)
    insecure: bool = _setting(checks.switch, default=False)

    def transport_options(self) -> dict[str, Any]:
        """The settings that are the transport's own, as `Address.options` has them."""
        options: dict[str, Any] = {}
        if self.tls_dir is not None:
            options["tls_dir"] = str(self.tls_dir)
        if self.allow:
            options["allow"] = self.allow
        return options


@frozen
class CpuidConfig:
    """Section `cpuid`: what the guest sees of its CPU, see docs/reference/cpuid-levels.md.

    Attributes:
        portability_level: "0" to "4", the name of a level or profile, or "auto": the one all peers have in common.
        set, remove: CPU features, on top of the level.
        peers: HOST:PORT of machines that wait for a teleport. They are asked at every start, and the guest sees
            nothing that one of them cannot present.
        vendor: the CPU vendor that the guest sees, as CPUID spells it; "" for the backend's own. A backend that can
            present one vendor only refuses the others.
    """

    portability_level: str = _setting(checks.cpuid_level, default="0", converter=checks.level_text)
    set: tuple[str, ...] = _setting(checks.cpu_features, default=(), converter=checks.frozen_list)
    remove: tuple[str, ...] = _setting(checks.cpu_features, default=(), converter=checks.frozen_list)
    peers: tuple[str, ...] = _setting(checks.peers, default=(), converter=checks.frozen_list)
    vendor: str = _setting(checks.cpu_vendor, default="")


@frozen
class DriveConfig:
    """A section `drives`: one storage port.

    Attributes:
        port: unique in the machine.
        type: "hdd", "dvddrive" or "floppy".
        medium: absolute path or URI of the image; "" for an empty drive.
        read_only: the guest cannot write; always so in a dvddrive.
    """

    port: int = _setting(checks.whole(0, MAX_DRIVES - 1, "a port"))
    type: str = _setting(checks.drive_type, default="hdd")
    medium: str = _setting(checks.medium, default="")
    read_only: bool = _setting(checks.switch, default=False)

    @property
    def writable(self) -> bool:
        return bool(self.medium) and not self.read_only and self.type != "dvddrive"


@frozen
class MachineConfig:
    """One machine's definition. Making one checks it; ConfigErrors lists everything that is wrong.

    Attributes:
        name: unique on a host.
        uuid: identifies the machine on this host; a teleport does not compare it.
        description: free text; descriptive, never compared by a teleport.
        memory_mib: guest RAM, MiB.
        cpu_backend: "auto" or the name of a CPU backend plugin.
        kernel, initrd: files to boot; None for none. Made absolute here; a file must say the whole path.
        cmdline: kernel command line; None for vmf's usual one.
        image: a bare-metal flat or ELF image instead of a kernel.
        devices: device plugins in the order in which they are made, interrupt controller first.
        device_options: by device plugin, its own settings.
        drives: storage ports, in the order of their numbers.
        teleporter: waiting for a teleport.
        cpuid: what the guest sees of its CPU.
    """

    name: str = _setting(checks.machine_name)
    memory_mib: int = _setting(checks.whole(1, MAX_MEMORY_MIB, "an amount of memory in MiB"))
    uuid: str = _setting(checks.uuid, factory=lambda: str(uuidlib.uuid4()))
    description: str = _setting(checks.text(4096, newlines=True), default="")
    cpu_backend: str = _setting(checks.plugin_name, default="auto")
    kernel: Path | None = _setting(checks.path, default=None, converter=checks.absolute)
    initrd: Path | None = _setting(checks.path, default=None, converter=checks.absolute)
    cmdline: str | None = _setting(checks.optional(checks.text(2047)), default=None)
    image: Path | None = _setting(checks.path, default=None, converter=checks.absolute)
    devices: tuple[str, ...] = _setting(checks.device_names, default=("pc",), converter=checks.frozen_list)
    device_options: Mapping[str, Mapping[str, Any]] = _setting(checks.device_options, factory=dict)
    drives: tuple[DriveConfig, ...] = _sections(DriveConfig)
    teleporter: TeleporterConfig = _section(TeleporterConfig)
    cpuid: CpuidConfig = _section(CpuidConfig)

    def __attrs_post_init__(self) -> None:
        problems = _problems_of(self) + _conflicts(attrs.asdict(self, recurse=False))
        if problems:
            raise ConfigErrors.of(f"machine {checks.show(self.name)}", problems)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> MachineConfig:
        """Read plain data as it comes from TOML (without the file's `version`).

        Raises ConfigErrors with every wrong, missing and unknown key, beginning with `where`.
        """
        problems: list[Problem] = []
        arguments = _structured(cls, data, "", problems)
        if not problems:
            problems = _conflicts(arguments)
        if problems:
            raise ConfigErrors.of(where, problems)
        made: MachineConfig = _converter().structure(data, cls)
        return made

    def to_dict(self, *, secrets: bool = True) -> dict[str, Any]:
        """Plain data for TOML or JSON; settings that are not set (None) are left out.

        Without `secrets` it is fit to be shown: of secret settings it tells only that they are there.
        """
        plain = _converter().unstructure(self)
        teleporter = plain["teleporter"]
        plain["teleporter"] = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in teleporter.items()
            if value is not None and value != [] and (key, value) != ("insecure", False)
        }
        if not secrets and "password_verifier" in plain["teleporter"]:
            plain["teleporter"]["password_verifier"] = "(hidden)"
        return {
            key: str(value) if isinstance(value, Path) else value
            for key, value in plain.items()
            if value is not None and value != {} and (key, value) != ("drives", [])
        }


def _conflicts(values: Mapping[str, Any]) -> list[Problem]:
    """What is wrong between settings that are each right."""
    found = []
    if values.get("kernel") and values.get("image"):
        found.append(
            Problem(
                "image", checks.show(values["image"]), "is set as well as kernel", "Keep one: a kernel or an image."
            )
        )
    found += [
        Problem(key, checks.show(values[key]), "needs a kernel", f"Set kernel (--kernel FILE) or drop {key}.")
        for key in ("initrd", "cmdline")
        if values.get(key) and not values.get("kernel")
    ]
    teleporter = values.get("teleporter", {})
    if isinstance(teleporter, TeleporterConfig):
        teleporter = attrs.asdict(teleporter, recurse=False)
    section = teleporter if isinstance(teleporter, Mapping) else {}
    found += [
        Problem(
            f"teleporter.{key}",
            checks.show(section[key]),
            "needs a transport that knows who is there",
            'Set teleporter.transport = "tls" (--teleporter-transport tls) or drop it (none).',
        )
        for key in ("allow", "tls_dir")
        if section.get(key) and section.get("transport", "tcp") == "tcp"
    ]
    devices = values.get("devices", ("pc",))
    found += [
        Problem(
            f"device_options.{name}",
            "",
            f"{checks.show(name)} is not in devices",
            "Add it there, or drop this section.",
        )
        for name in values.get("device_options", {})
        if isinstance(devices, list | tuple) and name not in devices
    ]
    found += _cpuid_conflicts(values.get("cpuid", {}))
    found += _drive_conflicts(values.get("drives", ()))
    return found


def _drive_conflicts(drives: Any) -> list[Problem]:
    found: list[Problem] = []
    ports: set[Any] = set()
    for number, drive in enumerate(drives if isinstance(drives, list | tuple) else ()):
        values: Mapping[str, Any] = drive if isinstance(drive, Mapping) else attrs.asdict(drive)
        key, port = f"drives[{number}]", values.get("port")
        if port in ports:
            found.append(
                Problem(f"{key}.port", checks.show(port), "is taken by another drive", "Give each its own port.")
            )
        ports.add(port)
        if values.get("type", "hdd") == "hdd" and not values.get("medium"):
            found.append(Problem(f"{key}.medium", "", "is missing, and a hard disk is never empty", "Name an image."))
    return found


def _cpuid_conflicts(section: Any) -> list[Problem]:
    values: Mapping[str, Any] = section if isinstance(section, Mapping) else attrs.asdict(section)
    found = []
    if values.get("portability_level") == AUTO_LEVEL and not values.get("peers"):
        remedy = "Name hosts to ask with --teleport-peer HOST:PORT (key cpuid.peers), or choose a level from 0 to 4."
        found.append(Problem("cpuid.portability_level", f'"{AUTO_LEVEL}"', "has nobody to negotiate with", remedy))
    if values.get("set") and values.get("remove"):
        from vmf.cpuid.features import feature

        try:
            checks.cpu_features(values["set"])
            checks.cpu_features(values["remove"])
        except checks.Bad:
            return found  # reported by the checks of the keys themselves

        unwanted = {feature(name): name for name in values["remove"]}
        found += [
            Problem("cpuid.set", checks.show(name), "is in cpuid.remove, too", "Take it out of one of them.")
            for name in values["set"]
            if feature(name) in unwanted
        ]
    return found


def _problems_of(config: Any, prefix: str = "") -> list[Problem]:
    """Run every field's check on an object made in Python."""
    problems: list[Problem] = []
    for field in attrs.fields(type(config)):
        value = getattr(config, field.name)
        section = field.metadata.get("section")
        if (each := field.metadata.get("sections")) is not None:
            for number, item in enumerate(_rows(prefix + field.name, value, problems)):
                if isinstance(item, each):
                    problems += _problems_of(item, f"{prefix}{field.name}[{number}].")
                else:
                    key = f"{prefix}{field.name}[{number}]"
                    problems.append(Problem(key, checks.show(item), "is not a section", f"Use {each.__name__}."))
        elif section is None:
            _try(field, prefix + field.name, value, problems)
        elif isinstance(value, section):
            problems += _problems_of(value, f"{prefix}{field.name}.")
        else:
            problems.append(
                Problem(prefix + field.name, checks.show(value), "is not a section", f"Use {section.__name__}.")
            )
    return problems


def _structured(cls: type[Any], data: Any, prefix: str, problems: list[Problem]) -> dict[str, Any]:
    """Check plain data against a class of settings; the values that are there."""
    if not isinstance(data, Mapping):
        key = prefix.rstrip(".") or "the file"
        problems.append(
            Problem(key, checks.show(data), f"is {checks.kind(data)}, not a section", f"Write [{key}] and its keys.")
        )
        return {}
    fields = {field.name: field for field in attrs.fields(cls)}
    for key in data:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            remedy = f"Did you mean {prefix}{close[0]}?" if close else f"Known are {', '.join(fields)}."
            shown = "(hidden)" if "password" in str(key) else checks.show(data[key])
            problems.append(Problem(f"{prefix}{key}", shown, "is not a setting", remedy))
    for name, field in fields.items():
        if name not in data:
            if field.default is attrs.NOTHING:
                problems.append(Problem(prefix + name, "", "is missing", "Add it."))
        elif "section" in field.metadata:
            _structured(field.metadata["section"], data[name], f"{prefix}{name}.", problems)
        elif "sections" in field.metadata:
            for number, item in enumerate(_rows(prefix + name, data[name], problems)):
                _structured(field.metadata["sections"], item, f"{prefix}{name}[{number}].", problems)
        else:
            _try(field, prefix + name, data[name], problems)
    return {name: data[name] for name in fields if name in data}


def _rows(key: str, value: Any, problems: list[Problem]) -> list[Any]:
    if isinstance(value, list | tuple):
        return list(value)
    problems.append(
        Problem(key, checks.show(value), f"is {checks.kind(value)}, not a list of sections", f"Write [[{key}]].")
    )
    return []


def _try(field: Any, key: str, value: Any, problems: list[Problem]) -> None:
    try:
        field.metadata["check"](value)
    except checks.Bad as bad:
        shown = "(hidden)" if field.metadata["secret"] else checks.show(value)
        problems.append(Problem(key, shown, bad.reason, bad.remedy))


def _converter() -> Any:
    """cattrs turns checked plain data into objects and back; imported late, as only reading and writing need it."""
    global _made
    if _made is None:
        import cattrs

        _made = cattrs.Converter(forbid_extra_keys=True, unstruct_collection_overrides={tuple: list})
    return _made


_made: Any = None


# -- the file ------------------------------------------------------------------------------------------------


def parse(text: str, where: str) -> MachineConfig:
    """Read a definition from TOML text. Raises ConfigError; messages begin with `where`."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not valid TOML: {error}.", "Correct it, or create the machine anew.") from None
    version = data.pop("version", None)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        reason = "is missing" if version is None else "is not a version that this vmf reads"
        problem = Problem(
            "version",
            "" if version is None else checks.show(version),
            reason,
            f"This vmf reads version {FORMAT_VERSION}.",
        )
        raise ConfigErrors.of(where, [problem])
    return MachineConfig.from_dict(data, where)


def load(path: Path) -> MachineConfig:
    """Read a definition file. Raises ConfigError naming the file and key; FileNotFoundError when there is none."""
    try:
        with open_regular(path) as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", "Check its permissions.") from error
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes.", "It is not a machine definition.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}).", "Save it as UTF-8.") from None
    return parse(text, str(path))


def dump(config: MachineConfig) -> str:
    """The TOML text that `parse` reads back."""
    import tomli_w

    return tomli_w.dumps({"version": FORMAT_VERSION} | config.to_dict())
