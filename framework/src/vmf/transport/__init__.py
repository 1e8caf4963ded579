"""The transport seam: reliable byte channels between two hosts. It knows nothing of frames."""

from vmf.transport.base import Address, Buffer, Channel, Listener, Transport

__all__ = ["Address", "Buffer", "Channel", "Listener", "Transport"]
