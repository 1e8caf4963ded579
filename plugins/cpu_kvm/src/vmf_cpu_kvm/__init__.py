"""CPU backend of vmf: KVM."""
