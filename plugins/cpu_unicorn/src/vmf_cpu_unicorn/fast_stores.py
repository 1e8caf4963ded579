"""Fast stores where the C extension is there; its theory of operation stands at the top of _stores.c.

Without the extension, or when the engine's image is not as expected, or with VMF_UNICORN_STORES=engine, everything
works through the engine's own slow path.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from vmf.memory.guest import GuestMemory
from vmf.memory.scattered import Ranges
from vmf_cpu_unicorn import layout as at
from vmf_cpu_unicorn.engine import Engine, Library

STORES_VARIABLE = "VMF_UNICORN_STORES"
Written = Callable[[int, int, int], None]
WrittenAll = Callable[[int, Ranges, int], bool]


def install(library: Library) -> bool:
    """Take the engine's places over, once per process and before any code is translated."""
    if os.environ.get(STORES_VARIABLE) == "engine":
        return False
    try:
        from vmf_cpu_unicorn import _stores
    except ImportError:
        return False
    address = library.address
    return _stores.install(
        at.STORE_HELPERS, at.SLOT_RESET_DIRTY, at.SLOT_SET_DIRTY,
        address["helper_ret_stb_mmu"], address["helper_le_stw_mmu"],
        address["helper_le_stl_mmu"], address["helper_le_stq_mmu"],
        address["tlb_reset_dirty_by_vaddr"], address["tlb_set_dirty"],
        address["tb_invalidate_phys_range"], address["qemu_ram_addr_from_host"], at.CPU_ENV_PTR,
    )  # fmt: skip


def attach(engine: Engine, cpu: int, memory: GuestMemory) -> bool:
    """Serve this engine from now on; it must not have run yet."""
    if not install(engine.library):
        return False
    from vmf_cpu_unicorn import _stores

    modes = at.read_pointer(cpu + at.CPU_ICOUNT_DECR_PTR) - at.MMU_MODES_SIZE
    return _stores.attach(engine.handle, cpu + at.CPU_ENV, modes, memory.address, memory.size)


def written_functions() -> tuple[Written, WrittenAll]:
    """`written(env, offset, size)` and `written_all(env, rows, limit)` for engines that `attach` accepted: a device
    wrote RAM."""
    from vmf_cpu_unicorn import _stores

    return _stores.written, _stores.written_all


def detach(cpu: int) -> None:
    """The engine is about to be closed."""
    try:
        from vmf_cpu_unicorn import _stores
    except ImportError:
        return
    _stores.detach(cpu + at.CPU_ENV)
