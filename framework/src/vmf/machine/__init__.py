"""The machine: configuration, life cycle, guest memory, bus, clock and timers, boot."""
