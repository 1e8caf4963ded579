"""The KVM lab: a Debian host on an emulated AMD processor, with a real /dev/kvm inside. See tests/lab/README.md.

`Lab.build().run(["ls", "-l", "/dev/kvm"], timeout=60)` gives a `LabResult`: status, output and files.
"""

from kvmlab.errors import LabError, LabHung, LabUnavailable
from kvmlab.lab import Lab, LabResult, missing

__all__ = ["Lab", "LabError", "LabHung", "LabResult", "LabUnavailable", "missing"]
