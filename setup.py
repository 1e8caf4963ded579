"""`pip install .`: the core and every bundled plugin of this tree, each as the distribution it is."""

import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
MEMBERS = [HERE / "framework", *sorted(path.parent for path in HERE.glob("plugins/*/pyproject.toml"))]


def requirement(member: Path) -> str:
    name = tomllib.loads((member / "pyproject.toml").read_text())["project"]["name"]
    return f"{name} @ {member.as_uri()}"


setup(install_requires=[requirement(member) for member in MEMBERS])
