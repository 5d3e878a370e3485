"""Every kernel compiles, which the interpreter does not show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {
    "_normalise",
    "_silu_mul",
    "_rope_and_write",
    "_attend",
    "_join",
    "_gemv",
    "_sum",
    "_dequantize",
}
# Shared memory that a program may have, in bytes, by compute capability (CUDA C++ programming guide, table of
# technical specifications).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
TARGETS = ["bfloat16:80", "bfloat16:90", "float16:90"]


@pytest.mark.slow
def test_kernels_compile_to_machine_code(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.worker.model.kernels.compilation", *TARGETS],
        capture_output=True,
        text=True,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[4],
    )
    assert result.returncode == 0, result.stderr
    compiled = [json.loads(line) for line in result.stdout.splitlines()]
    for target in TARGETS:
        _dtype, capability = target.split(":")
        lines = [line for line in compiled if line["target"] == target]
        assert {line["kernel"] for line in lines} == KERNELS
        for line in lines:
            assert line["bytes"] > 0
            assert line["shared"] <= SHARED_MEMORY[int(capability)]
            multiplies = line["kernel"] in {"_attend", "_gemv"}
            assert line["uses_tensor_cores"] == multiplies, line
