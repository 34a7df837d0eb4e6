"""The command `fitv2`, also as `python -m fitv2`."""

from fitv2.runtime.signals import leave_on_signals
from fitv2.runtime.threads import choose_waiting


def main() -> None:
    """The entry point. Signals are heeded, and how threads wait is chosen, before anything is imported."""
    leave_on_signals()
    choose_waiting()
    from fitv2.cli.commands import main

    main()


if __name__ == "__main__":
    main()
