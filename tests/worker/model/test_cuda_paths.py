"""The code that a GPU alone can run is listed, in the documentation of `kernels`."""

from __future__ import annotations

import re
from pathlib import Path

from inference_worker.model import kernels

WORKER = Path(kernels.__file__).parents[2]
CUDA_ONLY = re.compile(r'torch\.cuda|\bis_cuda\b|\.type [!=]= "cuda"')


def test_every_module_that_knows_cuda_is_listed_and_no_other() -> None:
    documentation = kernels.__doc__ or ""
    items = re.findall(r"^- (.+?): ", documentation, re.MULTILINE)
    listed = {name for item in items for name in re.findall(r"`(\w+)[\w.]*`", item)}
    found = {
        path.parent.name if path.stem == "__init__" else path.stem
        for path in WORKER.rglob("*.py")
        if CUDA_ONLY.search(path.read_text())
    }
    assert listed == found
