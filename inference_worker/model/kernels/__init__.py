"""Kernels of the CUDA path, in Triton.

Import a module of this package only where `is_available()`: each imports triton, which is not needed
and may be missing where there is no CUDA. Tensors lie on the current CUDA device. Triton compiles a kernel when it is
first launched, for which it wants a C compiler; `find_fault` tries that.

Padding, for batches of a fixed size: a row of length 0 attends to nothing and gives zeros, a token of slot -1 writes
nothing to the cache, and block tables are never read past a row's length. So a padded row has length 0, slot -1,
position 0 and any block table, and whatever it computes reaches no other row.

What runs on a CPU: every kernel, through triton's interpreter, against torch's own operations; and every kernel is
compiled to machine code for compute capabilities 8.0 and 9.0. What only a GPU can run, and no test without one
covers (`tests/gpu` does), module by module of `model`; a test holds this list against the code:

- `kernels`: the compiled code itself, and the tile sizes, warps and stages, which no measurement has chosen yet
- `decode_graphs.CudaCapture`: recording and replaying a graph; all else about graphs is tested with a plain call
- `varlen`: torch's `varlen_attn` in prefill
- `transfer`: copies from and to pinned memory, and the event that tells when one is over
- `largest_step.CudaMeter`, `memory.free_bytes`: what torch says of a device's memory; what is made of it is tested
- `runner`: the current device of the engine's thread, and giving memory back
- `loader`: choosing the device and naming it
- `awq.AwqLinear.pack`: that weights on a GPU become `CudaWeights`, which are tested without
- `awq_writer`: that autoawq quantizes on a GPU, if there is one
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

# For what is laid out without a CUDA device, as the interpreter's launches are: the count of an H100 or H200.
_NUM_PROCESSORS_WITHOUT_CUDA = 132


def is_available() -> bool:
    """Whether kernels can run here: a CUDA device and an installed triton."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def find_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels cannot run on a device with numbers of a dtype; None where they can: a small one was run."""
    if device.type != "cuda":
        return "they are for CUDA devices"
    if not is_available():
        return "triton is not installed"
    try:
        _try_attention(device, dtype)
    except Exception as error:  # a compiler, a linker and a driver may each fail in their own way
        return (str(error) or type(error).__name__).splitlines()[0]
    return None


def _try_attention(device: torch.device, dtype: torch.dtype) -> None:
    from inference_worker.model.kernels.paged_attention import decode_attention

    query = torch.zeros(1, 2, 16, dtype=dtype, device=device)
    cache = torch.zeros(1, 16, 1, 16, dtype=dtype, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    attended = decode_attention(query, cache, cache, table, table[0] + 3, scale=1.0)
    attended.sum().item()  # waits for the device, which may fail


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a device, which a launch wants to keep busy."""
    if device.type != "cuda":
        return _NUM_PROCESSORS_WITHOUT_CUDA
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
