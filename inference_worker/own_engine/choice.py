"""One choice on its way from the engine's pieces to deltas."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from inference_worker.engine.choice_output import ChoiceOutput
from inference_worker.engine.event import Delta, Finished, FinishReason, Token
from inference_worker.engine.live_request import LiveRequest
from inference_worker.own_engine.protocol import Piece

if TYPE_CHECKING:
    from inference_worker.tokenizer import Tokenizer


class BadPiece(Exception):
    """The engine yielded what is no piece of this request."""


class Choice:
    """Takes the engine's pieces, and knows when they are enough."""

    def __init__(
        self, live: LiveRequest, index: int, tokenizer: Tokenizer, vocabulary_size: int
    ) -> None:
        self._live = live
        self._tokenizer = tokenizer
        self._vocabulary_size = vocabulary_size
        self._decoder = _Decoder(tokenizer, at_start=live.request.output.echo)
        self.num_tokens = 0  # of the completion, those that end it included
        self.index = index
        self.output = ChoiceOutput(index, self._decoder, live.stop_strings)
        self.reason: FinishReason | None = None  # set once it has ended
        self.stop_token: Token | None = None

    def push(self, piece: Piece) -> None:
        """Add a piece. What stands behind the end of the choice is left out. Raises: BadPiece."""
        if isinstance(piece, str):
            self._push_text(piece)
        else:
            token = piece if isinstance(piece, Token) else Token(piece)
            self._push_token(self._checked(token), None)

    def end(self, reason: FinishReason) -> tuple[Delta | None, Finished]:
        """The rest of its text, and its footer without usage; `reason` is why it ends if no stop sequence is why."""
        self.output.flush()
        rest, stop, token = self.output.take(), self.output.stop_sequence, self.stop_token
        footer = Finished(
            self.index,
            reason
            if stop is None
            else FinishReason.STOP_SEQUENCE,  # it may have come with the rest
            stop,
            None if stop or token is None else token.token_id,
            completion_tokens=self.num_tokens,
            withheld=self.output.withheld + (() if token is None else (token,)),
        )
        return rest, footer

    def _push_text(self, text: str) -> None:
        if self._live.request.output.logprobs is not None:
            raise BadPiece("logprobs were asked for, got text")
        text = self._decoder.take_held() + text
        parts = self._tokenizer.split(text)
        for token_id, part in parts:
            if self.reason is None:
                self._push_token(Token(token_id), part)
        if not parts:
            self._decoder.held = text

    def _push_token(self, token: Token, text: str | None) -> None:
        self.num_tokens += 1
        self._live.num_completion_tokens += 1
        stopping = self._live.request.stopping
        if token.token_id in stopping.stop_token_ids and text is None:
            self.reason, self.stop_token = FinishReason.STOP, token
            return
        self._decoder.given.append(text)
        self.output.push(token)
        if self.output.stop_sequence is not None:
            self.reason = FinishReason.STOP_SEQUENCE
        elif self.num_tokens >= stopping.max_tokens:
            self.reason = FinishReason.LENGTH

    def _checked(self, token: Token) -> Token:
        """With as many candidates as were asked for. Raises: BadPiece."""
        token_id, wanted = token.token_id, self._live.request.output.logprobs
        if type(token_id) is not int or not 0 <= token_id < self._vocabulary_size:
            raise BadPiece(
                f"{token_id!r} is neither text nor a token id below {self._vocabulary_size}"
            )
        if wanted is not None and (token.logprob is None or len(token.top) < wanted):
            raise BadPiece(f"logprobs={wanted} was asked for, got {token!r}")
        return replace(token, top=token.top[: wanted or 0])


class _Decoder:
    """The tokenizer's own decoding for token ids, and the given text for those that came as text."""

    def __init__(self, tokenizer: Tokenizer, *, at_start: bool) -> None:
        self._inner = tokenizer.new_detokenizer(at_start=at_start)
        self.given: deque[str | None] = (
            deque()
        )  # for the tokens to be pushed next, if they came as text
        self.held = ""  # text that makes no token by itself; it goes with what follows

    @property
    def is_pending(self) -> bool:
        return self._inner.is_pending

    def push(self, token_id: int) -> str:
        text = self.given.popleft() if self.given else None
        if text is None:
            return self.take_held() + self._inner.push(token_id)
        return (self._inner.flush() if self._inner.is_pending else "") + text

    def flush(self) -> str:
        return self._inner.flush() + self.take_held()

    def take_held(self) -> str:
        held, self.held = self.held, ""
        return held
