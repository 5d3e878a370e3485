"""Kernels of the CUDA path, in Triton.

Import a module of this package only where `is_available()`: each imports triton, which is not needed
and may be missing where there is no CUDA.
"""

from __future__ import annotations

import importlib.util

import torch


def is_available() -> bool:
    """Whether kernels can run here: a CUDA device and an installed triton."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
