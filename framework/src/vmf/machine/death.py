"""Why a machine's process died without cleaning up, as far as its traces tell."""

from __future__ import annotations

import os
from pathlib import Path

from vmf.machine.lock import Holder, printable
from vmf.reading import open_regular

BEGIN = "==== "
"""How the lines of one run begin in vmm.log."""
_CRASH = "Fatal Python error: "
"""How `faulthandler` begins what it writes."""
_TAIL = 256 << 10


def explain(holder: Holder, vmm_log: Path) -> str:
    """One clause for people, of the process that had a machine's lock and did not give it back."""
    if not holder.same_host:
        return f"its process ended on host {printable(holder.host)}"
    if holder.fate:
        return printable(holder.fate)
    if holder.boot_id and not holder.same_boot:
        return "the host was restarted, or lost its power, while it ran"
    if crash := _crash(vmm_log):
        return f"its process crashed ({printable(crash)}); {vmm_log} says where"
    return "its process was killed, by SIGKILL or by the kernel for lack of memory (`journalctl -k` tells)"


def _crash(vmm_log: Path) -> str:
    """What the last run in the log died of; "" for no crash."""
    try:
        with open_regular(vmm_log) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    last_run = text.rpartition(f"\n{BEGIN}")[2]
    return last_run.partition(_CRASH)[2].partition("\n")[0].strip()
