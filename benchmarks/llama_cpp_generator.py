"""llama.cpp beside the engine, through the package `llama-cpp-python`, which needs `gguf` to be given the weights."""

from __future__ import annotations

import functools
import importlib
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.generators import GenerationFailed, NotHere, Output, Prompts
from benchmarks.gguf_checkpoint import write_gguf

# Tokens of a sequence's cache, and of one call: llama.cpp cuts a call into parts of 512 by itself.
_CONTEXT: Final = 512
_BATCH: Final = 2048


class LlamaCpp:
    """libllama's own batches: all prompts at once, then a token of every sequence at a time, without its sampler.

    As its server is set for several sequences: each has a cache of its own. The cache has float32 for weights of
    float32, and else float16, which is llama.cpp's usual.
    """

    name = "llama.cpp"

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        """Raises: NotHere where a package is missing or cannot load, or where the model is no plain Llama."""
        self._threads = threads
        self._cache_type = {"float32": 0, "bfloat16": 1}[dtype]  # GGML_TYPE_F32, GGML_TYPE_F16
        self._library = library = _import("llama_cpp.llama_cpp", "llama-cpp-python")
        gguf = _import("gguf", "gguf")
        _silence(library)
        library.llama_backend_init()
        self._context: Any = None
        self._sequences = 0
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.gguf"
            try:
                config = write_gguf(gguf, folder, path, dtype)
            except ValueError as error:
                raise NotHere(str(error)) from error
            options = library.llama_model_default_params()
            self._model = library.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise NotHere("llama.cpp does not load the weights")
        self._vocabulary: int = config.vocab_size
        self._batch = library.llama_batch_init(_BATCH, 0, 1)

    def generate(self, prompts: Prompts, num_tokens: int) -> Output:
        """See Generator. Raises also: GenerationFailed for more than fit the cache that this class makes."""
        if max(map(len, prompts)) + num_tokens > _CONTEXT:
            raise GenerationFailed(f"llama.cpp is given room for {_CONTEXT} tokens of a text")
        self._prepare(len(prompts))
        output = Output.begin(len(prompts))
        self._decode_prompts(prompts, output)
        lengths = [len(prompt) for prompt in prompts]
        for step in range(num_tokens - 1):
            tokens = [drawn[-1] for drawn in output.tokens]
            for place, token_id in enumerate(tokens):
                self._put(place, token_id, lengths[place] + step, place, wanted=True)
            self._draw(len(tokens), range(len(tokens)), output)
        output.check(num_tokens)
        return output

    def close(self) -> None:
        """See Generator."""
        self._library.llama_batch_free(self._batch)
        if self._context:
            self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def _prepare(self, sequences: int) -> None:
        """An empty cache for so many sequences."""
        library = self._library
        if sequences == self._sequences:
            library.llama_memory_clear(library.llama_get_memory(self._context), False)
            return
        if self._context:
            library.llama_free(self._context)
        options = library.llama_context_default_params()
        options.n_ctx = sequences * _CONTEXT
        options.n_batch = _BATCH
        options.n_seq_max = sequences
        options.n_threads = options.n_threads_batch = self._threads
        options.type_k = options.type_v = self._cache_type
        self._context = library.llama_init_from_model(self._model, options)
        if not self._context:
            raise GenerationFailed(f"llama.cpp makes no context for {sequences} sequences")
        self._sequences = sequences

    def _decode_prompts(self, prompts: Prompts, output: Output) -> None:
        count, ended = 0, list[int]()
        for sequence, prompt in enumerate(prompts):
            for position, token_id in enumerate(prompt):
                is_last = position == len(prompt) - 1
                self._put(count, token_id, position, sequence, wanted=is_last)
                ended += [sequence] * is_last
                count += 1
                if count == _BATCH:
                    self._draw(count, ended, output)
                    count, ended = 0, []
        if count:
            self._draw(count, ended, output)

    def _put(
        self, place: int, token_id: int, position: int, sequence: int, *, wanted: bool
    ) -> None:
        """Into the batch; `wanted`: its logits."""
        batch = self._batch
        batch.token[place] = token_id
        batch.pos[place] = position
        batch.n_seq_id[place] = 1
        batch.seq_id[place][0] = sequence
        batch.logits[place] = wanted

    def _draw(self, count: int, sequences: list[int] | range, output: Output) -> None:
        """Decode the batch of `count` tokens, and give the greatest tokens to the sequences whose logits it wanted."""
        self._batch.n_tokens = count
        if (code := self._library.llama_decode(self._context, self._batch)) != 0:
            raise GenerationFailed(f"llama_decode returned {code}")
        if not sequences:
            return
        shape = (len(sequences), self._vocabulary)
        logits: npt.NDArray[np.float32] = np.ctypeslib.as_array(
            self._library.llama_get_logits(self._context), shape
        )
        for sequence, token_id in zip(sequences, logits.argmax(axis=1).tolist(), strict=True):
            output.add(sequence, [token_id])


@functools.cache  # what the library calls from now on must outlive every generator
def _silence(library: Any) -> object:
    callback = library.llama_log_callback(lambda _level, _text, _data: None)
    library.llama_log_set(callback, None)
    return callback


def _import(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # a library that does not load is no ImportError
        raise NotHere(f"{package} cannot be imported ({error})") from error
