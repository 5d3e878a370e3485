"""A model's tokens as llguidance sees them: made from the tokenizer's own table of bytes."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
from llguidance import LLTokenizer, TokenizerWrapper

from inference_worker.tokenizer import Tokenizer

Words = npt.NDArray[np.uint32]

_WORD_BITS: Final = 32  # llguidance's masks are of such words, the lowest bit first


class Vocabulary:
    """The ids that may stand in a text, and one besides that stands for its end.

    Special tokens and ids without a token have no bytes here, so no grammar can ask for them. The model's own
    end-of-sequence tokens are among them: where the text is whole, `StopTokens` takes the place of the end's id.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary_size: int) -> None:
        """`vocabulary_size` is the model's, which may know ids that the tokenizer does not.

        Raises: ValueError, if the bytes of this tokenizer's tokens depend on their neighbours.
        """
        text_bytes = tokenizer.text_bytes
        if text_bytes is None:
            raise ValueError("the tokenizer's tokens are no fixed runs of bytes")
        self.end_id = vocabulary_size
        missing = vocabulary_size - len(text_bytes)
        self.tokens = [*text_bytes[:vocabulary_size], *[b""] * missing, b"<end>"]
        callback = _Callback(self.tokens, tokenizer)
        self.ll = callback.ll = LLTokenizer(TokenizerWrapper(callback))
        self.words = len(self.tokens) // _WORD_BITS + 1
        flags = np.zeros(self.words * _WORD_BITS, dtype=np.bool_)
        flags[:vocabulary_size] = [bool(token) for token in self.tokens[:vocabulary_size]]
        self.text_mask: Words = np.packbits(flags, bitorder="little").view(np.uint32)


class StopTokens:
    """Where the bits of some token ids lie in a mask."""

    def __init__(self, token_ids: frozenset[int]) -> None:
        bits: dict[int, int] = {}
        for token_id in token_ids:
            word = token_id // _WORD_BITS
            bits[word] = bits.get(word, 0) | 1 << token_id % _WORD_BITS
        self._words = np.array(list(bits), dtype=np.intp)
        self._bits = np.array(list(bits.values()), dtype=np.uint32)

    def put(self, mask: Words, is_allowed: bool) -> None:
        """Allow or forbid the tokens in a row of a mask."""
        if is_allowed:
            mask[self._words] |= self._bits
        else:
            mask[self._words] &= ~self._bits


@lru_cache(maxsize=256)
def stop_tokens(token_ids: frozenset[int]) -> StopTokens:
    """The same object for the same ids: most requests have the model's own."""
    return StopTokens(token_ids)


class _Callback:
    """What llguidance asks for: the tokens, and how a text that a grammar leaves no alternative to is spelt."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], tokenizer: Tokenizer) -> None:
        """`tokens` ends with the one for the end."""
        self.tokens = tokens
        self.eos_token_id = len(tokens) - 1
        self.special_token_ids = [self.eos_token_id]
        self.ll: LLTokenizer | None = None  # not there yet when the call is tried out
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        decoded = text.decode(errors="replace")
        ids = self._tokenizer.encode_inner(decoded)
        if self.ll is None or b"".join([self.tokens[i] for i in ids]) == text:
            return ids
        # such as a space that is put before the first word, or the name of a special token
        return list(self.ll.greedy_tokenize(decoded))
