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
        "target",
        "015e00a56b74656c65706f72745f696450000102030405060708090a0b0c0d0e0f6876657273696f6e73810168666561"
        "74757265738169612d6665617475726568736f66747761726569766d6620302e312e30676d616368696e6565616c7068"
        "61031300a2666d6574686f64646e6f6e65646461746140069200a66b6465736372697074696f6ea66a6d656d6f72795f"
        "6d696204676465766963657381826c70632e75617274313635353000646e6f6e65f663796573f564626c6f6242000164"
        "6c657373246972616d5f706167657319040069706167655f73697a65191000687061796c6f61647381836c70632e7561"
        "727431363535300100656c696e6b73006a636865636b5f6f6e6c79f4080100a00a1e00a265726f756e64016472756e73"
        "50010000000200000007000000010000000b1e00a265726f756e64026472756e73500100000002000000070000000100"
        "00000c1000a265726f756e64016473656e741935000e0100a0141200a16773656e745f61741b8000000000e00000000f"
        "5100a4687061796c6f616473818464766370750100a2637269701bffffffffffffffff65787361766548000000000000"
        "00006a73746f707065645f61741a075bcd156772756e6e696e67f56473656e74193000",
        "the end of a round that counted bytes nobody had sent was waited for as long as a source may be silent",
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
