"""The fused decoder as one call of C a step, for one thread of a CPU.

A small model's step in torch costs mostly the calls: some three hundred operations of a few microseconds each. Here it
is one, which holds no lock of Python's meanwhile.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from transformers.activations import SiLUActivation

from inference_worker.model.batch import Batch
from inference_worker.model.decoder import FusedDecoder, Layer, Norm
from inference_worker.model.kv_cache import KVCache
from inference_worker.model.native.library import load_library
from inference_worker.model.native.matrix import CMatrix, Matrix, Unfit, address

_VECTOR: Final = 32  # what sizes of vectors are multiples of
_HEAD_VECTOR: Final = 16
_MAX_HEAD: Final = 256
_FIRST_POSITIONS: Final = 2048  # whose rotation is computed at the start
_NORMS: Final = ["input_norm", "query_norm", "key_norm", "mlp_norm"]
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
        *(
            (name, ctypes.c_void_p)
            for name in ["token_ids", "positions", "slots", "blocks", "wanted", "cosine", "sine"]
        ),
    ]


class NativeDecoder:
    """The forward pass of a fused decoder in C: a `Forward` whose logits are float32.

    It computes on the same weights, 4-bit ones in another order, and the same cache. A token's logits do not depend on
    what else is in its batch.
    """

    def __init__(self, decoder: FusedDecoder, cache: KVCache, num_positions: int) -> None:
        """`num_positions`: positions are below it.

        Raises: Unfit; CannotCompile.
        """
        _check(decoder, cache)
        library = load_library(cache.dtype)
        self._forward = library.forward
        self._scratch_size = library.scratch_size
        self._scratch_size.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        self._scratch_size.restype = ctypes.c_int64
        self._forward.argtypes = [ctypes.c_void_p] * 4
        self._forward.restype = None
        # what C has addresses of lives here
        self._cache = cache
        self._tensors = [decoder.embedding.weight, *(norm.weight for norm in _norms(decoder))]
        self._head = Matrix(decoder.head.projection)
        self._matrices = [_matrices(layer) for layer in decoder.layers]
        sizes = {m.in_features for layer in self._matrices for m in layer.values()}
        if any(size % _VECTOR for size in sizes | {self._head.in_features}):
            raise Unfit(f"its sizes are not multiples of {_VECTOR}")
        self._layers = (_Layer * len(decoder.layers))(
            *map(partial(_layer, cache), decoder.layers, self._matrices)
        )
        self._model = _model(decoder, cache, self._head, self._matrices[0], self._layers)
        self._scratch = torch.empty(0)
        # without the layers, whose 4-bit weights are not needed any more
        self._rest = FusedDecoder(decoder.embedding, decoder.rotary, [], decoder.head)
        self._num_positions = num_positions
        self._cosine, self._sine = self._rotation(_FIRST_POSITIONS)

    def __call__(self, batch: Batch, wanted: torch.Tensor) -> torch.Tensor:
        """See Forward."""
        longest = int(batch.positions.max()) + 1
        if longest > len(self._cosine):
            self._cosine, self._sine = self._rotation(2 * longest)
        num_floats = self._scratch_size(ctypes.byref(self._model), len(batch.positions), longest)
        if num_floats > len(self._scratch):
            self._scratch = torch.empty(num_floats)
        blocks, tables = _blocks(batch)
        inputs = [x.contiguous() for x in (batch.input_ids, batch.positions, batch.slots)]
        tokens = _Tokens(
            len(batch.positions),
            len(wanted),
            *(x.data_ptr() for x in inputs),
            blocks.ctypes.data,
            wanted.data_ptr(),
            self._cosine.data_ptr(),
            self._sine.data_ptr(),
        )
        logits = torch.empty(len(wanted), self._model.vocabulary)
        self._forward(
            ctypes.byref(self._model),
            ctypes.byref(tokens),
            self._scratch.data_ptr(),
            logits.data_ptr(),
        )
        del tables  # alive until here: `blocks` points into them
        return logits

    def _rotation(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        # asked for more positions than the model was made for, some embeddings change their frequencies
        return self._rest.rotation(min(count, self._num_positions))


def _blocks(batch: Batch) -> tuple[np.ndarray[Any, np.dtype[np.uintp]], list[torch.Tensor]]:
    """By token the address of its sequence's block ids, and the tensors that hold these."""
    addresses = np.empty(len(batch.positions), dtype=np.uintp)
    tables: list[torch.Tensor] = []
    for rows in batch.decode:
        table = rows.block_table.long().contiguous()
        stride = table.shape[1] * table.itemsize
        addresses[rows.first : rows.last] = table.data_ptr() + stride * np.arange(len(table))
        tables.append(table)
    for chunk in batch.chunks:
        table = chunk.block_ids.long().contiguous()
        addresses[chunk.first : chunk.last] = table.data_ptr()
        tables.append(table)
    return addresses, tables


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


def _norms(decoder: FusedDecoder) -> list[Norm]:
    norms = [decoder.head.norm]
    for layer in decoder.layers:
        of_layer = (layer.input_norm, layer.query_norm, layer.key_norm, layer.mlp_norm)
        norms += [norm for norm in of_layer if norm is not None]
    return norms


def _matrices(layer: Layer) -> dict[str, Matrix]:
    return {name: Matrix(getattr(layer, name)) for name in _MATRICES}


def _layer(cache: KVCache, layer: Layer, matrices: dict[str, Matrix]) -> _Layer:
    norms: dict[str, Norm | None] = {name: getattr(layer, name) for name in _NORMS}
    return _Layer(
        **{name: None if norm is None else address(norm.weight) for name, norm in norms.items()},
        **{name: matrix.addresses() for name, matrix in matrices.items()},
        keys=address(cache.keys[layer.index]),
        values=address(cache.values[layer.index]),
        window=cache.layers[layer.index].window or 0,
    )


def _model(
    decoder: FusedDecoder,
    cache: KVCache,
    head: Matrix,
    matrices: dict[str, Matrix],
    layers: ctypes.Array[_Layer],
) -> _Model:
    first = decoder.layers[0]
    num_heads, num_kv_heads, _ = first.heads
    return _Model(
        num_layers=len(layers),
        size=head.in_features,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=first.head_dim,
        mlp_size=matrices["down"].in_features,
        vocabulary=head.out_features,
        block_size=cache.block_size,
        epsilon=decoder.head.norm.epsilon,
        scaling=first.scaling,
        embedding=address(decoder.embedding.weight),
        norm=address(decoder.head.norm.weight),
        head=head.addresses(),
        layers=layers,
    )
