"""Writes the generated parts of docs/reference/protocol.md and others: `python -m vmf.teleport.document FILE...`.

A part lies between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from vmf.teleport.protocol import handover, states

PARTS = {
    "diagram": lambda: f"```mermaid\n{states.render_mermaid()}\n```",
    "table": states.render_table,
    "limits": states.render_limits,
    "custody": handover.render_custody,
    "outcomes": handover.render_outcomes,
}


def regenerate(text: str) -> str:
    """The document with all its generated parts made anew. Raises KeyError for a part of another name."""

    def part(match: re.Match[str]) -> str:
        return f"<!-- generated: {match[1]} -->\n{PARTS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- generated: (\w+) -->\n.*?<!-- end -->", part, text, flags=re.DOTALL)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(regenerate(path.read_text()))
