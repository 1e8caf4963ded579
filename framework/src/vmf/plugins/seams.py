"""What each kind of plugin's object may answer, and the stand-ins for them (see `vmf.plugins.containment`).

One function per seam. What an object makes (an image, a channel, a vCPU) is contained like the object itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from attrs import evolve

from vmf.errors import PluginError, StorageError, TransportError
from vmf.plugins.containment import Check, Culprit, contain, show

if TYPE_CHECKING:
    from vmf.cpu.backend import CpuBackend, Vcpu, WriteLog
    from vmf.device.base import Device
    from vmf.storage.base import LeaseStore, StorageDriver, StorageImage
    from vmf.transport.base import Channel, Listener, Transport

T = TypeVar("T")

MAX_KIND = 100
MAX_REASON = 1000
"""Characters; as on the wire."""


# -- results -------------------------------------------------------------------------------------------------


def _an(expected: str, *types: type) -> Check:
    def check(result: Any) -> Any:
        if not isinstance(result, types):
            raise ValueError(expected)
        return result

    return check


def _flag(result: Any) -> bool:
    if not isinstance(result, bool) and type(result).__name__ != "bool_":
        raise ValueError("True or False")
    return bool(result)


def whole(low: int, high: int, expected: str) -> Check:
    """A whole number in [low, high]."""

    def check(result: Any) -> int:
        if isinstance(result, bool) or not isinstance(result, int) or not low <= result <= high:
            raise ValueError(expected)
        return int(result)

    return check


def one_line(result: Any) -> str:
    """A text for people: printable, not endless."""
    if not isinstance(result, str):
        raise ValueError('a text ("" for none)')
    line = " ".join("".join(char if char.isprintable() else " " for char in result).split())
    return line if len(line) <= MAX_REASON else line[: MAX_REASON - 1] + "…"


def _contained(make: Callable[[Any, Culprit], Any], culprit: Culprit, check: Check) -> Check:
    return lambda result: make(check(result), culprit)


def _or_none(check: Check) -> Check:
    return lambda result: None if result is None else check(result)


# -- devices -------------------------------------------------------------------------------------------------


def contained_device(device: Device, culprit: Culprit, options: Mapping[str, Any] | None = None) -> Device:
    """A device that its plugin has made. Raises PluginError where it does not say what it is.

    Args:
        options: the plugin's, as they were given: they stand for the settings of a device that tells none.
    """
    from vmf.device.base import Device
    from vmf.device.state import check_settings, payload_check, plain_options

    given = plain_options(options or {})

    fixed: dict[str, Any] = {}
    rules: Mapping[str, Check] = {
        "kind": _kind,
        "VERSION": whole(0, 0xFFFF, "a number from 0 to 65535"),
        "writes_ram": _flag,
    }
    for name, check in rules.items():
        try:
            fixed[name] = check(getattr(device, name))
        except ValueError as error:
            raise _attribute_error(device, culprit, name, f"is {show(getattr(device, name))}, not {error}") from None
        except AttributeError:
            raise _attribute_error(device, culprit, name, "is missing") from None
        except BaseException as error:
            raise culprit.fault(f"the attribute {name} of {type(device).__name__}", error) from error
    named = evolve(culprit, part=f"device {fixed['kind']}")
    checks: dict[str, Check] = {
        "save": payload_check(fixed["kind"], fixed["VERSION"]),
        "migration_blocker": one_line,
        "serial_input": whole(0, 1 << 20, "the number of bytes it took"),
        "settings": lambda result: given if result is None else check_settings(result),
    }
    return contain(Device, device, named, checks, fixed)


def _kind(value: Any) -> str:
    if not isinstance(value, str) or not value or len(value) > MAX_KIND or not value.isprintable():
        raise ValueError(f"a printable text of 1 to {MAX_KIND} characters")
    return value


def _attribute_error(device: object, culprit: Culprit, name: str, problem: str) -> PluginError:
    return PluginError(
        f"The {culprit.plugin} made a device ({type(device).__name__}) whose attribute {name} {problem}.",
        culprit.remedy,
    )


# -- CPU backends --------------------------------------------------------------------------------------------


def contained_backend(backend: CpuBackend, culprit: Culprit) -> CpuBackend:
    from vmf.cpu.backend import Availability, CpuBackend, Vcpu
    from vmf.cpuid.table import CpuidTable

    vcpu = _contained(contained_vcpu, culprit, _an("a Vcpu", Vcpu))
    return contain(
        CpuBackend,
        backend,
        culprit,
        {
            "availability": _an("an Availability", Availability),
            "cpuid_capability": _an("a CpuidTable", CpuidTable),
            "tsc_khz": whole(1, 1 << 40, "a rate in kHz above 0"),
            "tsc_khz_supported": _flag,
            "create_vcpu": vcpu,
            "create_tracing_vcpu": vcpu,
        },
        {"preference": _preference(backend, culprit)},
    )


def _preference(backend: CpuBackend, culprit: Culprit) -> int:
    value = backend.preference
    if isinstance(value, bool) or not isinstance(value, int):
        raise culprit.wrong("its attribute preference", value, "a whole number")
    return value


def contained_vcpu(vcpu: Vcpu, culprit: Culprit) -> Vcpu:
    from vmf.cpu.backend import Vcpu, VmExit, WriteLog
    from vmf.cpu.state import VcpuState
    from vmf.cpuid.table import CpuidTable

    log: Callable[[WriteLog, Culprit], WriteLog] = lambda made, by: contain(WriteLog, made, by)  # noqa: E731
    return contain(
        Vcpu,
        vcpu,
        culprit,
        {
            "run": _an("a VmExit", VmExit),
            "halted_for_good": _flag,
            "save": _an("a VcpuState", VcpuState),
            "read_cpuid": _or_none(_an("a CpuidTable or None", CpuidTable)),
            "read_tsc": whole(0, (1 << 64) - 1, "a 64-bit number"),
            "write_log": _or_none(_contained(log, culprit, _an("a WriteLog or None", WriteLog))),
        },
    )


# -- storage -------------------------------------------------------------------------------------------------


def contained_storage(driver: StorageDriver, culprit: Culprit) -> StorageDriver:
    """Its errors are StorageError: a device tells its guest of them as of any error of a disk."""
    from vmf.storage.base import ImageInfo, ImageMark, LeaseStore, StorageDriver, StorageImage

    culprit = evolve(culprit, error=StorageError)
    marks: Callable[[ImageMark, Culprit], ImageMark] = lambda made, by: contain(ImageMark, made, by)  # noqa: E731
    return contain(
        StorageDriver,
        driver,
        culprit,
        {
            "probe": _an("an ImageInfo", ImageInfo),
            "open": _contained(_image, culprit, _an("a StorageImage", StorageImage)),
            "lease_store": _or_none(_contained(_lease_store, culprit, _an("a LeaseStore or None", LeaseStore))),
            "mark": _contained(marks, culprit, _an("an ImageMark", ImageMark)),
            "recognises": _flag,
        },
    )


def _image(image: StorageImage, culprit: Culprit) -> StorageImage:
    from vmf.storage.base import SECTOR_SIZE, StorageImage

    size = getattr(image, "size", None)
    if isinstance(size, bool) or not isinstance(size, int) or size < 0 or size % SECTOR_SIZE:
        image.close()
        raise culprit.wrong("the size of an image", size, f"a multiple of {SECTOR_SIZE} bytes")
    return contain(StorageImage, image, culprit, {"readv_at_once": _flag})


def _lease_store(store: LeaseStore, culprit: Culprit) -> LeaseStore:
    from vmf.storage.base import LeaseStore

    return contain(
        LeaseStore,
        store,
        culprit,
        {
            "read": _an("bytes", bytes, bytearray, memoryview),
            "lock": _flag,
            "locked_elsewhere": _flag,
            "still_locked": _flag,
        },
    )


# -- transports ----------------------------------------------------------------------------------------------


def contained_transport(transport: Transport, culprit: Culprit) -> Transport:
    """Its errors are TransportError: a teleport takes them for a broken connection, and the machine stays."""
    from vmf.transport.base import Channel, Listener, Transport

    culprit = evolve(culprit, error=TransportError)
    channel = _contained(_channel, culprit, _an("a Channel", Channel))

    def listener(made: Listener, by: Culprit) -> Listener:
        return contain(Listener, made, by, {"accept": channel})

    return contain(
        Transport,
        transport,
        culprit,
        {
            "is_local": _flag,
            "listen": _contained(listener, culprit, _an("a Listener", Listener)),
            "connect": channel,
        },
    )


def _channel(channel: Channel, culprit: Culprit) -> Channel:
    from vmf.transport.base import Channel

    return contain(
        Channel,
        channel,
        culprit,
        {"unsent_bytes": whole(0, 1 << 63, "a number of bytes"), "channel_binding": _or_none(_binding)},
    )


def _binding(result: Any) -> tuple[str, bytes]:
    if (
        not isinstance(result, tuple)
        or len(result) != 2
        or not isinstance(result[0], str)
        or not isinstance(result[1], bytes)
    ):
        raise ValueError("a name and bytes, or None")
    return result


# -- what a hook answers -------------------------------------------------------------------------------------


def listed(result: Any, expected: str) -> Iterable[Any]:
    """A hook's list. Raises ValueError for anything else that is iterable by chance (a text, a mapping)."""
    if isinstance(result, str | bytes | Mapping) or not isinstance(result, Iterable):
        raise ValueError(expected)
    return result
