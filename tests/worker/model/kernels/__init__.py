"""The kernels, against torch's own operations."""

import pytest

pytest.importorskip("triton", reason="triton is not installed, so the kernels are not tested")
