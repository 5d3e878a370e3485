"""Where the kernels run: compiled on a CUDA device where there is one, elsewhere by triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from triton import knobs

from tests.worker.model.kernels import bfloat16


def _device() -> torch.device:
    if knobs.runtime.interpret:
        bfloat16.teach_interpreter()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip(
            "there is a CUDA driver, but torch has no CUDA: set TRITON_INTERPRET=1 to test the kernels",
            allow_module_level=True,
        )
    return torch.device("cuda")


DEVICE = _device()
