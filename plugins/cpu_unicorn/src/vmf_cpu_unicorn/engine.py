"""The engine by ctypes: the libunicorn that the `unicorn` distribution ships, and nothing of its Python binding.

The binding is not used because importing it costs more than opening the engine, and because the functions needed
here (the engine's exported internals) are not in it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import mmap
import platform
import sys
from ctypes import c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

from vmf.errors import BackendUnavailable, MachineError
from vmf_cpu_unicorn import corrections, host_floats, sure_hooks

REQUIRED_VERSION = "2.1.4"
"""Unexported fields are used, so the version is pinned; see layout.py."""

_LIBRARY = "libunicorn.so.2"
_REINSTALL = f"Install it with `pip install unicorn=={REQUIRED_VERSION}`."

# unicorn.h
ARCH_X86 = 4
MODE_64 = 8
HOOK_INTR = 1 << 0
HOOK_INSN = 1 << 1
HOOK_BLOCK = 1 << 3
HOOK_INSN_INVALID = 1 << 14
PROT_ALL = 7
INSN_IN = 218
INSN_OUT = 500
INSN_SYSCALL = 699
_CTL_WRITE = 1 << 30
_CTL_USE_EXITS = 4
_CTL_EXITS = 6
_CTL_CPU_MODEL = 7
_CTL_TB_FLUSH = 10
_CTL_TLB_FLUSH = 11
_CTL_TCG_BUFFER_SIZE = 13
CPU_MODEL_DENVERTON = 27
"""x86.h counts from QEMU64 = 0. See cpuid.py for why this one; tests/test_unicorn_engine.py checks the number."""

# What the gates call, all with the suffix _x86_64.
INTERNALS = (
    "x86_cpu_do_interrupt", "x86_update_hflags", "cpu_cc_compute_all", "cpu_ldub_code",
    "helper_check_iob", "helper_check_iow", "helper_check_iol", "raise_exception_err", "cpu_loop_exit",
    "tb_invalidate_phys_range", "update_fp_status", "update_mxcsr_status", "check_exit_request",
    "cpu_x86_update_dr7",
)  # fmt: skip
# What fast_stores.py puts itself in front of or calls.
STORE_INTERNALS = (
    "helper_ret_stb_mmu", "helper_le_stw_mmu", "helper_le_stl_mmu", "helper_le_stq_mmu",
    "tlb_reset_dirty_by_vaddr", "tlb_set_dirty", "tb_invalidate_phys_range", "qemu_ram_addr_from_host",
)  # fmt: skip
# What the replaced floating-point helpers call, and by what the self-test knows their fields.
FLOAT_INTERNALS = (
    "helper_fmov_ST0_FT0", "helper_fninit",
    "raise_exception_ra", "raise_exception_err_ra", "cpu_lduw_data_ra",
    "cpu_ldl_data_ra", "cpu_ldq_data_ra", "cpu_stw_data_ra", "cpu_stl_data_ra", "cpu_stq_data_ra",
)  # fmt: skip


def require_room(size: int) -> None:
    """Raise BackendUnavailable unless the host gives this process so many bytes now.

    The engine ends the whole process when it cannot allocate its code cache, so it is not let try.
    """
    try:
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError as error:
        raise BackendUnavailable(
            f"The Unicorn engine needs {size >> 20} MiB of memory of its own, and the host does not give them:"
            f" {error.strerror}.",
            "Raise the limit (`ulimit -v`, vm.overcommit_memory), or give the machine less memory.",
        ) from error


class Library:
    """libunicorn, loaded once per process.

    Attributes:
        api: the public functions with their types.
        quick: the same library, called without releasing the GIL (for calls far shorter than that costs).
        address: entry points by name without suffix, public and internal ones.
        version: "2.1.4".
        host_floats: floating point is computed by the host's processor; see host_floats.py.
        sure_hooks: no stop hides a SYSENTER or CPUID; see sure_hooks.py.
        corrected: what the engine gets wrong can be corrected; see corrections.py.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.api: Any = ctypes.CDLL(str(path))
        self.quick: Any = ctypes.PyDLL(str(path))
        self.api.uc_version.restype = c_uint32
        number = self.api.uc_version(None, None)
        self.version = f"{number >> 24}.{number >> 16 & 0xFF}.{number >> 8 & 0xFF}"
        if self.version != REQUIRED_VERSION:
            raise BackendUnavailable(
                f"The Unicorn engine is version {self.version}; vmf-cpu-unicorn knows {REQUIRED_VERSION} only.",
                _REINSTALL,
            )
        self.address: dict[str, int] = {}
        for name in (*INTERNALS, *STORE_INTERNALS, *FLOAT_INTERNALS, *corrections.INTERNALS, *sure_hooks.INTERNALS):
            try:
                self.address[name] = self._address(f"{name}_x86_64")
            except AttributeError:
                raise BackendUnavailable(
                    f"The Unicorn engine at {path} does not export {name}_x86_64.",
                    f"This build differs from the one on PyPI. {_REINSTALL}",
                ) from None
        for name in ("uc_emu_start", "uc_emu_stop"):
            self.address[name] = self._address(name)
        self._declare()
        # Before the first engine is opened: each one copies the table of helpers.
        self.host_floats = host_floats.install(self.api._handle, self.address)
        self.sure_hooks = sure_hooks.install(self.address)
        self.corrected = corrections.install(self.api._handle, self.address)

    def _address(self, name: str) -> int:
        value = ctypes.cast(getattr(self.api, name), c_void_p).value
        assert value is not None
        return value

    def _declare(self) -> None:
        for library in (self.api, self.quick):
            library.uc_open.argtypes = [c_int, c_int, c_void_p]
            library.uc_close.argtypes = [c_void_p]
            library.uc_strerror.argtypes = [c_int]
            library.uc_strerror.restype = c_char_p
            library.uc_emu_start.argtypes = [c_void_p, c_uint64, c_uint64, c_uint64, c_size_t]
            library.uc_emu_stop.argtypes = [c_void_p]
            library.uc_mem_map_ptr.argtypes = [c_void_p, c_uint64, c_size_t, c_uint32, c_void_p]
            library.uc_mmio_map.argtypes = [c_void_p, c_uint64, c_size_t, *[c_void_p] * 4]
            library.uc_reg_read.argtypes = [c_void_p, c_int, c_void_p]
            library.uc_reg_write.argtypes = [c_void_p, c_int, c_void_p]
            library.uc_hook_add.argtypes = [c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_uint64, c_uint64, c_int]
            library.uc_ctl.argtypes = [c_void_p, c_int, c_uint64, c_uint64]
            library.x86_update_hflags_x86_64.argtypes = [c_void_p]
            library.update_fp_status_x86_64.argtypes = [c_void_p]
            library.update_mxcsr_status_x86_64.argtypes = [c_void_p]
            library.cpu_x86_update_dr7_x86_64.argtypes = [c_void_p, c_uint32]
            library.tb_invalidate_phys_range_x86_64.argtypes = [c_void_p, c_uint64, c_uint64]
            library.tb_invalidate_phys_range_x86_64.restype = None

    def strerror(self, code: int) -> str:
        text: bytes = self.api.uc_strerror(code)
        return text.decode("ascii", "replace")


class Engine:
    """One open engine instance (uc_struct): the calls that vmf makes, with errors raised."""

    def __init__(self, library: Library, code_cache_bytes: int) -> None:
        self.library = library
        handle = c_void_p()
        self._check(library.api.uc_open(ARCH_X86, MODE_64, ctypes.byref(handle)), "open the engine")
        assert handle.value is not None
        self.handle: int = handle.value
        try:
            # Both must come before the first other call, which creates the CPU.
            self._ctl(_CTL_CPU_MODEL, "choose the CPU model", 1, CPU_MODEL_DENVERTON)
            self._ctl(_CTL_TCG_BUFFER_SIZE, "size the code cache", 1, code_cache_bytes)
            # No address ends a slice by being reached: every one of them may be guest code.
            self._ctl(_CTL_USE_EXITS, "enable exits", 1, 1)
            self._ctl(_CTL_EXITS, "clear exits", 2, 0, 0)
        except BaseException:
            self.close()
            raise

    def _check(self, code: int, action: str) -> None:
        if code:
            raise MachineError(f"The Unicorn engine could not {action}: {self.library.strerror(code)}.")

    def _ctl(self, control: int, action: str, count: int, first: int = 0, second: int = 0) -> None:
        word = control | count << 26 | _CTL_WRITE
        self._check(self.library.quick.uc_ctl(self.handle, word, first, second), action)

    def hook(self, kind: int, callback: int, user: int, instruction: int = 0) -> None:
        """Add a hook for all addresses; it lives as long as the engine."""
        token = c_size_t()
        code = self.library.quick.uc_hook_add(self.handle, ctypes.byref(token), kind, callback, user, 1, 0, instruction)
        self._check(code, "add a hook")

    def map_ram(self, gpa: int, size: int, address: int) -> None:
        code = self.library.quick.uc_mem_map_ptr(self.handle, gpa, size, PROT_ALL, address)
        self._check(code, f"map RAM at {gpa:#x}")

    def map_mmio(self, gpa: int, size: int, read: int, write: int, user: int) -> None:
        code = self.library.quick.uc_mmio_map(self.handle, gpa, size, read, user, write, user)
        self._check(code, f"map MMIO at {gpa:#x}")

    def flush_tlb(self) -> None:
        self._ctl(_CTL_TLB_FLUSH, "flush the TLB", 0)

    def flush_code(self) -> None:
        self._ctl(_CTL_TB_FLUSH, "flush the code cache", 0)

    def invalidate_code(self, start: int, end: int) -> None:
        """Drop what was translated from [start, end), offsets in the engine's RAM list."""
        self.library.quick.tb_invalidate_phys_range_x86_64(self.handle, start, end)

    def close(self) -> None:
        if self.handle:
            self.library.api.uc_close(self.handle)
            self.handle = 0


@lru_cache(maxsize=1)
def load() -> Library:
    """The library; raises BackendUnavailable with the precise reason."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ("x86_64", "AMD64"):
        raise BackendUnavailable(
            f"The Unicorn backend knows the engine's layout on Linux x86-64 only, not on {sys.platform} {machine}.",
            "Run vmf on a Linux x86-64 host.",
        )
    try:
        installed = importlib.metadata.version("unicorn")
    except importlib.metadata.PackageNotFoundError:
        raise BackendUnavailable("The Python package `unicorn` is not installed.", _REINSTALL) from None
    if installed != REQUIRED_VERSION:
        raise BackendUnavailable(
            f"The Python package `unicorn` is version {installed}; vmf-cpu-unicorn knows {REQUIRED_VERSION} only.",
            _REINSTALL,
        )
    specification = importlib.util.find_spec("unicorn")
    for folder in (specification.submodule_search_locations or ()) if specification else ():
        path = Path(folder) / "lib" / _LIBRARY
        if path.exists():
            try:
                return Library(path)
            except OSError as error:
                raise BackendUnavailable(f"The Unicorn engine {path} cannot be loaded: {error}.", _REINSTALL) from error
    raise BackendUnavailable(f"The Python package `unicorn` has no {_LIBRARY} inside.", _REINSTALL)
