"""Kernels run by triton's interpreter where no NVIDIA driver is.

Triton reads the variable once, when it is first imported, which transformers does: so it is set before any test module.
"""

from __future__ import annotations

import os
from pathlib import Path

if not Path("/proc/driver/nvidia").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
