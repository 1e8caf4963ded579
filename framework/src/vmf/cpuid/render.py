"""CPUID for people and programs: rows of text for tables, and plain data for `--json`. Draws nothing itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vmf.cpuid.compare import Difference
from vmf.cpuid.features import RUNTIME_FEATURES, Feature, Features, features_of, names
from vmf.cpuid.layout import (
    Signature,
    address_widths,
    brand_of,
    vendor_of,
    xsave_components,
    xsave_size,
)
from vmf.cpuid.levels import LEVELS, PROFILES, level_of, lowest_level_without
from vmf.cpuid.negotiate import Agreement
from vmf.cpuid.table import CpuidTable

Row = tuple[str, ...]


def group_of(item: Feature) -> str:
    """Where a feature stands, as a heading: "7.0 ebx"."""
    return f"{item.leaf:x}.{item.subleaf:x} {item.register}"


def highest_level_with(item: Feature) -> int:
    """The most restrictive portability level that still lets a feature through."""
    out = lowest_level_without(item)
    return LEVELS[-1].number if out is None else out - 1


def summary_rows(table: CpuidTable) -> list[Row]:
    """(what, value) of the numbers of a table."""
    physical, linear = address_widths(table)
    components = xsave_components(table)
    level = level_of(features_of(table))
    xsave = f"{xsave_size(components)} bytes: {', '.join(c.name for c in components.values())}"
    return [
        ("vendor", vendor_of(table) or "any"),
        ("brand", brand_of(table) or "-"),
        ("signature", str(Signature.of(table))),
        ("x86-64 level", LEVELS[level].name if level else "below x86-64-v1"),
        ("address widths", f"{physical} bits physical, {linear} bits linear"),
        ("XSAVE area", xsave if components else "-"),
    ]


def feature_rows(table: CpuidTable) -> list[Row]:
    """(place, names) of the features of a table, a row for each register."""
    groups: dict[str, list[str]] = {}
    for item in sorted(features_of(table)):
        groups.setdefault(group_of(item), []).append(item.name)
    return [(place, " ".join(members)) for place, members in groups.items()]


def matrix_rows(tables: Sequence[CpuidTable]) -> list[Row]:
    """(feature, "yes"/"-" for each table..., highest level) of every feature that not all tables have."""
    sets = [features_of(table) - RUNTIME_FEATURES for table in tables]
    some: Features = frozenset().union(*sets)
    common = frozenset.intersection(*sets) if sets else frozenset()
    return [
        (item.name, *("yes" if item in present else "-" for present in sets), str(highest_level_with(item)))
        for item in sorted(some - common)
    ]


def difference_rows(differences: Iterable[Difference]) -> list[Row]:
    """(what, contract, backend, level that avoids it, remedy)."""
    return [
        (item.field, item.contract, item.capability, "-" if item.level is None else str(item.level), item.remedy)
        for item in differences
    ]


def level_rows() -> list[Row]:
    """(number, name, what it lets through beyond the next higher level)."""
    return [
        (str(level.number), level.name, " ".join(names(level.added)) or "everything the backend can present")
        for level in LEVELS
    ]


def profile_rows() -> list[Row]:
    """(name, what it strips beyond the one before)."""
    rows: list[Row] = []
    before: Features = frozenset()
    for profile in PROFILES.values():
        rows.append((profile.name, " ".join(names(profile.stripped - before))))
        before = profile.stripped
    return rows


def table_json(table: CpuidTable) -> dict[str, Any]:
    """A whole table with its meaning; "leaves" is `CpuidTable.to_wire` and is all that is needed to read it back."""
    physical, linear = address_widths(table)
    components = xsave_components(table)
    signature = Signature.of(table)
    present = features_of(table)
    return {
        "vendor": vendor_of(table),
        "brand": brand_of(table),
        "family": signature.family,
        "model": signature.model,
        "stepping": signature.stepping,
        "x86_64_level": level_of(present),
        "physical_address_bits": physical,
        "linear_address_bits": linear,
        "features": names(present),
        "xsave": {
            "size": xsave_size(components) if components else 0,
            "components": [
                {"index": c.index, "name": c.name, "size": c.size, "offset": c.offset, "supervisor": c.supervisor}
                for c in components.values()
            ],
        },
        "leaves": table.to_wire(),
    }


def difference_json(difference: Difference) -> dict[str, Any]:
    """One difference as plain data."""
    return {
        "kind": difference.kind,
        "field": difference.field,
        "feature": difference.feature.name if difference.feature else None,
        "contract": difference.contract,
        "capability": difference.capability,
        "level": difference.level,
        "command": difference.command,
        "remedy": difference.remedy,
    }


def agreement_json(agreement: Agreement) -> dict[str, Any]:
    """A negotiation's result as plain data."""
    return {
        "possible": agreement.possible,
        "problems": agreement.problems,
        "level": agreement.level,
        "level_name": LEVELS[agreement.level].name,
        "vendor": agreement.vendor,
        "tsc_khz": agreement.tsc_khz,
        "parties": list(agreement.parties),
        "missing": {item.name: list(who) for item, who in agreement.missing.items()},
        "table": table_json(agreement.table),
        "explanation": agreement.explain(),
    }


def levels_markdown() -> str:
    """The two tables of docs/reference/cpuid-levels.md."""
    lines = ["| level | name | lets through, beyond all higher levels |", "|---|---|---|"]
    lines += [f"| {number} | {name} | {added} |" for number, name, added in level_rows()]
    lines += ["", "| profile | strips, beyond the profile before | and with it, as they need it |", "|---|---|---|"]
    before: Features = frozenset()
    for profile, (name, stripped) in zip(PROFILES.values(), profile_rows(), strict=True):
        also = profile.removed - profile.stripped - before
        # AMD's second copy of leaf 1 goes with the first one, and is no news.
        listed = " ".join(name for name in names(also) if not name.startswith("amd_")) or "-"
        lines.append(f"| {name} | {stripped} | {listed} |")
        before |= profile.removed
    return "\n".join(lines) + "\n"
