#!/usr/bin/env python3
"""The project's commands for a fresh clone. Needs Python 3.11 or newer and nothing else.

    python3 dev.py demo          show a running guest teleport between two vmf processes
    python3 dev.py test          check everything: style, types, import contracts, tests
    python3 dev.py install       only make the environment (.venv) that the other two use

They make a virtual environment in .venv (or in $VMF_VENV) and install the tree into it in editable form.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent


def say(text: str) -> None:
    print(f"dev.py: {text}", file=sys.stderr, flush=True)


def members() -> list[Path]:
    return [HERE / "framework", *sorted(path.parent for path in HERE.glob("plugins/*/pyproject.toml"))]


def environment(*, test: bool) -> Path:
    """The environment's Python, with the tree installed as its files stand now."""
    import tomllib

    home = Path(os.environ.get("VMF_VENV", HERE / ".venv"))
    python = home / "bin" / "python"
    if not python.exists():
        say(f"making a virtual environment in {home}")
        try:
            venv.create(home, with_pip=True, symlinks=True)
        except (subprocess.CalledProcessError, OSError) as error:
            sys.exit(f"dev.py: cannot make a virtual environment: {error}. On Debian: apt install python3-venv.")
    workspace = tomllib.loads((HERE / "pyproject.toml").read_text())
    wanted = workspace["project"]["optional-dependencies"]["test"] if test else []
    sources = [path for member in members() for path in (member / "pyproject.toml", *member.glob("setup.py"))]
    sources += [path for member in members() for path in sorted(member.glob("src/**/*.[ch]"))]
    digest = hashlib.sha256(repr(wanted).encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()
    stamp = home / f"vmf-{'test' if test else 'run'}.stamp"
    if not stamp.exists() or stamp.read_text() != digest:
        say("installing vmf and its plugins")
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for member in members():
            command += ["--editable", str(member)]
        if subprocess.run([*command, *wanted]).returncode:
            sys.exit("dev.py: pip could not install vmf; what it printed above says why.")
        stamp.write_text(digest)
    return python


def demo(arguments: list[str]) -> int:
    python = environment(test=False)
    return subprocess.run([str(python), "-m", "vmf.cli", "demo", *arguments]).returncode


def test(arguments: list[str]) -> int:
    """Everything that CI checks; arguments go to pytest, and then only pytest runs."""
    python = str(environment(test=True))
    scripts = Path(python).parent
    checks = [
        ("style", [str(scripts / "ruff"), "check", "."]),
        ("types", [python, "-m", "mypy"]),
        ("import contracts", [str(scripts / "lint-imports")]),
    ]
    failed = []
    for name, command in [] if arguments else checks:
        say(f"checking {name}")
        if subprocess.run(command, cwd=HERE).returncode:
            failed.append(name)
    say("running the tests")
    # A file at a time on each of a few processes: most tests wait for a guest or a clock, not for a processor.
    spread = [] if arguments else ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"]
    if subprocess.run([python, "-m", "pytest", *spread, *arguments], cwd=HERE).returncode:
        failed.append("tests")
    if failed:
        say(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


def main() -> int:
    commands = {"demo": demo, "test": test}
    if len(sys.argv) > 1 and sys.argv[1] == "install":
        environment(test=True)
        return 0
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        print(__doc__)
        return 2
    return commands[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
