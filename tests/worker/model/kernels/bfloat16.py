"""bfloat16 for triton's interpreter, which keeps it as 16-bit integers, truncates where GPUs round, and multiplies
matrices of the integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton.runtime import interpreter


def teach_interpreter() -> None:
    """Give the interpreter conversions and matrix products of bfloat16 as a GPU has them."""
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_round(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widen(a), _widen(b), *rest)

    builder.cast_impl = cast_impl
    builder.create_dot = create_dot


def _round(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The nearest bfloat16, of two as near the even one; what is not a number stays so."""
    bits = np.atleast_1d(np.ascontiguousarray(values, dtype=np.float32)).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    rounded = np.where(np.isnan(values), 0x7FC0, rounded.reshape(np.shape(values)))
    return rounded.astype(np.uint16)


def _widen(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = operand.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
