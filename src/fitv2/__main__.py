"""`python -m fitv2`, the same as the command `fitv2`."""

from fitv2.cli import main

main()
