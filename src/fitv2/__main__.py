"""`python -m fitv2`, the same as the command `fitv2`."""

from fitv2.cli.commands import main

main()
