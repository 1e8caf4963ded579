"""The interrupt controller as vCPUs see it: the device plugin's own, with its answers checked."""

from __future__ import annotations

from vmf.device.interrupts import InterruptController
from vmf.errors import PluginError

VECTORS = 256


class CheckedController:
    """`InterruptController` in front of a plugin's one. `pending` is the plugin's own method: it is asked after every
    port access, any answer is true or false, and what it raises is attributed by where it was raised."""

    def __init__(self, controller: InterruptController) -> None:
        self._controller = controller
        self.pending = controller.pending

    def acknowledge(self) -> int:
        vector = self._controller.acknowledge()
        if type(vector) is int and 0 <= vector < VECTORS:
            return vector
        raise PluginError(
            f"the interrupt controller ({type(self._controller).__module__}) gave {vector!r:.40} as the vector of an"
            f" interrupt, where a number from 0 to {VECTORS - 1} is specified.",
            "Report this to the authors of the device plugin that brings it.",
        )
