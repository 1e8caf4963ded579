"""Foreign test programs: the lane, and a test of the lane itself.

    VMF_FOREIGN_SUITES=DIRECTORY pytest tests/foreign

runs the programs in DIRECTORY/user in a guest and on this host, and compares. docs/how-to/foreign-suites.md says how to
fill it; this tree has none of them. Expected differences stand in differences.toml.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmf.testing import foreign
from vmf.testing.foreign import Outcome, Table
from vmf.testing.hosts import Host

VARIABLE = "VMF_FOREIGN_SUITES"
SUITES = os.environ.get(VARIABLE)
TABLE = Path(__file__).with_name("differences.toml")


def _programs() -> list[str]:
    folder = Path(SUITES) / "user" if SUITES else None
    return [path.name for path in foreign.programs_in(folder)] if folder is not None and folder.is_dir() else []


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Outcome, Outcome]]]:
    """By program: on the host and in the guest."""
    assert SUITES
    programs = foreign.programs_in(Path(SUITES) / "user")
    natively = {program.name: foreign.run_on_the_host(program) for program in programs}
    with Host(tmp_path_factory.mktemp("foreign")) as host:
        guest = foreign.run_in_guests(host, programs, natively)
        yield {name: (natively[name], guest[name]) for name in natively}


@pytest.mark.linux
@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not SUITES, reason=f"{VARIABLE} names no directory with foreign test programs")
@pytest.mark.parametrize("program", _programs())
def test_as_on_the_host(outcomes: dict[str, tuple[Outcome, Outcome]], program: str) -> None:
    wrong = Table.read(TABLE).verdict(program, *outcomes[program])
    assert not wrong, wrong


def test_the_table_gives_reasons() -> None:
    table = Table.read(TABLE)
    assert all(table.reasons[program].strip() for program in (*table.differs, *table.varies))
    assert all(kinds and kinds <= {"status", "output"} for kinds in table.differs.values())


@pytest.mark.linux
def test_the_lane_itself(tmp_path: Path) -> None:
    """Three programs of our own: one is the same everywhere, one tells where it is, one ends the guest."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc to make programs for the lane")
    folder = tmp_path / "user"
    folder.mkdir()
    sources = {
        "same": 'puts("the same"); return 3;',
        "where": 'int here = access("/suite", F_OK); puts(here ? "on the host" : "in the guest"); return !here;',
        "zz-last": 'if (!access("/suite", F_OK)) { sync(); reboot(RB_POWER_OFF); } return 0;',
    }
    for name, body in sources.items():
        text = f"#include <stdio.h>\n#include <sys/reboot.h>\n#include <unistd.h>\nint main(void) {{ {body} }}\n"
        (tmp_path / f"{name}.c").write_text(text)
        command = [compiler, "-static", "-o", folder / name, tmp_path / f"{name}.c"]
        subprocess.run(command, check=True, timeout=120)
    programs = foreign.programs_in(folder)
    natively = {program.name: foreign.run_on_the_host(program) for program in programs}
    try:
        with Host(tmp_path / "host") as host:
            guest = foreign.run_in_guests(host, programs, natively)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    table_file = tmp_path / "table.toml"
    table_file.write_text(
        '[[difference]]\nprograms = ["where"]\ndiffers = ["status", "output"]\nreason = "it says where it is"\n'
        '[[difference]]\nprograms = ["gone"]\ndiffers = ["output"]\nreason = "it was mended"\n'
        '[[varies]]\nprograms = ["random"]\nreason = "it throws dice"\n'
    )
    table = Table.read(table_file)
    assert natively["same"].status == guest["same"].status == 3
    assert table.verdict("same", natively["same"], guest["same"]) == ""
    assert table.verdict("where", natively["where"], guest["where"]) == ""
    told = Table().verdict("where", natively["where"], guest["where"])
    assert "status 0 on the host, 1 in the guest" in told
    assert "+in the guest" in told
    assert table.verdict("random", Outcome(0, "a"), Outcome(0, "b")) == ""
    assert "status 0 on the host, 1 in the guest" in table.verdict("random", Outcome(0, "a"), Outcome(1, "b"))
    assert "it was mended" in table.verdict("gone", natively["same"], guest["same"])
    assert "the guest ended with it" in table.verdict("zz-last", natively["zz-last"], guest["zz-last"])
