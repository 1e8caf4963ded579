"""`python -m vmf.cli`: the `vmf` command."""

from vmf.cli import main

main()
