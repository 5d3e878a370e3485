"""The fused decoder as one call of C a step, for a CPU.

A small model's step in torch costs mostly the calls: some three hundred operations of a few microseconds each. Here it
is one, which holds no lock of Python's meanwhile.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers.activations import SiLUActivation

from inference_worker.model.batch import Batch
from inference_worker.model.decoder import FusedDecoder, Layer, Norm
from inference_worker.model.kv_cache import KVCache
from inference_worker.model.native.arena import gather
from inference_worker.model.native.library import NativeLibrary, load_library
from inference_worker.model.native.matrix import CMatrix, Matrix, Unfit, address
from inference_worker.model.native.scans import NativeScans

_Words: TypeAlias = npt.NDArray[np.int64]

_VECTOR: Final = 32  # what sizes of vectors are multiples of
_HEAD_VECTOR: Final = 16
_MAX_HEAD: Final = 256
_POSITIONS: Final = 2048  # whose rotation is computed at a time
_MOST_THREADS: Final = 64  # as in pool.h
_NORMS: Final = ["input_norm", "query_norm", "key_norm", "mlp_norm"]
_OF_INPUTS: Final = ("input_norm", "mlp_norm")
_MATRICES: Final = ["qkv", "output", "gate_up", "down"]
_MODEL_SIZES: Final = [
    "num_layers",
    "size",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "mlp_size",
    "vocabulary",
    "block_size",
    "num_blocks",
    "num_embeddings",
]
_TOKEN_ARRAYS: Final = [
    "token_ids",
    "positions",
    "slots",
    "blocks",
    "widths",
    "wanted",
    "cosine",
    "sine",
]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _NORMS),
        *((name, CMatrix) for name in _MATRICES),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        ("window", ctypes.c_int64),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _MODEL_SIZES),
        ("epsilon", ctypes.c_float),
        ("scaling", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("embedding", "norm")),
        ("head", CMatrix),
        ("layers", ctypes.POINTER(_Layer)),
    ]


class _Tokens(ctypes.Structure):
    _fields_ = [
        ("num_tokens", ctypes.c_int64),
        ("num_wanted", ctypes.c_int64),
        ("num_positions", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _TOKEN_ARRAYS),
    ]


class NativeDecoder:
    """The forward pass of a fused decoder in C: a `Forward` whose logits are float32.

    It computes on the same weights, 4-bit ones in another order, and the same cache. A token's logits do not depend on
    what else is in its batch, nor on the number of threads. One thread at a time may call it.
    """

    def __init__(
        self, decoder: FusedDecoder, cache: KVCache, num_positions: int, num_threads: int = 1
    ) -> None:
        """`num_positions`: positions are below it. Of `num_threads`, no more than 64 are used.

        Raises: Unfit; CannotCompile; NotSuited.
        """
        _check(decoder, cache)
        self._library = load_library(str(cache.dtype).removeprefix("torch."))
        self.scans = NativeScans(self._library)
        # what C has addresses of lives here
        self._cache = cache
        self._tensors = [decoder.embedding.weight, *(norm.weight for norm in _norms(decoder))]
        self._head = Matrix(decoder.head.projection)
        self._matrices = [_matrices(layer) for layer in decoder.layers]
        sizes = {m.in_features for layer in self._matrices for m in layer.values()}
        if any(size % _VECTOR for size in sizes | {self._head.in_features}):
            raise Unfit(f"its sizes are not multiples of {_VECTOR}")
        if len({tuple(matrix.shape for matrix in x.values()) for x in self._matrices}) != 1:
            raise Unfit("its layers differ in size")
        gather(
            [x for layer in self._matrices for m in layer.values() for x in m.tensors]
            + self._head.tensors
        )
        self._layers = (_Layer * len(decoder.layers))(
            *map(partial(_layer, cache), decoder.layers, self._matrices)
        )
        self._model = _model(decoder, cache, self._head, self._matrices[0], self._layers)
        self._scratch = torch.empty(0)
        self._room = (0, 0, 0)  # tokens, wanted ones and positions that it suffices for
        # without the layers, whose 4-bit weights are not needed any more
        self._rest = FusedDecoder(decoder.embedding, decoder.rotary, [], decoder.head)
        self._num_positions = num_positions
        self._cosine, self._sine = self._rotation(_POSITIONS)
        self._num_threads = min(num_threads, _MOST_THREADS)
        self._pool = _start_pool(self._library, self._num_threads)
        if self._pool is not None:
            weakref.finalize(self, self._library.stop_pool, self._pool).atexit = False

    def __call__(self, batch: Batch, wanted: torch.Tensor) -> torch.Tensor:
        """See Forward. Raises: IndexError, with nothing computed, if a token is not of the model or the cache."""
        longest = int(batch.positions.numpy().max()) + 1
        if longest > len(self._cosine):
            self._cosine, self._sine = self._rotation(-(-longest // _POSITIONS) * _POSITIONS)
        self._make_room((len(batch.positions), len(wanted), longest))
        blocks, widths, tables = _blocks(batch)
        inputs = [x.contiguous() for x in (batch.input_ids, batch.positions, batch.slots)]
        tokens = _Tokens(
            len(batch.positions),
            len(wanted),
            len(self._cosine),
            *(x.data_ptr() for x in inputs),
            blocks.ctypes.data,
            widths.ctypes.data,
            wanted.data_ptr(),
            self._cosine.data_ptr(),
            self._sine.data_ptr(),
        )
        logits = torch.empty(len(wanted), self._model.vocabulary)
        fault: bytes | None = self._library.forward(
            ctypes.byref(self._model),
            ctypes.byref(tokens),
            self._scratch.data_ptr(),
            logits.data_ptr(),
            self._pool,
        )
        del tables  # alive until here: `blocks` points into them
        if fault is not None:
            raise IndexError(f"{fault.decode()} is out of range")
        return logits

    def _make_room(self, needed: tuple[int, int, int]) -> None:
        if all(a <= b for a, b in zip(needed, self._room, strict=True)):
            return
        tokens, wanted, longest = map(max, needed, self._room)
        size = self._library.scratch_size(
            ctypes.byref(self._model), tokens, wanted, longest, self._num_threads
        )
        self._scratch = torch.empty(size)
        self._room = tokens, wanted, longest  # not before: there may be no memory for it

    def _rotation(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        # asked for more positions than the model was made for, some embeddings change their frequencies
        return self._rest.rotation(min(count, self._num_positions))


def _start_pool(library: NativeLibrary, num_threads: int) -> int | None:
    if num_threads == 1:
        return None
    pool: int | None = library.start_pool(num_threads)
    if pool is None:
        raise Unfit(f"there cannot be {num_threads} threads")
    return pool


def _blocks(batch: Batch) -> tuple[_Words, _Words, list[torch.Tensor]]:
    """By token the address of its sequence's block ids and their number, and the tensors that hold the ids."""
    addresses = np.zeros(len(batch.positions), dtype=np.int64)
    widths = np.zeros(len(batch.positions), dtype=np.int64)
    tables: list[torch.Tensor] = []
    for rows in batch.decode:
        table = rows.block_table.long().contiguous()
        stride = table.shape[1] * table.itemsize
        addresses[rows.first : rows.last] = table.data_ptr() + stride * np.arange(len(table))
        widths[rows.first : rows.last] = table.shape[1]
        tables.append(table)
    for chunk in batch.chunks:
        table = chunk.block_ids.long().contiguous()
        addresses[chunk.first : chunk.last] = table.data_ptr()
        widths[chunk.first : chunk.last] = len(table)
        tables.append(table)
    return addresses, widths, tables


def _check(decoder: FusedDecoder, cache: KVCache) -> None:
    if cache.device.type != "cpu":
        raise Unfit("it is for a CPU")
    first = decoder.layers[0]
    for layer in decoder.layers:
        if (layer.heads, layer.head_dim, layer.scaling) != (
            first.heads,
            first.head_dim,
            first.scaling,
        ):
            raise Unfit("its layers differ in size")
        activation: Any = layer.activation
        if not isinstance(activation, nn.SiLU | SiLUActivation):
            raise Unfit(f"its activation is {type(activation).__name__}")
    if len({norm.epsilon for norm in _norms(decoder)}) != 1:
        raise Unfit("its norms differ")
    if first.head_dim % _HEAD_VECTOR or first.head_dim > _MAX_HEAD:
        raise Unfit(f"its heads have {first.head_dim} elements")
    if decoder.rotation(1)[0].shape != (1, first.head_dim):
        raise Unfit("its heads are rotated in part")


def _norms(decoder: FusedDecoder) -> list[Norm]:
    norms = [decoder.head.norm]
    for layer in decoder.layers:
        of_layer = (layer.input_norm, layer.query_norm, layer.key_norm, layer.mlp_norm)
        norms += [norm for norm in of_layer if norm is not None]
    return norms


def _matrices(layer: Layer) -> dict[str, Matrix]:
    return {name: Matrix(getattr(layer, name)) for name in _MATRICES}


def _layer(cache: KVCache, layer: Layer, matrices: dict[str, Matrix]) -> _Layer:
    num_heads, num_kv_heads, _ = layer.heads
    head_dim, size = layer.head_dim, matrices["output"].out_features
    mlp_size, dtype = matrices["down"].in_features, cache.dtype
    shapes = {
        "qkv": ((num_heads + 2 * num_kv_heads) * head_dim, size),
        "output": (size, num_heads * head_dim),
        "gate_up": (2 * mlp_size, size),
        "down": (size, mlp_size),
    }
    kept = (cache.num_blocks, cache.block_size, num_kv_heads, head_dim)
    norms: dict[str, Norm | None] = {name: getattr(layer, name) for name in _NORMS}
    return _Layer(
        **{
            name: None
            if norm is None
            else address(norm.weight, (size if name in _OF_INPUTS else head_dim,), dtype)
            for name, norm in norms.items()
        },
        **{name: matrix.addresses(shapes[name], dtype) for name, matrix in matrices.items()},
        keys=address(cache.keys[layer.index], kept, dtype),
        values=address(cache.values[layer.index], kept, dtype),
        window=cache.layers[layer.index].window or 0,
    )


def _model(
    decoder: FusedDecoder,
    cache: KVCache,
    head: Matrix,
    matrices: dict[str, Matrix],
    layers: ctypes.Array[_Layer],
) -> _Model:
    first, dtype = decoder.layers[0], cache.dtype
    num_heads, num_kv_heads, _ = first.heads
    num_embeddings, size = decoder.embedding.weight.shape
    return _Model(
        num_layers=len(layers),
        size=size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=first.head_dim,
        mlp_size=matrices["down"].in_features,
        vocabulary=head.out_features,
        block_size=cache.block_size,
        num_blocks=cache.num_blocks,
        num_embeddings=num_embeddings,
        epsilon=decoder.head.norm.epsilon,
        scaling=first.scaling,
        embedding=address(decoder.embedding.weight, (num_embeddings, size), dtype),
        norm=address(decoder.head.norm.weight, (size,), dtype),
        head=head.addresses((head.out_features, size), dtype),
        layers=layers,
    )
