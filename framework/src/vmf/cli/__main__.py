"""`python -m vmf.cli` is the `vmf` command, where no script directory is on the path."""

from vmf.cli import main

main()
