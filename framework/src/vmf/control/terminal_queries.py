"""Takes out of old terminal output what a terminal would answer.

A guest asks its terminal questions: where is the cursor, what are you, which colour is the background. Whoever
attaches later and sees the old output must not answer again: the answer would be typed at the guest. Sources: ECMA-48,
xterm's ctlseqs, the kitty keyboard protocol.
"""

from __future__ import annotations

import re

_CSI = rb"(?:\x1b\[|\xc2\x9b|(?<![\x80-\xff])\x9b)"
_STRING = rb"[^\x07\x1b\x9c]*"
_END = rb"(?:\x07|\x1b\\|\x9c)"

_QUERIES = re.compile(
    rb"|".join(
        (
            rb"\x05",  # ENQ: the answerback message
            rb"\x1bZ",  # DECID
            _CSI + rb"[?>=]?[0-9;:]*[cn]",  # DA1, DA2, DA3; DSR: status, cursor position and others
            _CSI + rb"\??[0-9;]*\$p",  # DECRQM: is this mode set
            _CSI + rb"[0-9;]*\$u",  # DECRQTSR
            _CSI + rb"[0-9;]*&u",  # DECRQUPSS
            _CSI + rb"[0-9;]*\$w",  # DECRQPSR
            _CSI + rb"[0-9;]*\*y",  # DECRQCRA: checksum of a rectangle
            _CSI + rb"[0-9;]*\+x",  # DECRQPKFM
            _CSI + rb">[0-9]*q",  # XTVERSION
            _CSI + rb"[0-9]*x",  # DECREQTPARM
            _CSI + rb"\?[0-9;]*u",  # kitty: keyboard flags
            _CSI + rb"\?[0-9]+m",  # XTQMODKEYS
            _CSI + rb"\?[0-9;]*S",  # XTSMGRAPHICS
            _CSI + rb"(?:1[1-9]|2[01])(?:;[0-9;]*)?t",  # window and screen sizes, position, title
            rb"\x1bP[$+]q" + _STRING + _END,  # DECRQSS, XTGETTCAP
            rb"\x1b\][0-9]+;(?:[^\x07\x1b\x9c]*;)?\?(?:;" + _STRING + rb")?" + _END,  # OSC: colours, clipboard, font
            rb"\x1b_G" + _STRING + _END,  # kitty: graphics, which are answered
        )
    )
)


def without_queries(output: bytes) -> bytes:
    """`output` without the sequences that make a terminal send something."""
    return _QUERIES.sub(b"", output)
