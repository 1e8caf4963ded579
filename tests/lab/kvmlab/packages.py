"""The Python packages that go into the lab: the project's own wheels and everything they need.

    deps     everything from outside, an ext4 image of a site directory; made again when a requirement changes
    wheel    for each distribution of the tree its wheel and what is in it, made again when one of its files changes

The wheels are made from a copy of each distribution: setuptools leaves a build/ directory beside the sources and
would put modules that have been deleted since into the next wheel. Installing happens here and not in the lab, where
every instruction is emulated.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvmlab import needs
from kvmlab.base import make_image
from kvmlab.cache import cached, digest, tree_digest

TREE = Path(__file__).resolve().parents[3]
"""The project's tree."""

RECIPE = 1
TEST_TOOLS = ("capstone", "hypothesis", "pytest", "pytest-timeout")
"""Which of the workspace's test requirements the lab needs; checkers of style and types stay here."""

GENERATED = ("__pycache__", "*.egg-info", "build", "dist", "*.so", "*.pyc", ".*")
GLIBC_MINORS = range(36, 16, -1)
"""Wheels for glibc 2.17 (manylinux2014) to 2.36 run on Debian 12 and newer (PEP 600)."""


def members() -> list[Path]:
    """The distributions of the tree: the core and every plugin."""
    return [TREE / "framework", *sorted(path.parent for path in TREE.glob("plugins/*/pyproject.toml"))]


def _project(member: Path) -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((member / "pyproject.toml").read_text())["project"]
    return project


def requirement_name(requirement: str) -> str:
    """The normalised distribution name in a requirement, e.g. "backports-zstd" in "backports.zstd>=1.0"."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", match[0]).lower() if match else ""


def requirements() -> list[str]:
    """What the tree's distributions need from outside, and the tools to test them."""
    own = {requirement_name(_project(member)["name"]) for member in members()}
    wanted = [requirement for member in members() for requirement in _project(member).get("dependencies", ())]
    workspace = _project(TREE)["optional-dependencies"]["test"]
    wanted += [requirement for requirement in workspace if requirement_name(requirement) in TEST_TOOLS]
    return sorted({requirement for requirement in wanted if requirement_name(requirement) not in own})


def _pip_install(target: Path, python: str, what: str, arguments: list[str]) -> None:
    """Install wheels into a directory for the lab's Python, which need not be the one that runs here."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC_MINORS] + ["linux_x86_64"]
    command: list[str | Path] = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--target", target, "--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    command += [f"--platform={name}" for name in platforms]
    if python != f"{sys.version_info.major}.{sys.version_info.minor}":
        command.append("--no-compile")
    needs.call([*command, *arguments], what=what)


def dependencies_image(python: str, *, fresh: bool = False) -> Path:
    """An ext4 image of a site directory with everything from outside."""
    wanted = requirements()

    def make(directory: Path) -> None:
        site = directory / "site"
        _pip_install(site, python, "fetch the packages that vmf needs", wanted)
        make_image(site, directory / "deps.img", "vmf-deps")
        shutil.rmtree(site)

    return cached("deps", digest(RECIPE, python, wanted), make, fresh=fresh) / "deps.img"


def _isolation() -> list[str]:
    """pip's option to build with the setuptools that is here: an isolated build fetches it, some seconds a wheel."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return []
    # 70.1 brought bdist_wheel along
    return ["--no-build-isolation"] if tuple(map(int, version.split(".")[:2])) >= (70, 1) else []


def _sources(member: Path) -> Iterator[tuple[str, Path]]:
    """The files that a wheel of this member is made from."""
    for path in member.rglob("*"):
        relative = path.relative_to(member)
        generated = any(Path(part).match(pattern) for part in relative.parts for pattern in GENERATED)
        if path.is_file() and not generated and relative.parts[0] != "tests":
            yield str(relative), path


def installed(member: Path, python: str) -> Path:
    """A site directory with one distribution of the tree, as its files stand now, installed from its wheel.

    `bin/vmf` in the core's runs with the lab's Python.
    """

    def make(directory: Path) -> None:
        copy, target = directory / "source", directory / "site"
        for name, path in _sources(member):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy / name)
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", *_isolation()]
        needs.call([*pip, "--no-deps", "--wheel-dir", directory, copy], what=f"build the wheel of {member.name}")
        shutil.rmtree(copy)
        wheels = [str(path) for path in directory.glob("*.whl")]
        _pip_install(target, python, f"install the wheel of {member.name}", ["--no-deps", "--no-index", *wheels])
        for script in target.glob("bin/*"):
            _, _, rest = script.read_text().partition("\n")
            script.write_text(f"#!/usr/bin/python3\n{rest}")

    key = f"{member.name}-{digest(RECIPE, python, sys.version_info[:2], tree_digest(_sources(member)))}"
    return cached("wheel", key, make) / "site"


def sites(python: str) -> list[Path]:
    """The site directories of all distributions of the tree; together they are /lab/site."""
    return [installed(member, python) for member in members()]
