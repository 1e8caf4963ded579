"""virtio-rng (virtio 1.2, section 5.4): random bytes from the host's kernel."""

from __future__ import annotations

import os

from vmf_device_virtio.transport import VirtioDevice

MAX_BYTES = 65536
"""At once; a driver that wants more asks again."""


class VirtioEntropy(VirtioDevice):
    """The device has no state of its own: every request is answered at once."""

    kind = "virtio.rng"
    TYPE = 4
    PCI_CLASS = 0x1000
    QUEUES = (8,)

    def notified(self, number: int) -> None:
        queue = self.queues[0]
        while (chain := queue.pop()) is not None:
            written = 0
            for view in chain.writable:
                count = min(len(view), MAX_BYTES - written)
                view[:count] = os.urandom(count)
                written += count
            self.wrote(chain)
            queue.push(chain.head, written)
        self.completed(queue)
