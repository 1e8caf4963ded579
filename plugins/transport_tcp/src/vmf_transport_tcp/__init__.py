"""Plain TCP channels."""
