"""The PC devices."""
