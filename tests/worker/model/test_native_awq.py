"""Steps in C with weights of 4 bits, multiplied as they are packed."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref

import pytest
import torch

from inference_worker.model.awq import AwqLinear
from inference_worker.model.native.matrix import arrange
from tests.worker.model.driver import new_runner, prompt_of
from tests.worker.model.native_models import QUANTIZABLE, logits_of, native_runner, quantize
from tests.worker.model.test_decoder import randomise_vectors
from tests.worker.model.tiny_models import build_from, config

pytestmark = pytest.mark.usefixtures("native_library")


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_4_bit_weights_give_what_torch_makes_of_them(group_size: int, family: str) -> None:
    """In float32 both compute with the very same weights; outputs are no whole number of tiles."""
    sizes = {"hidden_size": group_size + 128, "intermediate_size": 384, "head_dim": 32}
    model = randomise_vectors(build_from(config(family, **sizes)))
    quantize(model, group_size)
    prompts = [prompt_of(length) for length in (1, 2, 3, 50, 61)]
    expected = logits_of(new_runner(model), prompts)
    for found, wanted in zip(logits_of(native_runner(model), prompts), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


def test_4_bit_weights_in_half_precision_are_as_near_to_full() -> None:
    model = randomise_vectors(build_from(config("Qwen2", **QUANTIZABLE)))
    half = copy.deepcopy(model).bfloat16()
    ids = [prompt_of(34)]
    for each in (model, half):
        quantize(each, group_size=64)
    exact, own, found = (
        logits_of(runner, ids)[0].float()
        for runner in (new_runner(model), new_runner(half), native_runner(half))
    )
    assert float((found - exact).norm()) < 1.2 * float((own - exact).norm())


def test_each_code_is_where_c_reads_it() -> None:
    codes = torch.randint(16, (32, 40), dtype=torch.uint8)
    words = arrange(codes)
    assert words.shape == (2, 5, 16)
    for output, place in itertools.product(range(32), range(40)):
        word = int(words[output // 16, place // 8, output % 16])
        shift = place % 8 // 2 * 4 + place % 2 * 16
        assert word >> shift & 15 == int(codes[output, place])


def test_4_bit_weights_are_not_kept_twice() -> None:
    model = build_from(config("Llama", **QUANTIZABLE))
    quantize(model, group_size=64)
    in_torch = [weakref.ref(m) for m in model.modules() if isinstance(m, AwqLinear)]
    runner = native_runner(model)
    del model
    gc.collect()
    assert {reference() for reference in in_torch} == {None}
    assert len(logits_of(runner, [[1, 2, 3]])[0]) == 3
