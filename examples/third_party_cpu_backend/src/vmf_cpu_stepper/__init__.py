"""A third party's CPU backend for vmf, as small as one can be. See docs/how-to/write-a-cpu-backend.md."""
