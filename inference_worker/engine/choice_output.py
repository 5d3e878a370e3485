"""The output of one choice: turns its tokens into deltas whose text and tokens are certain."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from inference_worker.engine.detokenizer import Detokenizer
from inference_worker.engine.event import Delta, Token
from inference_worker.engine.stop_strings import StopString, StopStrings

# Tokens in one delta of an echoed prompt; with twenty candidates for each that is some 200 kB on the wire.
MAX_ECHO_TOKENS = 512


class ChoiceOutput:
    """Collects what the reader may see.

    A token is certain when all of its text is: tokens that belong to an unfinished character, to a possible beginning
    of a stop sequence, or to a stop sequence itself are not given out.
    """

    def __init__(
        self, choice_index: int, detokenizer: Detokenizer, stop_strings: Sequence[StopString]
    ) -> None:
        self.choice_index = choice_index
        self._detokenizer = detokenizer
        self._stops = StopStrings(stop_strings)
        self._num_decoded = 0  # characters that came out of the detokenizer
        self._num_certain = 0  # of them, characters that may be seen
        self._num_known = 0  # of the certain ones to come, characters that the reader has
        self._text: list[str] = []  # certain, not yet taken
        self._tokens: deque[tuple[int, Token]] = deque()  # (characters decoded by its end, token)

    @property
    def stop_sequence(self) -> str | None:
        """The stop sequence that came; nothing is pushed after it."""
        return self._stops.matched

    @property
    def withheld(self) -> tuple[Token, ...]:
        """The last tokens, which are not given out; after the end, those of which a stop sequence takes a part."""
        return tuple(token for _, token in self._tokens)

    @property
    def num_decoded(self) -> int:
        """Characters that the completion's tokens spell so far."""
        return self._num_decoded

    def echo(self, prompt: Sequence[Token], num_known: int = 0) -> Iterator[Delta]:
        """The prompt after its first `num_known` tokens, which the reader has, in deltas of bounded size.

        Stop sequences are not looked for in it.
        """
        for token in prompt[:num_known]:
            self._detokenizer.push(token.token_id)
        for start in range(num_known, len(prompt), MAX_ECHO_TOKENS):
            tokens = tuple(prompt[start : start + MAX_ECHO_TOKENS])
            text = "".join([self._detokenizer.push(token.token_id) for token in tokens])
            yield Delta(self.choice_index, text, tokens, is_prompt=True)

    def replay(self, token_ids: Sequence[int], num_characters: int) -> None:
        """Take in the first completion tokens, which the reader has, and so many characters of the text.

        Neither is given out again, though some of the characters may be of tokens yet to be pushed. A stop sequence
        in the tokens' text is found.
        """
        text = "".join([self._detokenizer.push(token_id) for token_id in token_ids])
        self._num_decoded = len(text)
        self._num_known = num_characters
        self._add(self._stops.replay(text))

    def push(self, token: Token) -> None:
        """Add a completion token."""
        text = self._detokenizer.push(token.token_id)
        self._num_decoded += len(text)
        # a token that ends inside a character is certain with that character, which comes next
        end = self._num_decoded + self._detokenizer.is_pending
        self._tokens.append((end, token))
        self._add(self._stops.push(text))

    def flush(self) -> None:
        """The choice ends here: what was held back is certain, unless a stop sequence came."""
        if self.stop_sequence is None:
            rest = self._detokenizer.flush()
            self._num_decoded += len(rest)
            self._add(self._stops.push(rest))
        if self.stop_sequence is None:
            self._add(self._stops.flush())
            self._num_certain = self._num_decoded + 1  # nothing is held any more, whatever its end

    def take(self) -> Delta | None:
        """What became certain since the last call."""
        tokens: list[Token] = []
        while self._tokens and self._tokens[0][0] <= self._num_certain:
            tokens.append(self._tokens.popleft()[1])
        text = "".join(self._text)
        self._text.clear()
        if not text and not tokens:
            return None
        return Delta(self.choice_index, text, tuple(tokens))

    def _add(self, certain: str) -> None:
        self._num_certain += len(certain)
        new = certain[self._num_known :]
        self._num_known -= len(certain) - len(new)
        if new:
            self._text.append(new)
