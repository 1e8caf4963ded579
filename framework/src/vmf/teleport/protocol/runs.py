"""Page runs on the wire: little-endian u32 pairs (first page, number of pages), ascending and disjoint."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RUN_SIZE = 8
MAX_RUNS = 16384
"""Runs in one message."""
MAX_PAGES = 8192
"""Pages of raw data after one PAGES message (32 MiB): what has to arrive before anything else is heard."""
MAX_RAM_PAGES = 1 << 30
"""4 TiB of 4-KiB pages."""

PageRuns = npt.NDArray[np.uint64]


def pack_runs(runs: PageRuns) -> bytes:
    """Rows [first page, end page) to the wire form."""
    packed = np.empty(runs.shape, dtype="<u4")
    packed[:, 0] = runs[:, 0]
    packed[:, 1] = runs[:, 1] - runs[:, 0]
    return packed.tobytes()


def unpack_runs(data: bytes) -> PageRuns:
    """The wire form to rows [first page, end page). `data` was checked by `check_runs`."""
    pairs = np.frombuffer(data, dtype="<u4").reshape(-1, 2).astype(np.uint64)
    pairs[:, 1] += pairs[:, 0]
    return pairs


def count_pages(data: bytes) -> int:
    """Pages in all runs."""
    return int(np.frombuffer(data, dtype="<u4").reshape(-1, 2)[:, 1].sum(dtype=np.uint64))


def last_page(data: bytes) -> int:
    """End of the last run, in pages."""
    first, count = np.frombuffer(data, dtype="<u4").reshape(-1, 2)[-1].tolist()
    return int(first) + int(count)


def check_runs(data: object, max_pages: int) -> bytes:
    """Raises ValueError unless `data` is 1 to `MAX_RUNS` well-formed runs of at most `max_pages` pages together."""
    if not isinstance(data, bytes) or not data or len(data) % RUN_SIZE or len(data) > MAX_RUNS * RUN_SIZE:
        raise ValueError(f"not 1 to {MAX_RUNS} page runs")
    runs = unpack_runs(data)
    if (runs[:, 0] == runs[:, 1]).any() or (runs[1:, 0] < runs[:-1, 1]).any():
        raise ValueError("empty, overlapping or unordered page runs")
    if int(runs[-1, 1]) > MAX_RAM_PAGES:
        raise ValueError("page runs beyond any RAM")
    if int((runs[:, 1] - runs[:, 0]).sum()) > max_pages:
        raise ValueError(f"more than {max_pages} pages")
    return data
