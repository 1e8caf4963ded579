"""A device plugin: a port that greets whoever reads it."""

from __future__ import annotations

from collections.abc import Sequence

from vmf.device.base import Device, DeviceEnvironment, Payload
from vmf.errors import ConfigError, StateError
from vmf.plugins import hookimpl

vmf_api_version = 1

PORT = 0x5A0
DEFAULT_GREETING = "Hello, guest!\n"


class HelloPort(Device):
    """Reading gives the greeting's next byte, beginning again after the last; writing anything starts it again."""

    kind = "hello.port"
    VERSION = 1

    def __init__(self, environment: DeviceEnvironment) -> None:
        greeting = environment.options.get("greeting", DEFAULT_GREETING)
        if not isinstance(greeting, str) or not greeting.isascii() or not greeting:
            raise ConfigError(
                f"device_options.hello.greeting = {greeting!r}: is not an ASCII text.", "Write one in quotes."
            )
        self._greeting = greeting.encode("ascii")
        self._position = 0
        environment.bus.claim_ports(self.kind, PORT, 1, self)

    def io_read(self, offset: int, size: int) -> int:
        """The guest reads the port."""
        byte = self._greeting[self._position]
        self._position = (self._position + 1) % len(self._greeting)
        return byte

    def io_write(self, offset: int, size: int, value: int) -> None:
        """The guest writes to the port."""
        self._position = 0

    def reset(self) -> None:
        self._position = 0

    def save(self) -> Payload:
        return Payload(self.kind, self.VERSION, {"position": self._position})

    def restore(self, payload: Payload) -> None:
        if payload.version != self.VERSION or set(payload.body) != {"position"}:
            raise StateError(f"{self.kind}: a state that version {self.VERSION} does not know.")
        position = payload.body["position"]
        if type(position) is not int or not 0 <= position < len(self._greeting):
            raise StateError(f"{self.kind}: position {position!r} is outside the greeting.")
        self._position = position


@hookimpl
def vmf_create_device(environment: DeviceEnvironment) -> Sequence[Device]:
    """Group `vmf.device`: the devices of this plugin for one machine."""
    return [HelloPort(environment)]
