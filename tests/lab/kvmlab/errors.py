"""What can go wrong with the lab itself; what goes wrong in it is a result."""

from __future__ import annotations

from vmf.errors import VmfError


class LabError(VmfError):
    """The lab could not be built or did not come up."""

    code = "lab"


class LabHung(LabError):
    """The emulated computer stood still, its own timer too: that says nothing about what ran in it."""

    code = "lab-hung"


class LabUnavailable(LabError):
    """This machine lacks something that the lab needs; the message names everything at once."""

    code = "lab-unavailable"
