"""Plugins made for a test: a distribution is a directory with metadata, no installation needed."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MakePlugin = Callable[..., None]


@pytest.fixture
def make_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakePlugin]:
    """`make_plugin(kind, name, code, distribution=..., version=...)` installs a plugin for this test."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)
    count = 0

    def make(kind: str, name: str, code: str, *, distribution: str = "", version: str = "1.0") -> None:
        nonlocal count
        count += 1
        from vmf.plugins import GROUPS

        distribution = distribution or f"dist-{count}"
        module = f"made_for_test_{count}"
        (site / f"{module}.py").write_text(textwrap.dedent(code))
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        with (info / "entry_points.txt").open("a") as file:
            file.write(f"[{GROUPS[kind]}]\n{name} = {module}\n")

    yield make
    for module in set(sys.modules) - before:
        if module.startswith("made_for_test_"):
            del sys.modules[module]
