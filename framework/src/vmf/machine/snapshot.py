"""Snapshots of one machine: what it was at one moment, to go back to.

A snapshot is a directory with a description (`snapshot.json`), a copy of every writable disk (`disk-PORT.img`), and, of
a machine that had not been switched off, its state: vCPU, clock and devices (`state.cbor`) and RAM (`ram.img`, a sparse
file of the flat mapping). It is made under another name and renamed when everything in it is durable, so there are
whole snapshots only.

The guest stands still while one is taken, and does not notice: its time stands still, too. Disks are copied by
sharing blocks where the file system can (btrfs, XFS), which takes no time; elsewhere the copy takes as long as the disk
is full.

Going back is for a machine that is switched off. The disks are put back at once. A state with RAM is only noted
(`resume.json`), and the next start goes on from it, exactly once. Between the two nothing may write to the disks, so
the note names the lease's generation of each: a start that finds another one refuses.
"""

from __future__ import annotations

from vmf.machine.operations import ProgressListener
from vmf.machine.snapshot_restore import restore, resume
from vmf.machine.snapshot_store import SnapshotInfo, SnapshotStore
from vmf.machine.snapshot_take import take, take_stopped

__all__ = ["ProgressListener", "SnapshotInfo", "SnapshotStore", "restore", "resume", "take", "take_stopped"]
