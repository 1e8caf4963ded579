#!/usr/bin/env python3
"""The KVM lab's command line.

    python tests/lab/lab.py doctor                            what is missing here
    python tests/lab/lab.py build [--fresh]                   make the images (about two minutes, once)
    python tests/lab/lab.py run -- ls -l /dev/kvm             run a command in the lab
    python tests/lab/lab.py pytest -- plugins/cpu_kvm/tests   run tests in the lab

Exit status: that of the command, 124 when its time was over, 125 when the lab itself failed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kvmlab import Lab, missing
from kvmlab.lab import pytest_command
from kvmlab.qemu import CPU
from vmf.errors import VmfError

LAB_FAILED = 125


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupted)  # so that QEMU is ended and temporary files are removed
    try:
        return _act(options)
    except VmfError as error:
        print(f"lab.py: {error}", file=sys.stderr)
        return LAB_FAILED


def _act(options: argparse.Namespace) -> int:
    if options.action == "doctor":
        lacks = missing()
        print("\n".join(f"missing: {line}" for line in lacks) or "nothing is missing")
        return 1 if lacks else 0
    began = time.monotonic()
    lab = Lab.build(fresh=getattr(options, "fresh", False))
    if options.action == "build":
        print(
            f"lab: ready after {time.monotonic() - began:.1f} s: {lab.base.kernel}, Python {lab.base.python},"
            f" time {lab.clock.factor} times slower than outside"
        )
        return 0

    def echo(stream: str, data: bytes) -> None:
        if stream == "stdout":
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        elif stream == "stderr" or options.console:
            sys.stderr.buffer.write(data)
            sys.stderr.buffer.flush()

    command = pytest_command(options.command) if options.action == "pytest" else options.command
    copies = [copy.partition(":") for copy in options.copy]
    result = lab.run(
        command,
        timeout=options.timeout,
        directory=options.results,
        files={place or Path(source).name: Path(source) for source, _, place in copies},
        environment=dict(pair.split("=", 1) for pair in options.env),
        memory_mib=options.memory,
        processors=options.smp,
        cpu=options.cpu,
        echo=echo,
    )
    over = ", its time was over" if result.timed_out else ""
    print(
        f"lab: status {result.status}{over}; boot {result.boot_seconds:.1f} s, "
        f"command {result.command_seconds:.1f} s, all {result.total_seconds:.1f} s; results in {result.directory}",
        file=sys.stderr,
    )
    return result.status


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("doctor", help="say what is missing here")
    build = actions.add_parser("build", help="make the images that are not in the cache")
    build.add_argument("--fresh", action="store_true", help="make them anew from the archive's newest packages")
    for name, help_ in (("run", "run a command in the lab"), ("pytest", "run pytest in the lab")):
        action = actions.add_parser(name, help=help_)
        action.add_argument("--timeout", type=float, default=300.0, metavar="S", help="seconds for the command (300)")
        action.add_argument("--results", type=Path, metavar="DIR", help="empty directory for what comes back")
        action.add_argument(
            "--copy", action="append", default=[], metavar="SOURCE[:PLACE]", help="take it along, to /lab/PLACE"
        )
        action.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="set for the command")
        action.add_argument("--memory", type=int, default=2048, metavar="MIB", help="of the lab's machine (2048)")
        action.add_argument("--smp", type=int, default=2, metavar="N", help="processors of the lab's machine (2)")
        action.add_argument("--cpu", default=CPU, help=f"of the lab's machine, as QEMU has it ({CPU})")
        action.add_argument("--console", action="store_true", help="show the lab's kernel console, too")
        action.add_argument("command", nargs="+", metavar="-- COMMAND")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
