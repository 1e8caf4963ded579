"""Inputs that once found something, shortened: (target, input in hexadecimal, what it was)."""

from __future__ import annotations

REGRESSIONS: tuple[tuple[str, str, str], ...] = (
    (
        "description",
        "010132000208000001",
        "names of fields that the source made up stood in a blocker as they came, terminal escapes and all",
    ),
    (
        "stream",
        "290e150010000300280015030000",
        "the first byte of a TLS alert was refused as no protocol at all, and not as TLS",
    ),
    (
        "vcpu",
        "0001010000000258020000" + "55" * 600,
        "an error about a vCPU's state repeated all of a wrong value, megabytes if it was that long",
    ),
    (
        "certificates",
        "02030100020104" + "4243" * 3,
        "a certificate with a damaged extension was a traceback and no sentence",
    ),
    (
        "journal",
        "000101040002000000000000000000",
        "a journal entry with a value of another kind, beside a half-written note, was a traceback",
    ),
    (
        "leases",
        "01b003" + "5b" * 944 + "01b003" + "5b" * 944,
        "a lease that is nested too deeply was a traceback (anybody with access to the storage can write one)",
    ),
)
