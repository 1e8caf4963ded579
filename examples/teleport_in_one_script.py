"""Two machines in one program; the guest of the first teleports to the second and goes on.

    python examples/teleport_in_one_script.py [--kernel VMLINUZ --initrd INITRD]

Without a kernel the built-in self-checking guest runs.
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

import vmf
from vmf.machine.machine import wait_until
from vmf.testing.guests import builtin_guest


def main() -> None:
    parser = argparse.ArgumentParser(description="Teleport a guest between two machines of one program.")
    parser.add_argument("--kernel", type=Path, help="a Linux bzImage or vmlinux")
    parser.add_argument("--initrd", type=Path, help="its initial RAM disk")
    options = parser.parse_args()
    guest = {"kernel": options.kernel, "initrd": options.initrd} if options.kernel else {"image": builtin_guest()}

    registry = vmf.PluginRegistry()
    with (
        vmf.Machine(vmf.MachineConfig(name="here", memory_mib=64, **guest), registry) as here,
        vmf.Machine(vmf.MachineConfig(name="there", memory_mib=64, **guest), registry) as there,
    ):
        here.start()
        if not wait_until(lambda: len(here.console.scrollback()) > 60, 60):
            raise SystemExit("the guest printed nothing")

        address = there.listen("127.0.0.1", 0)
        arrival = threading.Thread(target=there.wait_for_teleport)
        arrival.start()
        summary = here.teleport(address.host, address.port)
        arrival.join()

        before = len(there.console.scrollback())
        if not wait_until(lambda: len(there.console.scrollback()) > before, 30):
            raise SystemExit("the guest went silent after the teleport")
        print(here.console.scrollback().decode(errors="replace")[-200:], end="")
        print("\n--- teleported ---")
        print(there.console.scrollback().decode(errors="replace")[:200])
        print(summary)


if __name__ == "__main__":
    main()
