"""The C code compiled for other kinds of processors than this one, as far as this one can run it, computes the same."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from inference_worker.model.native import compiler, prebuilt
from inference_worker.model.native.compiler import CannotCompile, compile_library, find_compiler
from inference_worker.model.native.library import NativeLibrary
from inference_worker.model.native.prebuilt import Build
from inference_worker.model.native.scans import NativeScans
from tests.worker.model import test_native, test_native_awq, test_scans

_, AVX512, AVX2 = prebuilt._BUILDS


def library_of(build: Build, dtype: str, folder: Path, patch: pytest.MonkeyPatch) -> NativeLibrary:
    """Skips where it does not run, or no compiler knows the kind. Code that does not compile is a failure."""
    if not build.features <= prebuilt._features():
        pytest.skip(f"this processor is not of the kind {build.name}")
    try:
        command = find_compiler()
    except CannotCompile as reason:
        pytest.skip(str(reason))
    if subprocess.run([*command, *build.flags, "-fsyntax-only", "-xc", os.devnull]).returncode:
        pytest.skip(f"{command[0]} does not know {build.name}")
    quick = ["-O1" if flag == "-O3" else flag for flag in compiler._FLAGS]
    patch.setattr(compiler, "_FLAGS", quick)
    compile_library(command, dtype, build.flags, folder / "decoder.so")
    library = NativeLibrary(folder / "decoder.so")
    patch.setattr("inference_worker.model.native.decoder.load_library", lambda _dtype: library)
    return library


def test_avx2_in_full_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = library_of(AVX2, "float32", tmp_path, monkeypatch)
    test_native.test_greedy_equals_generate("qwen3, window in one layer")
    test_native.test_any_size_of_heads(80)
    for is_quantized in (False, True):
        test_native.test_a_token_is_computed_the_same_whatever_shares_its_step(
            torch.float32, is_quantized
        )
    test_native_awq.test_4_bit_weights_give_what_torch_makes_of_them(32, "Qwen2")
    test_native.test_what_is_no_number_stays_in_its_row(torch.float32)
    for vocabulary in (15, 700, 4109):
        test_scans.test_both_scans_find_the_same(vocabulary, NativeScans(library))
        test_scans.test_both_scans_draw_the_same_from_whole_rows(
            vocabulary, 1.0, NativeScans(library)
        )


@pytest.mark.parametrize("build", [AVX2, AVX512], ids=lambda build: build.name)
def test_half_precision_without_instructions_for_it(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library_of(build, "bfloat16", tmp_path, monkeypatch)
    test_native.test_half_precision_is_as_near_to_full_as_the_models_own("qwen3, query norms")
    test_native.test_a_token_is_computed_the_same_whatever_shares_its_step(torch.bfloat16, True)
    test_native.test_what_is_no_number_stays_in_its_row(torch.bfloat16)
