"""CPUID: pure functions over what a guest sees. No I/O in here.

- `table`: a complete answer to the instruction; `bits`, `features`: its feature bits by name; `layout`: its numbers;
- `levels`: portability levels and profiles; `contract`: making what one machine's guest sees;
- `negotiate`: what several backends can all present; `compare`: what one cannot honour, and what it overrode;
- `render`: rows and plain data for the command line.
"""

from vmf.cpuid.compare import Difference, blockers, compare, diff
from vmf.cpuid.contract import make_contract, without
from vmf.cpuid.features import CpuidError, Feature, feature, features, features_of, with_dependencies_removed
from vmf.cpuid.levels import LEVELS, PROFILES, Level, level_of
from vmf.cpuid.negotiate import Agreement, Capability, negotiate
from vmf.cpuid.table import CpuidRegisters, CpuidTable

__all__ = [
    "LEVELS",
    "PROFILES",
    "Agreement",
    "Capability",
    "CpuidError",
    "CpuidRegisters",
    "CpuidTable",
    "Difference",
    "Feature",
    "Level",
    "blockers",
    "compare",
    "diff",
    "feature",
    "features",
    "features_of",
    "level_of",
    "make_contract",
    "negotiate",
    "with_dependencies_removed",
    "without",
]
