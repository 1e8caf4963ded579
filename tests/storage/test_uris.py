"""How media are written: paths as they are, URIs by their rules, and both ways."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmf.errors import ConfigError
from vmf.storage.uri import absolute, file_path, file_uri, scheme_of, split_options, with_option

KNOWN = ("lease", "format")
pieces = st.one_of(
    st.binary(min_size=1, max_size=8), st.sampled_from([b"?", b"&", b"=", b"%", b"#", b"+", b" ", b"/", b":", b"%2F"])
)
paths = st.lists(pieces, min_size=1, max_size=12).map(
    lambda raw: "/" + os.fsdecode(b"".join(raw).replace(b"\0", b"\1"))
)
values = st.one_of(paths, st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))


@given(path=paths, lease=values)
def test_any_path_and_option_come_back(path: str, lease: str) -> None:
    uri = file_uri(path, {"lease": lease})
    uri.encode("ascii")
    assert scheme_of(uri) == "file"
    assert absolute(uri) == uri
    assert file_path(uri) == path
    assert split_options(uri, KNOWN)[1] == {"lease": lease}
    more = with_option(uri, "format", "raw")
    assert (file_path(more), split_options(more, KNOWN)[1]) == (path, {"lease": lease, "format": "raw"})
    raw = with_option(path, "format", "raw")
    assert (file_path(raw), split_options(raw, KNOWN)[1]) == (path, {"format": "raw"})


@given(path=paths)
def test_a_plain_path_is_itself(path: str) -> None:
    assert file_path(path) == path
    medium = absolute(path)
    assert file_path(medium) == os.path.abspath(path)
    medium.encode()
    assert scheme_of(medium) == "file"


@given(text=st.text(max_size=60))
def test_whatever_is_written(text: str) -> None:
    """A path or URI that says the same when it is read again, or one refusal."""
    try:
        medium = absolute(text)
        assert absolute(medium) == medium
        if scheme_of(medium) == "file":
            assert os.path.isabs(file_path(medium))
            split_options(medium, KNOWN) if not os.path.isabs(medium) else None
    except ConfigError:
        pass


@pytest.mark.parametrize(
    ("written", "scheme"),
    [
        ("web.img", "file"), ("web:1.img", "file"), ("C:\\disk.img", "file"), ("c:disk.img", "file"),
        ("iscsi:x", "file"), ("./nbd:x", "file"), ("a/b:c", "file"), ("1nbd://x", "file"), ("~/x:y", "file"),
        ("nbd:x", "nbd"), ("NBD://h/x", "nbd"), ("nbd+unix:///x?socket=/s", "nbd+unix"), ("iscsi://h/x", "iscsi"),
        ("file:/x", "file"), ("FILE:/x", "file"),
    ],
)  # fmt: skip
def test_what_is_a_uri(written: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    medium = absolute(written)
    assert scheme_of(medium) == scheme
    assert os.path.isabs(medium) or medium.startswith(f"{scheme}:")
    (tmp_path / "nbd:").mkdir()  # what lies in the directory changes nothing
    assert absolute(written) == medium


@pytest.mark.parametrize(
    ("uri", "path", "options"),
    [
        ("file:/srv/a%20b%2Fc.img", "/srv/a b/c.img", {}),
        ("file:///srv/a#1+2.img", "/srv/a#1+2.img", {}),
        ("file://localhost/srv/x?lease=/l+1#2", "/srv/x", {"lease": "/l+1#2"}),
        ("file:/x%3Flease=/y", "/x?lease=/y", {}),
        ("file:/x?lease=/a%26b?c=d&format=raw", "/x", {"lease": "/a&b?c=d", "format": "raw"}),
        ("file:/%FF", "/\udcff", {}),
        ("file:/ä", "/ä", {}),
        ("file:/x?", "/x", {}),
    ],
)
def test_file_uris(uri: str, path: str, options: dict[str, str]) -> None:
    assert file_path(uri) == path
    assert split_options(uri, KNOWN)[1] == options


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("disks/srv/x.img", "no absolute path"), ("disk:/srv/x.img", "no absolute path"), ("x.img", "no absolute path"),
        ("file:relative", "no absolute path"), ("file:", "no absolute path"), ("file://host/x", "of the host host"),
        ("file:/x?leese=/y", "no option 'leese'"), ("file:/x?lease=/a&lease=/b", "twice"),
        ("file:/x?lease", "no value"),
        ("file:/x?lease=/a;format=raw&x", "no option 'x'"), ("file:/x?Lease=/a", "no option 'Lease'"),
        ("file:/100%", "stands for no character"), ("file:/x?lease=/%4", "stands for no character"),
        ("file:/a%00b", "stands for no character"), ("/a\0b", "NUL"), ("file:/a\nb", "control character"),
    ],
)  # fmt: skip
def test_refusals(uri: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        (file_path(uri), split_options(uri, KNOWN))
