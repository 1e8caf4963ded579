"""Who may write an image: the lease, as a record and its transitions. No I/O here; `vmf.storage.holder` does that.

Theory of operation. Every writable image has one record, kept beside it (or wherever its driver has a place that all
hosts see). The record stands at FREE, HELD or OFFERED, and has a generation that grows with every change of owner:

    FREE g      --claim-->      HELD g+1 by A                  a machine starts
    HELD g by A --release-->    FREE g                         it ends
    HELD g by A --offer(T)-->   OFFERED g by A to teleport T   it has flushed and closed; nobody may write
    OFFERED g T --take(T)-->    HELD g+1 by B                  the target runs
    OFFERED g T --take_back(T)-> HELD g+1 by A                 the teleport failed; the target has not taken it
    any g       --break-->      FREE g+1                       a person decided

A machine may write exactly while the record says HELD, by its own *incarnation* (a random number of one run of one
machine) and with the generation at which it got it. Both `take`s need the same OFFERED record and leave another one
behind. Done under the store's lock, only one of them can happen: so after HANDOVER, whatever breaks, whoever of source
and target gets to the lease first is the machine, and the other one can read that it is not. A store without a lock
cannot decide such a race; there the source asks for better proof before it takes (`KeepsLeases.leased` is false).

The kernel's lock on the record's store is held for as long as the machine holds the lease. It is what tells a dead
owner from a living one: HELD, but not locked, means that the owner died (or its host did, or is cut off).

Machines with several writable images pass several leases at one handover. The first of them (the lowest port)
decides: it is offered last and taken first, and who lost it touches none of the others.
"""

from __future__ import annotations

import enum
import hashlib
import json
from typing import Any

import attrs
from attrs import frozen

from vmf.errors import ImageInUse, LeaseLost, StorageError

FORMAT = 1
BLOCK = 4096
"""Bytes of one encoded record; a store has room for two, written in turn, so that a torn write loses nothing."""


class Standing(enum.Enum):
    FREE = "free"
    HELD = "held"
    OFFERED = "offered"


@frozen
class Owner:
    """One run of one machine.

    Attributes:
        incarnation: random, of this run.
        machine: its name.
        uuid: of its definition.
        host: the host's name, for people.
        host_id: tells hosts apart; survives a reboot; "" where there is none.
        boot_id: of the running kernel; "" where it has none.
        pid: of the process.
    """

    incarnation: str
    machine: str
    uuid: str
    host: str
    host_id: str
    boot_id: str
    pid: int

    def __str__(self) -> str:
        text = f"machine {self.machine} on host {self.host} (process {self.pid})"
        # It was read from storage that others may write to, and goes to terminals.
        return "".join(char if char.isprintable() else "?" for char in text)[:400]


@frozen
class Record:
    """The lease of one image.

    Attributes:
        image: random, made with the first record; names the lease, not the content.
        generation: grows with every change of owner.
        sequence: grows with every write of the record.
        owner: who holds it, offered it, or had it last; None when nobody ever did.
        teleport: OFFERED: the teleport's id.
        probe: what the owner wrote there to be recognised by another host that looks at the same image.
        since: seconds since the epoch on the owner's clock, for people only.
    """

    image: str
    generation: int = 0
    sequence: int = 0
    standing: Standing = Standing.FREE
    owner: Owner | None = None
    teleport: str = ""
    probe: str = ""
    since: int = 0

    def held_by(self, incarnation: str) -> bool:
        return self.standing is Standing.HELD and self.owner is not None and self.owner.incarnation == incarnation


def _next(record: Record, **changes: Any) -> Record:
    return attrs.evolve(record, sequence=record.sequence + 1, **changes)


# -- transitions: each returns the new record, or raises and nothing has happened -------------------------------


def claim(record: Record, me: Owner, *, excludes: bool, excludes_here: bool = False, since: int = 0) -> Record:
    """A machine starts, and has got the store's lock: no living owner holds it (as far as the lock reaches).

    Raises ImageInUse naming the owner when it cannot be proved dead: it was on another host, which may be cut off, or
    on one that cannot be told from this one; or, where nothing excludes, always. A lock that reaches this host only
    proves as much of an owner on this host, but says nothing of whom it offered the lease to.
    """
    owner = record.owner
    if record.standing is not Standing.FREE and owner is not None and owner.incarnation != me.incarnation:
        same_kernel = bool(me.boot_id) and owner.boot_id == me.boot_id
        restarted = owner.uuid == me.uuid and is_identity(me.host_id) and same_host(owner, me)
        reaches = excludes or (excludes_here and record.standing is Standing.HELD)
        if not (reaches and (same_kernel or restarted)):
            unknown = (
                ""
                if is_identity(me.host_id)
                else (
                    " This host has no machine id (/etc/machine-id), so after a restart it cannot be told from others:"
                    " make one with `systemd-machine-id-setup`."
                )
            )
            raise ImageInUse(
                f"{_what(record)}, and it cannot be seen from here whether it still runs.",
                "If it does, teleport it. If it is gone for good, see `vmf media locks`, then `vmf media break-lock`."
                + unknown,
            )
    return _next(
        record,
        standing=Standing.HELD,
        generation=record.generation + 1,
        owner=me,
        teleport="",
        probe="",
        since=since,
    )


def is_identity(host_id: str) -> bool:
    """Whether it names a host: one that was never set up has none, or systemd's placeholder (machine-id(5))."""
    return host_id not in ("", "uninitialized") and bool(host_id.strip("0"))


def same_host(one: Owner, other: Owner) -> bool:
    """Whether both were on one host. Hosts made from one template may have the same machine id, so names count, too."""
    return (one.host_id, one.host) == (other.host_id, other.host)


def verify(record: Record, me: Owner, generation: int) -> None:
    """Raise LeaseLost unless `me` holds it since `generation`: the fence before every write."""
    if record.held_by(me.incarnation) and record.generation == generation:
        return
    raise LeaseLost(
        f"the image does not belong to {me} any more: {_what(record)}"
        f" (generation {record.generation}, ours was {generation}).",
        "Nothing was written. Power this machine off; the other one is the machine.",
    )


def publish(record: Record, me: Owner, generation: int, probe: str) -> Record:
    """The owner writes a mark into the record, by which another host can tell that it sees the same one."""
    verify(record, me, generation)
    return _next(record, probe=probe)


def offer(record: Record, me: Owner, generation: int, teleport: str) -> Record:
    """The owner has flushed and closed, and lets the other side of this teleport take it."""
    verify(record, me, generation)
    return _next(record, standing=Standing.OFFERED, teleport=teleport)


def take(record: Record, me: Owner, teleport: str, since: int = 0) -> Record:
    """The target, told by HANDOVER; or the source itself, whose teleport failed, takes it back.

    Raises LeaseLost when the offer does not stand any more: the other one has taken it, and has the machine.
    """
    if record.standing is not Standing.OFFERED or record.teleport != teleport:
        raise LeaseLost(
            f"the handover came too late: {_what(record)} (generation {record.generation}).",
            "The machine does not run here. Look where it runs: `vmf media locks`.",
        )
    return _next(
        record,
        standing=Standing.HELD,
        generation=record.generation + 1,
        owner=me,
        teleport="",
        probe="",
        since=since,
    )


def release(record: Record, me: Owner, generation: int) -> Record:
    """The owner ends, having flushed and closed."""
    verify(record, me, generation)
    return _next(record, standing=Standing.FREE, teleport="", probe="")


def broken(record: Record) -> Record:
    """A person decided that the owner is gone."""
    return _next(record, standing=Standing.FREE, generation=record.generation + 1, owner=None, teleport="", probe="")


def touched(record: Record) -> Record:
    """The same, to be written once more."""
    return _next(record)


def _what(record: Record) -> str:
    if record.standing is Standing.FREE:
        return f"it was given up by {record.owner}" if record.owner is not None else "nobody holds it"
    if record.standing is Standing.OFFERED:
        return f"{record.owner} offered it to a teleport"
    return f"it is held by {record.owner}"


def describe(record: Record) -> str:
    """One clause for people."""
    return _what(record)


# -- the bytes ---------------------------------------------------------------------------------------------------


def encode(record: Record) -> bytes:
    """One block: a line of JSON with a checksum before it, padded."""
    plain = {"format": FORMAT, **attrs.asdict(record), "standing": record.standing.value}
    body = json.dumps(plain, separators=(",", ":")).encode()
    block = b"vmf-lease " + hashlib.sha256(body).hexdigest().encode() + b"\n" + body + b"\n"
    if len(block) > BLOCK:
        raise StorageError("the lease's record is too long.", "Give the machine a shorter name.")
    return block.ljust(BLOCK, b"\0")


def decode(area: bytes) -> Record | None:
    """The newest whole record of a store's two blocks; None when nothing was ever written there.

    Raises StorageError when there is something, but no whole record, or one of a newer vmf.
    """
    records = [record for at in (0, BLOCK) if (record := _decode(area[at : at + BLOCK])) is not None]
    if records:
        return max(records, key=lambda record: record.sequence)
    if not area.strip(b"\0"):
        return None
    raise StorageError(
        "the lease's record is damaged.",
        "If no machine uses the image, make it anew with `vmf media break-lock`.",
    )


def _decode(block: bytes) -> Record | None:
    head, _, rest = block.partition(b"\n")
    body = rest.partition(b"\n")[0]
    if head != b"vmf-lease " + hashlib.sha256(body).hexdigest().encode():
        return None
    try:
        plain = json.loads(body)
        if plain.pop("format") != FORMAT:
            raise StorageError("the lease was written by a newer vmf.", "Bring all hosts to the same release of vmf.")
        owner = plain.pop("owner")
        standing = Standing(plain.pop("standing"))
        record = Record(**plain, standing=standing, owner=None if owner is None else Owner(**owner))
        return record if _sound(record) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _sound(record: Record) -> bool:
    """Whether every field is of its kind: others may write to the storage."""
    values = list(attrs.asdict(record, recurse=False).items())
    if record.owner is not None:
        values += attrs.asdict(record.owner).items()
    for name, value in values:
        if name in ("generation", "sequence", "since", "pid"):
            if type(value) is not int or not 0 <= value < 1 << 63:
                return False
        elif name not in ("standing", "owner") and not isinstance(value, str):
            return False
    return True
