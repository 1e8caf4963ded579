"""CPUID: pure functions over what a guest sees. No I/O in here."""

from vmf.cpuid.table import CpuidRegisters, CpuidTable

__all__ = ["CpuidRegisters", "CpuidTable"]
