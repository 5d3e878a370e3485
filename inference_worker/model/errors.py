"""Why a model cannot be loaded. Each message is one line for the person who starts the worker."""

from __future__ import annotations


class LoadError(Exception):
    """The model cannot be loaded."""


class ModelNotFound(LoadError):
    """There is no checkpoint under the given name."""


class UnsupportedModel(LoadError):
    """The checkpoint is of a kind that would not be served correctly."""
