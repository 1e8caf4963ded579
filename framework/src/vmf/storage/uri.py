"""How a medium is written: an absolute path, or `scheme:...`, with options behind a question mark."""

from __future__ import annotations

import os
import re
from urllib.parse import parse_qsl

from vmf import directories
from vmf.errors import ConfigError

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):")


def scheme_of(medium: str) -> str:
    """The storage plugin that a medium needs: "file" for a path."""
    found = _SCHEME.match(medium)
    return found[1] if found is not None and not os.path.isabs(medium) else "file"


def absolute(medium: str) -> str:
    """What a person wrote, as a definition has it: paths become absolute, URIs stay."""
    if _SCHEME.match(medium) and not os.path.exists(medium):
        return medium
    return str(directories.absolute(medium))


def split_options(uri: str, known: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """The part before the question mark, and the options behind it. Raises ConfigError for unknown ones."""
    base, _, query = uri.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key in options:
        if key not in known:
            raise ConfigError(f"medium {uri}: there is no option {key!r}.", f"Known are {', '.join(known)}.")
    return base, options
