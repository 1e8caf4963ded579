"""Dirty tracking: which pages of guest RAM were written since the last look."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

PageRuns = npt.NDArray[np.uint64]
"""Shape (n, 2): rows [first page, end page), ascending and disjoint, in pages of the RAM mapping."""


class DirtyTracker(ABC):
    """Sees every write to guest RAM by engine, devices and host alike."""

    name: str

    @abstractmethod
    def start(self) -> None:
        """Begin: from now on every written page is reported by the next `collect`."""

    @abstractmethod
    def collect(self) -> PageRuns:
        """Pages written since `start` or the last `collect`; atomically begins to watch them anew. May run while
        the vCPU runs: a write during the call is reported by this or by the next one."""

    @abstractmethod
    def stop(self) -> None:
        """End tracking and free its resources; idempotent."""
