"""Imports with the garbage collector at rest."""

import gc
import importlib
import sys


def import_quickly(name: str) -> None:
    """Import a module and all that it imports. Raises what importing it raises.

    PyTorch and diffusers make a million objects that stay for good. Looking for garbage among them takes a
    quarter of the time that they take to import, and as much again at the end of the process: so nobody
    looks while they are made, and they are exempt from then on.
    """
    if name in sys.modules:
        return
    gc.disable()
    try:
        importlib.import_module(name)
    finally:
        gc.enable()
    gc.freeze()
