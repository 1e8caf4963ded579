"""A portability level for several hosts, as a command: found, and then proved with every one of them.

The common level of a negotiation is about features. A contract made on one of the hosts at that level may still hold
a number that another cannot honour, or a basic feature that it lacks. So the contract is made as each host would make
it and compared with each other host; what remains is removed by name, or the next level is tried.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from vmf.cpuid.compare import Difference, compare
from vmf.cpuid.contract import make_contract
from vmf.cpuid.features import CpuidError, names
from vmf.cpuid.levels import HIGHEST_LEVEL, LevelLike, parse_level
from vmf.cpuid.negotiate import Capability, negotiate
from vmf.cpuid.table import CpuidTable


@frozen
class Party:
    """One host.

    Attributes:
        label: how people call it.
        backend: name of its CPU backend.
        capability: what that can present.
        peer: HOST:PORT, when it can be asked there; "" otherwise.
    """

    label: str
    backend: str
    capability: Capability
    peer: str = ""


@frozen
class Suggestion:
    """The command that gives a machine a contract which suits all, "" when there is none; `note` for people."""

    command: str
    note: str = ""


def honours(
    contract: CpuidTable, maker: Capability, other: Capability, level: LevelLike, *, machine: str = "NAME"
) -> list[Difference]:
    """What keeps a machine of that contract, made at `maker`, from going to `other`; empty when it can."""
    chosen = parse_level(level)
    return compare(
        contract,
        other.table,
        machine=machine,
        level=getattr(chosen, "number", 0),
        tsc_khz=maker.tsc_khz or None,
        capability_tsc_khz=other.tsc_khz or None,
        tsc_scaling=other.tsc_scaling,
    )


def suggest(parties: Sequence[Party], *, machine: str = "NAME") -> Suggestion:
    """How to make machines on any of these hosts that can go to all the others."""
    agreement = negotiate([party.capability for party in parties])
    if not agreement.possible:
        return Suggestion("")
    vendor = agreement.vendor or None
    for level in range(agreement.level, HIGHEST_LEVEL + 1):
        unwanted: set[str] = set()
        while True:
            try:
                found = _differences(parties, level, unwanted, vendor)
            except CpuidError:
                break  # too much would have to go
            more = {item.feature.name for item in found if item.feature is not None} - unwanted
            if not found:
                removed = "".join(f" --cpuid-remove {name}" for name in names_in_order(unwanted))
                command = f"vmf modifyvm {machine} --cpuid-portability-level {level}{removed}"
                return Suggestion(command, _vendor_note(parties, vendor))
            if not more or len(more) < len({item.field for item in found}):
                break  # a number: only a higher level hides those
            unwanted |= more
    peers = "".join(f" --teleport-peer {party.peer}" for party in parties if party.peer)
    if not peers:
        note = "No level alone suits all: let machines wait there, and give HOST:PORT instead of files."
        return Suggestion("", note)
    return Suggestion(f"vmf modifyvm {machine} --cpuid-portability-level auto{peers}")


def names_in_order(unwanted: set[str]) -> list[str]:
    """Feature names by leaf and bit."""
    from vmf.cpuid.features import features

    return names(features(unwanted))


def _differences(parties: Sequence[Party], level: int, unwanted: set[str], vendor: str | None) -> list[Difference]:
    found: list[Difference] = []
    for maker in parties:
        contract = make_contract(
            maker.capability.table, level, remove=unwanted, vendor=vendor, tsc_khz=maker.capability.tsc_khz or None
        )
        for other in parties:
            if other is not maker:
                found += honours(contract, maker.capability, other.capability, level)
    return found


def _vendor_note(parties: Sequence[Party], vendor: str | None) -> str:
    """Who presents any vendor makes GenuineIntel machines, unless it is told better by its peers."""
    if vendor in (None, "GenuineIntel"):
        return ""
    free = [party.label for party in parties if not negotiate([party.capability]).vendors]
    if not free:
        return ""
    peer = next((party.peer for party in parties if party.peer), "HOST:PORT")
    return (
        f"A machine that is born on {', '.join(free)} must also be told of a host of vendor {vendor}:"
        f" add `--teleport-peer {peer}`."
    )
