"""`vmf list plugins`: what is installed and whether it works here, found out without importing any of it here.

Whether a plugin works can only be told by importing it, and importing it may hang, crash or end the process. So each
is tried in a short-lived child process of its own (a session of its own too, so that what it started dies with it),
a few at a time and each within a time limit; the child answers with one line of JSON on a pipe. The parent believes
nothing else of the child.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from attrs import evolve, frozen

from vmf.errors import PluginError
from vmf.plugins import discovery
from vmf.plugins.discovery import PluginEntry

PROBE_SECONDS = 20.0
"""Time limit of one probe; importing a large engine on a busy machine takes a few seconds."""
_ANSWER_LIMIT = 64 * 1024


@frozen
class PluginRecord:
    """One line of `vmf list plugins`.

    Attributes:
        usable: whether it works here.
        detail: when usable, what the plugin says of itself (an engine's version), or "".
        reason, remedy: why it does not work and what to do; "" when usable.
    """

    kind: str
    name: str
    version: str
    distribution: str
    usable: bool
    detail: str = ""
    reason: str = ""
    remedy: str = ""


def list_plugins(probe_seconds: float = PROBE_SECONDS) -> list[PluginRecord]:
    """Every installed plugin with its usability; imports none of them in this process and never raises for one."""
    entries = discovery.installed()
    count = Counter((entry.kind, entry.name) for entry in entries)
    workers = max(2, min(4, os.cpu_count() or 2))

    def record(entry: PluginEntry) -> PluginRecord:
        base = PluginRecord(entry.kind, entry.name, entry.version, entry.distribution, usable=False)
        if count[entry.kind, entry.name] > 1:
            error = discovery.conflict([each for each in entries if (each.kind, each.name) == (entry.kind, entry.name)])
            return evolve(base, reason=error.message, remedy=error.remedy)
        return _probed(base, entry, probe_seconds)

    with ThreadPoolExecutor(workers, thread_name_prefix="vmf-probe") as pool:
        return list(pool.map(record, entries))


def _probed(base: PluginRecord, entry: PluginEntry, seconds: float) -> PluginRecord:
    remedy = f"Update or uninstall {entry.distribution or 'the distribution that provides it'}."
    reader, writer = os.pipe()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "vmf.plugins.listing", entry.kind, entry.name, str(writer)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(writer,),
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        os.close(reader)
        os.close(writer)
        return evolve(base, reason=f"It could not be tried: {error.strerror or error}.", remedy="Try again.")
    os.close(writer)
    try:
        answer = _read_line(reader, time.monotonic() + seconds)
    finally:
        os.close(reader)
        finished = _end(child, grace=1.0 if answer else 0.0)
    if answer is None:
        if finished is None:
            return evolve(base, reason=f"It did not load within {seconds:g} seconds.", remedy=remedy)
        how = f"signal {signal.Signals(-finished).name}" if finished < 0 else f"exit status {finished}"
        return evolve(base, reason=f"Loading it ended the process ({how}).", remedy=remedy)
    try:
        fields = json.loads(answer)
        usable = bool(fields["usable"])
        texts = {key: str(fields[key]) for key in ("detail", "reason", "remedy")}
    except (ValueError, KeyError, TypeError):
        return evolve(base, reason="It disturbed the answer of the process that tried it.", remedy=remedy)
    return evolve(base, usable=usable, **texts)


def _read_line(descriptor: int, deadline: float) -> bytes | None:
    """One line, or None at the end of file, past the deadline or beyond the size limit."""
    collected = b""
    while b"\n" not in collected:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not select.select([descriptor], [], [], remaining)[0]:
            return None
        piece = os.read(descriptor, 4096)
        collected += piece
        if not piece or len(collected) > _ANSWER_LIMIT:
            return None
    return collected.split(b"\n", 1)[0]


def _end(child: subprocess.Popen[bytes], grace: float) -> int | None:
    """End the child and all it started; its exit status, or None when it had to be killed."""
    # Even without grace: a child whose pipe just closed is dying, but may not be dead yet.
    descriptor = os.pidfd_open(child.pid)
    try:
        ended = bool(select.select([descriptor], [], [], max(grace, 0.5))[0])
    finally:
        os.close(descriptor)
    # The child is not reaped yet, so the number of its process group still belongs to it and its descendants.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    status = child.wait()
    return status if ended else None


def _probe(kind: str, name: str) -> dict[str, object]:
    """In the child: load and check the plugin, and ask it about this host where its kind can tell."""
    from vmf.plugins.bridge import PluginRegistry

    registry = PluginRegistry(on_problem=lambda problem: None)
    try:
        detail = ""
        if kind == "cpu":
            here = registry.cpu_backend(name).availability()
            if not here.usable:
                return {"usable": False, "detail": "", "reason": here.reason, "remedy": here.remedy}
            detail = here.version
        elif kind == "transport":
            registry.transport(name)
        elif kind == "storage":
            registry.storage(name)
        else:
            registry.load(kind, name)
        return {"usable": True, "detail": detail, "reason": "", "remedy": ""}
    except PluginError as error:
        return {"usable": False, "detail": "", "reason": error.message, "remedy": error.remedy}
    except Exception as error:  # noqa: BLE001 - the answer is what became of the plugin, whatever it was
        return {"usable": False, "detail": "", "reason": f"It failed: {discovery.describe(error)}.", "remedy": ""}


def _main() -> None:
    kind, name, descriptor = sys.argv[1:4]
    os.set_inheritable(int(descriptor), False)
    answer = json.dumps(_probe(kind, name)) + "\n"
    os.write(int(descriptor), answer.encode()[-_ANSWER_LIMIT:])
    # Not sys.exit: threads and exit handlers of the plugin must not keep the process alive.
    os._exit(0)


if __name__ == "__main__":
    _main()
