"""Which Sluice this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def version_of_sluice() -> str:
    """The installed version; 0 where none is installed."""
    try:
        return version("sluice")
    except PackageNotFoundError:  # run from a source tree
        return "0"
