"""Notes of teleports on the disk: what they say after a death, a full disk or a half-written one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from vmf import host
from vmf.errors import InvalidStateError
from vmf.machine.config import MachineConfig
from vmf.machine.doubt import refuse_in_doubt
from vmf.machine.home import Home
from vmf.machine.journal import KEPT, FileJournal, clear_interrupted, directory_of, in_doubt
from vmf.teleport.journal import Entry
from vmf.teleport.protocol.handover import Answer, Note
from vmf.teleport.protocol.states import Role
from vmf.transport.base import Address

ID = bytes(range(16))
PEER = Address("tls", "other.example", 6000, {"tls_dir": "/certificates", "password": "secret"})


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path, tmp_path / "run")
    for name in ("box", "other"):
        made.create(MachineConfig(name=name, memory_mib=16, image=Path("/nowhere")))
    return made


@pytest.fixture
def journal(home: Home) -> FileJournal:
    return FileJournal(home, "box")


def begin(journal: FileJournal, role: Role, identifier: bytes = ID, since: int = 1000) -> None:
    note = Note.OFFERED if role is Role.SOURCE else Note.PROMISED
    journal.begin(Entry(identifier, role, note, PEER, since))


def test_a_note_goes_its_way(journal, home):
    assert journal.note(ID) is Note.NONE
    begin(journal, Role.SOURCE)
    for note in (Note.OFFERED, Note.HANDED_OVER, Note.GONE):
        journal.mark(ID, note)
        assert journal.note(ID) is note
    journal.flush(ID)
    journal.erase(ID)
    journal.erase(ID)
    assert journal.note(ID) is Note.NONE
    assert in_doubt(home, "box") is None


def test_notes_are_private_and_hold_no_secret(journal, home):
    begin(journal, Role.SOURCE)
    (path,) = directory_of(home, "box").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert "secret" not in path.read_text()
    journal.mark(ID, Note.HANDED_OVER)
    entry = in_doubt(home, "box")
    assert entry.peer == Address("tls", "other.example", 6000, {"tls_dir": "/certificates"})
    assert entry.teleport_id == ID


def test_a_dead_source_is_in_doubt_only_after_the_handover(journal, home):
    begin(journal, Role.SOURCE)
    assert in_doubt(home, "box") is None
    refuse_in_doubt(home, "box")
    journal.mark(ID, Note.HANDED_OVER)
    assert home.resting_state("box") == "uncertain"
    with pytest.raises(InvalidStateError, match=r"tls:other\.example:6000"):
        refuse_in_doubt(home, "box")
    clear_interrupted(home, "box")
    assert in_doubt(home, "box") is not None
    journal.mark(ID, Note.GONE)
    assert in_doubt(home, "box") is None


def test_after_a_power_failure_a_mere_offer_is_in_doubt(journal, home, monkeypatch):
    begin(journal, Role.SOURCE)
    monkeypatch.setattr(host, "boot_id", lambda: "another")
    assert in_doubt(home, "box") is not None
    clear_interrupted(home, "box")
    assert in_doubt(home, "box") is not None


def test_an_interrupted_offer_is_cleared_at_the_next_start(journal, home):
    begin(journal, Role.SOURCE)
    clear_interrupted(home, "box")
    assert not list(directory_of(home, "box").iterdir())


def test_a_machine_that_came_back_is_in_no_doubt(journal, home):
    begin(journal, Role.SOURCE)
    journal.mark(ID, Note.HANDED_OVER)
    back = bytes(16)
    begin(journal, Role.TARGET, back)
    journal.flush(back)
    assert in_doubt(home, "box") is not None, "it has not arrived yet"
    journal.mark(back, Note.TAKEN)
    journal.flush(back)
    assert in_doubt(home, "box") is None
    assert home.resting_state("box") == "poweredoff"


def test_the_target_testifies(journal, home):
    assert journal.testify(ID).answer is Answer.UNKNOWN
    begin(journal, Role.TARGET)
    assert journal.testify(ID).answer is Answer.NEVER
    assert FileJournal(home, "other").testify(ID).machine == "box"
    journal.mark(ID, Note.TAKEN)
    assert journal.testify(ID).answer is Answer.ENDED


def test_another_machine_of_the_home_testifies_for_a_living_one(journal, home):
    begin(journal, Role.TARGET)
    witness = FileJournal(home, "other")
    with home.own("box"):
        # Only the living process can say NEVER, together with forgetting the teleport.
        assert witness.testify(ID).answer is Answer.UNKNOWN
        assert "ask at its own port" in witness.testify(ID).detail
        journal.mark(ID, Note.TAKEN)
        assert witness.testify(ID).answer is Answer.RUNS
    assert witness.testify(ID).answer is Answer.ENDED


def test_a_source_s_own_note_is_no_testimony(journal):
    begin(journal, Role.SOURCE)
    assert journal.testify(ID).answer is Answer.UNKNOWN


def test_old_teleports_are_forgotten_but_none_in_doubt(journal, home):
    doubtful = bytes([255]) * 16
    begin(journal, Role.SOURCE, doubtful, since=1)
    journal.mark(doubtful, Note.HANDED_OVER)
    for number in range(KEPT + 10):
        begin(journal, Role.TARGET, number.to_bytes(16, "big"), since=100 + number)
    assert len(list(directory_of(home, "box").iterdir())) == KEPT + 1
    assert in_doubt(home, "box").teleport_id == doubtful
    assert journal.note((5).to_bytes(16, "big")) is Note.NONE
    assert journal.note((KEPT + 9).to_bytes(16, "big")) is Note.PROMISED


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"note": 5}', b'{"note": "gone"}'])
def test_rubbish_says_nothing(journal, home, content):
    begin(journal, Role.SOURCE)
    (path,) = directory_of(home, "box").iterdir()
    path.write_bytes(content)
    assert journal.note(ID) is Note.NONE
    assert in_doubt(home, "box") is None


def test_a_half_written_note_counts_as_the_careful_one(journal, home):
    begin(journal, Role.SOURCE)
    (path,) = directory_of(home, "box").iterdir()
    path.write_bytes(path.read_bytes().replace(b"offered     ", b"handed-     "))
    assert in_doubt(home, "box") is not None


def test_a_full_disk_does_not_stop_a_handover(journal, home):
    """The note changes in place: no new block, no new name. The directory may even have become read-only."""
    begin(journal, Role.SOURCE)
    directory = directory_of(home, "box")
    size = next(directory.iterdir()).stat().st_size
    directory.chmod(0o500)
    try:
        journal.mark(ID, Note.HANDED_OVER)
    finally:
        directory.chmod(0o700)
    assert next(directory.iterdir()).stat().st_size == size
    assert journal.note(ID) is Note.HANDED_OVER


def test_readers_never_see_nonsense_while_it_is_written(journal):
    begin(journal, Role.SOURCE)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            for number in range(3000):
                journal.mark(ID, Note.HANDED_OVER if number % 2 else Note.OFFERED)
        finally:
            os._exit(0)
    os.close(writer)
    seen = set()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        seen.add(journal.note(ID))
    os.close(reader)
    assert seen <= {Note.OFFERED, Note.HANDED_OVER}
