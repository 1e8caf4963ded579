"""PCI and virtio devices for vmf."""
