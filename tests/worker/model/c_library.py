"""The library of the C code, for the tests that run it."""

from __future__ import annotations

import pytest

from inference_worker.model.native.compiler import CannotCompile, find_compiler
from inference_worker.model.native.library import NativeLibrary, NotSuited, load_library


def c_library() -> NativeLibrary:
    """Skips where there is no C compiler, or not the processor. Code that does not compile is a failure."""
    try:
        return load_library("float32")
    except NotSuited as reason:
        pytest.skip(str(reason))
    except CannotCompile:
        try:
            find_compiler()
        except CannotCompile as reason:
            pytest.skip(str(reason))
        raise
