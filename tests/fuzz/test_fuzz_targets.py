"""The fuzz targets in the ordinary run: seeds, what once found something, and what hypothesis makes of both.

`tests/fuzz/fuzz.py` is the real thing; here each target gets some hundred inputs.
"""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fuzzing import Choices, Target, targets
from fuzzing.edits import edited
from fuzzing.regressions import REGRESSIONS
from hypothesis import given, settings
from hypothesis import strategies as st

from vmf.errors import RemoteProtocolError
from vmf.teleport.protocol import NEED_DATA, Connection, Role

FUZZ = Path(__file__).parent / "fuzz.py"
NAMES = (
    "answers", "certificates", "cpuid", "definition", "description", "device", "headers", "hello", "image", "journal",
    "leases", "message", "password", "payload", "requests", "runs", "sealed", "server-hello", "source", "states",
    "stream", "talk", "target", "vcpu",
)  # fmt: skip
SLOW = {"certificates", "description", "hello", "sealed", "server-hello", "source", "states", "target"}


@pytest.fixture(scope="session")
def known() -> dict[str, Target]:
    return targets()


def test_every_target_is_here(known: dict[str, Target]) -> None:
    assert sorted(known) == sorted(NAMES)
    assert all(target.run.__doc__ for target in known.values())


@pytest.mark.parametrize("name", NAMES)
def test_seeds(known: dict[str, Target], name: str) -> None:
    target = known[name]
    seeds = list(target.seeds())
    assert seeds
    for seed in seeds[:: max(1, len(seeds) // 150)]:
        target.run(seed)


@pytest.mark.parametrize("name", NAMES)
def test_mutated_seeds(known: dict[str, Target], name: str) -> None:
    """A bit flipped, bytes put in, left out, repeated: libFuzzer without its guidance, and always the same."""
    target = known[name]
    seeds = list(target.seeds())
    dice = random.Random(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
    for _ in range(40 if name in SLOW else 200):
        data = bytearray(dice.choice(seeds))
        for _ in range(dice.randrange(1, 6)):
            at = dice.randrange(len(data) + 1)
            action = dice.randrange(4)
            if action == 0 and data:
                data[at % len(data)] ^= 1 << dice.randrange(8)
            elif action == 1:
                data[at:at] = dice.randbytes(dice.randrange(1, 9))
            elif action == 2:
                del data[at : at + dice.randrange(1, 9)]
            else:
                data[at:at] = data[: dice.randrange(40)]
        target.run(bytes(data[: target.max_length]))


@pytest.mark.parametrize(
    ("name", "data", "what"), REGRESSIONS, ids=[f"{name}-{data[:12]}" for name, data, _ in REGRESSIONS]
)
def test_findings_stay_mended(known: dict[str, Target], name: str, data: str, what: str) -> None:
    known[name].run(bytes.fromhex(data))


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["stream", "message", "talk", "runs", "device", "vcpu", "cpuid", "requests", "answers"]),
    st.binary(),
)
def test_any_bytes(name: str, data: bytes) -> None:
    targets()[name].run(data)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(Role), st.binary(min_size=1, max_size=200))
def test_bytes_from_nowhere_are_refused_or_waited_for(role: Role, data: bytes) -> None:
    """At a connection that has just begun, nothing but the first message of the other side gets anywhere."""
    connection = Connection(role)
    connection.receive_data(data)
    refused = ""
    try:
        assert connection.next_event() is NEED_DATA
    except RemoteProtocolError as error:
        refused = str(error)
    assert refused.isprintable()
    assert bool(connection.bytes_wanted()) is not bool(refused)


def test_edits_leave_the_original_alone_and_change_a_copy() -> None:
    original = {"a": [1, 2, {"b": b"xyz"}], "c": "text", "d": None}
    before = repr(original)
    seen = {repr(edited(original, Choices(bytes([1, *random.Random(n).randbytes(30)])))) for n in range(300)}
    assert repr(original) == before
    assert len(seen) > 50


def test_a_short_run_with_coverage(tmp_path: Path) -> None:
    """The fuzzer itself, as far as it is installed."""
    pytest.importorskip("atheris", reason="atheris is not installed (pip install atheris)")
    command = [sys.executable, str(FUZZ), "--minutes", "0.05", "--corpus", str(tmp_path / "corpus")]
    command += ["--findings", str(tmp_path / "findings"), "runs"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (match := re.search(r"(\d+) inputs in", done.stdout))
    assert int(match[1]) > 1000
