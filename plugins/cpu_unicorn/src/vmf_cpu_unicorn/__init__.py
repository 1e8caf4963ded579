"""The Unicorn CPU backend."""
