"""How a medium is written: an absolute path, or `scheme:...`, with options behind a question mark.

A path is taken as it is, whatever stands in it. In a URI `%` begins two hexadecimal digits, `?` the options, and `&`
parts them; every other character, `+` and `#` too, stands for itself. There are no fragments and no form encoding:
`web#1` and `web+1` are names that people give to exports and files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import quote, unquote

from vmf import directories
from vmf.errors import ConfigError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
"""Two characters at least: `C:` is none."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PLAIN = "/:@!$'()*+,;=~#"
"""What `quote` leaves alone in a path; in an option's value, too, as `&` is not among them."""


def scheme_of(medium: str) -> str:
    """The storage plugin that a medium of a definition needs: "file" for a path."""
    found = _SCHEME.match(medium)
    return found[1].lower() if found is not None else "file"


def absolute(medium: str) -> str:
    """What a person wrote, as a definition has it: paths become absolute, URIs stay.

    A URI is what begins with the scheme of an installed storage plugin, or with `scheme://`. All else is a path:
    `web:1.img` is a file. A path that no text can hold (it is not UTF-8, or has control characters) becomes a URI.
    Raises ConfigError for what cannot be one.
    """
    if not medium or "\0" in medium:
        raise ConfigError(f"{medium!r} is no medium: nothing has such a name.", "Write a path or a URI.")
    found = _SCHEME.match(medium)
    if found is not None and (medium.startswith("//", found.end()) or _is_installed(found[1].lower())):
        return found[1].lower() + medium[found.end(1) :]
    path = str(directories.absolute(medium))
    return path if _is_text(path) and not _CONTROL.search(path) else file_uri(path)


def _is_installed(scheme: str) -> bool:
    from vmf.plugins import discovery

    return any(entry.name == scheme for entry in discovery.installed("storage"))


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def file_uri(path: str, options: Mapping[str, str] | None = None) -> str:
    """The `file:` URI of an absolute path."""
    start = "file://" if path.startswith("//") else "file:"  # else its first part would be a host
    return start + _escape(path) + format_options(options or {})


def format_options(options: Mapping[str, str]) -> str:
    """What `split_options` takes apart, with its question mark; "" for none."""
    return "?" + "&".join(f"{_escape(key)}={_escape(value)}" for key, value in options.items()) if options else ""


def with_option(medium: str, key: str, value: str) -> str:
    """The same medium with one option more, as a URI."""
    if os.path.isabs(medium):
        return file_uri(medium, {key: value})
    return medium + format_options({key: value}).replace("?", "&" if "?" in medium else "?", 1)


def _escape(text: str) -> str:
    return quote(os.fsencode(text), safe=_PLAIN)


def file_path(medium: str) -> str:
    """The absolute path that a path or a `file:` URI names. Raises ConfigError."""
    if os.path.isabs(medium):
        if "\0" in medium:
            raise ConfigError(f"medium {medium!r}: no path has a NUL in it.", "Write the path of the image.")
        return medium
    scheme, colon, rest = medium.partition("?")[0].partition(":")
    if not colon or scheme.lower() != "file":
        raise ConfigError(f"medium {medium!r} is no absolute path.", "Write the whole path, or file:/the/whole/path.")
    if rest.startswith("//"):
        host, slash, rest = rest[2:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise ConfigError(
                f"medium {medium}: a file of the host {host} cannot be reached by a file: URI.",
                "Mount its storage here, and write file:/the/whole/path (one slash).",
            )
        rest = slash + rest
    path = decode(medium, rest)
    if not os.path.isabs(path):
        raise ConfigError(
            f"medium {medium}: {path or 'it'} is no absolute path.",
            f"Write file:/the/whole/path; a file whose name begins with 'file:' is ./{medium}.",
        )
    return path


def split_options(uri: str, known: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """The part before the question mark, as it is, and the options behind it, decoded.

    Raises ConfigError for options that are not known, that have no value, or that come twice.
    """
    if _CONTROL.search(uri):
        raise ConfigError(f"medium {uri!r}: it has a control character.", "Write such characters as %0A.")
    base, _, query = uri.partition("?")
    options: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, _, text = part.partition("=")
        key, value = decode(uri, name), decode(uri, text)
        if key not in known:
            raise ConfigError(
                f"medium {uri}: there is no option {key!r}.",
                f"Known are {', '.join(known)}. A ? or & that belongs to a name is written %3F or %26.",
            )
        if key in options:
            raise ConfigError(f"medium {uri}: the option {key} is there twice.", "Leave one of them out.")
        if not value:
            raise ConfigError(f"medium {uri}: the option {key} has no value.", f"Write {key}=VALUE, or leave it out.")
        options[key] = value
    return base, options


def decode(uri: str, text: str) -> str:
    """A part of a URI without its percent-encoding; bytes that are not UTF-8 as `os.fsdecode` has them.

    Raises ConfigError.
    """
    wrong = re.search(r"%(?![0-9A-Fa-f]{2}).{0,2}|%00", text)
    if wrong is not None:
        raise ConfigError(
            f"medium {uri}: {wrong[0]} stands for no character.",
            "Write a percent sign as %25, or, for a file, its plain path.",
        )
    return unquote(text, errors="surrogateescape")
