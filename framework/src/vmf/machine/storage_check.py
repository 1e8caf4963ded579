"""Do two machines share their storage? What the target of a teleport checks, for every port at once.

That two paths are equal says nothing. A writable image is recognised by its lease: the source has just written a
random mark into it, which this host must read where it sees the image. One that is only read is recognised by its
driver's mark (for files a lock on a random byte far behind the end).
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vmf.errors import NotFoundError, VmfError
from vmf.storage import lease as rules
from vmf.storage.holder import read_record
from vmf.teleport.check import Blocker, show

if TYPE_CHECKING:
    from vmf.machine.storage_slot import Slot

PROBE_PATIENCE_S = 4.0
"""How long a file server's client may take to see what another host has just written (NFS's attribute cache: 3 s)."""
MAX_ROWS = 64


def size_text(size: int) -> str:
    """Bytes for people, exact."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift} {unit}"
    return f"{size} bytes"


def check_drives(name: str, slots: Sequence[Slot], source: Any) -> list[Blocker]:
    """Every difference; `name` is the target machine's, for the commands in the remedies."""
    rows: dict[int, Mapping[str, Any]] = {}
    for row in source if isinstance(source, list | tuple) else ():
        if not _sound(row) or len(rows) >= MAX_ROWS:
            return [Blocker("drives", "unreadable", "-", "Bring both hosts to the same release of vmf.")]
        rows[row["port"]] = row
    own = {slot.config.port: slot for slot in slots}
    found: list[Blocker] = []
    for port in sorted(rows.keys() | own.keys()):
        theirs, ours = rows.get(port), own.get(port)
        if theirs is None:
            assert ours is not None
            remedy = f"Remove it with `vmf storageattach {name} --port {port} --type {ours.config.type} --medium none`."
            found.append(Blocker(f"drive at port {port}", "missing", _what(ours.config.type, ours.drive.size), remedy))
        elif ours is None:
            attach = _attach(name, theirs, theirs["medium"])
            remedy = f"Attach the same image, as this host sees it: `{attach}`."
            found.append(
                Blocker(f"drive at port {port}", _what(show(theirs["type"]), theirs["size"]), "missing", remedy)
            )
        else:
            found += _compare(name, ours, theirs)
    return found


def _sound(row: Any) -> bool:
    kinds = {"port": int, "type": str, "medium": str, "read_only": bool, "size": int, "image": str, "probe": str}
    return isinstance(row, Mapping) and all(type(row.get(key)) is kind for key, kind in kinds.items())


def _what(kind: str, size: int) -> str:
    return f"{kind} of {size_text(size)}" if size else f"empty {kind}"


def _attach(name: str, row: Mapping[str, Any], medium: str) -> str:
    read_only = " --read-only" if row["read_only"] and row["type"] != "dvddrive" else ""
    return (
        f"vmf storageattach {name} --port {row['port']} --type {show(row['type'])}"
        f" --medium {shlex.quote(show(medium) or 'none')}{read_only}"
    )


def _compare(name: str, ours: Slot, theirs: Mapping[str, Any]) -> list[Blocker]:
    label, config = ours.label, ours.config
    again = f"Attach it as at the source: `{_attach(name, theirs, config.medium or theirs['medium'])}`."
    if theirs["type"] != config.type:
        return [Blocker(f"type of the {label}", show(theirs["type"]), config.type, again)]
    found = []
    if theirs["read_only"] != ours.drive.read_only:
        words = {True: "read-only", False: "writable"}
        found.append(Blocker(f"{label}", words[theirs["read_only"]], words[ours.drive.read_only], again))
    if bool(theirs["medium"]) != bool(config.medium):
        return [
            *found,
            Blocker(f"medium of the {label}", show(theirs["medium"]) or "none", config.medium or "none", again),
        ]
    if not config.medium:
        return found
    try:
        ours.probe()
    except NotFoundError as error:
        remedy = f"{error.remedy} Or attach it by the path that it has here: `{_attach(name, theirs, 'PATH')}`."
        return [*found, Blocker(f"medium of the {label}", show(theirs["medium"]), f"missing ({error.message})", remedy)]
    except VmfError as error:
        return [*found, Blocker(f"medium of the {label}", show(theirs["medium"]), error.message, error.remedy)]
    if theirs["size"] != ours.drive.size:
        sizes = size_text(theirs["size"]), size_text(ours.drive.size)
        remedy = f"It is another image: attach the one that the source has: `{_attach(name, theirs, 'PATH')}`."
        return [*found, Blocker(f"size of the {label}", *sizes, remedy)]
    if not found:
        found += _identify(name, ours, theirs)
    return found


def _identify(name: str, ours: Slot, theirs: Mapping[str, Any]) -> list[Blocker]:
    """Is it the same image?"""
    assert ours.driver is not None
    medium = ours.config.medium
    if not theirs["probe"]:
        return []  # the source's own blockers say that it has no lease
    seen = "another image"
    try:
        driver, probe = ours.driver, theirs["probe"]
        if not ours.writable:
            if ours.call("looking for the source's mark", lambda: driver.recognises(medium, probe)):
                return []
        else:
            seen = _other_lease(ours, theirs)
            if not seen:
                return []
    except VmfError as error:
        seen = f"an image that cannot be recognised: {error.message}"
    return [
        Blocker(
            f"image of the {ours.label}",
            show(theirs["medium"]),
            f"{medium}, {seen}",
            "Both machines must use the same image on shared storage, not a copy: "
            f"`{_attach(name, theirs, 'PATH')}` with the path of the shared one.",
        )
    ]


def _other_lease(ours: Slot, theirs: Mapping[str, Any]) -> str:
    """ "" when our lease bears the source's mark, else what we see instead."""
    end = time.monotonic() + PROBE_PATIENCE_S
    while True:
        store = ours.lease_store(create=False)
        if store is None:
            seen, patient = "which no machine uses", False
        else:
            try:
                record = ours.call("reading its lease", partial(read_record, store))
                patient = store.shared_slowly
            finally:
                ours.call("closing its lease", store.close)
            if record.image == theirs["image"] and record.probe == theirs["probe"]:
                return ""
            seen = f"another one: {rules.describe(record)}"
        if not patient or time.monotonic() > end:
            return seen
        time.sleep(0.2)
