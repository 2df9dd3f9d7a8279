"""`python -m saeflow` is the command `saeflow`."""

from saeflow.cli import main

main()
