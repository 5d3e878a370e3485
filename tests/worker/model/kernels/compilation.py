"""Compiles every kernel, as its public function launches it, to machine code: no GPU is needed for that.

Run as a program, outside triton's interpreter, it prints a line of JSON for each kernel and architecture.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from inference_worker.model.kernels.paged_attention import decode_attention
from inference_worker.model.kernels.rms_norm import add_rms_norm, rms_norm
from inference_worker.model.kernels.rope_kv import rope_and_write
from inference_worker.model.kernels.silu_mul import silu_mul
from inference_worker.model.kernels.w4a16 import w4a16_dequantize, w4a16_gemv

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def _launches(dtype: torch.dtype) -> list[Callable[[], object]]:
    """Calls in the shape of an 8B Llama's layer, and of what else changes a kernel's code."""

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    rows, hidden, heads, kv_heads, dim = 4, 4096, 32, 8, 128
    x, weight, norm = new(rows, hidden), new(hidden), new(dim)
    keys, values = new(3, 16, kv_heads, dim), new(3, 16, kv_heads, dim)
    tokens = torch.empty(rows, dtype=torch.int64)
    angles = new(10, dim // 2)
    rope = (new(rows, 48 * dim), tokens, tokens, angles, angles, keys, values)
    table = torch.empty(rows, 128, dtype=torch.int32)
    paged = (new(rows, heads, dim), keys, values, table, table[:, 0].contiguous())
    words = torch.empty(hidden, 128, dtype=torch.int32)
    zeros = torch.empty(32, 128, dtype=torch.int32)
    awq = (words, new(32, 1024, dtype=torch.float16), zeros, 128)
    return [
        lambda: rms_norm(x, weight, 1e-5),
        lambda: add_rms_norm(x, x, weight, 1e-5),
        lambda: silu_mul(x),
        lambda: rope_and_write(*rope),
        lambda: rope_and_write(*rope, query_norm=norm, key_norm=norm, epsilon=1e-6),
        lambda: decode_attention(*paged, scale=1.0, splits=1),
        lambda: decode_attention(*paged, scale=1.0, splits=8),
        lambda: decode_attention(
            *paged, scale=1.0, splits=8, window=100, softcap=50.0, sinks=new(heads)
        ),
        lambda: w4a16_gemv(x, *awq),
        lambda: w4a16_dequantize(*awq, dtype),
    ]


def _compile(kernel: Any, capability: int, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Compile a launch `kernel[grid](*args, **options)` for a compute capability, 90 being 9.0."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: options.pop(name) for name in kernel.arg_names if name in options}
    assert list(values) == kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main() -> None:
    """Compile for each target on the command line: a dtype and a compute capability, as in bfloat16:90."""
    for dtype, capability in (target.split(":") for target in sys.argv[1:]):
        JITFunction.run = _printer(dtype, int(capability))
        for call in _launches(getattr(torch, dtype)):
            call()


def _printer(dtype: str, capability: int) -> Callable[..., None]:
    """What takes the place of a launch."""

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert all(extent > 0 for extent in grid)
        assert not warmup
        compiled = _compile(kernel, capability, args, options)
        line = {
            "kernel": kernel.fn.__name__,
            "target": f"{dtype}:{capability}",
            "bytes": len(compiled.asm["cubin"]),
            "shared": compiled.metadata.shared,
            "uses_tensor_cores": "mma." in compiled.asm["ptx"],
        }
        print(json.dumps(line))

    return run


if __name__ == "__main__":
    main()
