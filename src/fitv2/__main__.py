"""The command `fitv2`, also as `python -m fitv2`."""

from fitv2.runtime.signals import leave_on_signals


def main() -> None:
    """The entry point. Signals are heeded before anything is imported that takes time."""
    leave_on_signals()
    from fitv2.cli.commands import main

    main()


if __name__ == "__main__":
    main()
