"""Turns prompts into token ids and token ids into text, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from inference_worker.chat.format import ChatFormat
from inference_worker.chat.request import check_chat, render
from inference_worker.control_tokens import ControlTokenError
from inference_worker.count_limits import CONTRACT, CountLimits
from inference_worker.errors import ContextExceeded, InvalidField
from inference_worker.field_rules import check_count, refuse_unknown_fields
from inference_worker.tokenizer import TemplateError, TextTooLong, Tokenizer
from protos.sluice.v1 import generation_pb2 as pb

_SMALL_BYTES: Final = 64 * 1024
# Rough, and on the safe side for most languages: what admission counts until the true number is known.
_BYTES_PER_TOKEN: Final = 4
# Those whose content no template shortens.
_KEPT_ROLES: Final = frozenset({"system", "user", "tool"})

T = TypeVar("T")


def check_prompt(
    prompt: pb.Prompt,
    chat_format: ChatFormat,
    limits: CountLimits = CONTRACT,
    path: str = "prompt",
) -> None:
    """Check the shape of a prompt; cheap whatever its size.

    Raises: InvalidField, UnsupportedField.
    """
    refuse_unknown_fields(prompt, path)
    match prompt.WhichOneof("input"):
        case "text":
            if not prompt.text:
                raise InvalidField(f"{path}.text", "is empty")
        case "token_ids":
            refuse_unknown_fields(prompt.token_ids, f"{path}.token_ids")
            if not prompt.token_ids.ids:
                raise InvalidField(f"{path}.token_ids", "is empty")
            if prompt.HasField("special_tokens"):
                raise InvalidField(f"{path}.special_tokens", "token ids are what they are")
        case "chat":
            check_chat(prompt.chat, f"{path}.chat", chat_format, limits)
        case _:
            raise InvalidField(path, "set one of text, token_ids and chat")


def check_fits(prompt: pb.Prompt, max_bytes: int | None) -> None:
    """Refuse a prompt that has too many bytes for any number of tokens that fit, before time is spent on it.

    Of a chat only what every template keeps is counted; the rest is known once it is rendered.

    Raises: ContextExceeded.
    """
    kind = prompt.WhichOneof("input")
    if max_bytes is None or kind == "token_ids":
        return
    size = len(prompt.text.encode()) if kind == "text" else _kept_bytes(prompt.chat)
    if size > max_bytes:
        raise _exceeding("prompt" if kind == "text" else "prompt.chat.messages", size, max_bytes)


def _exceeding(field: str, size: int, limit: int) -> ContextExceeded:
    problem = f"{size} bytes of text; at most {limit} can fit into the context"
    return ContextExceeded(field, problem, bytes=size, limit=limit)


def _kept_bytes(chat: pb.Chat) -> int:
    """The bytes of what users and the like say, but for spaces around it; templates drop an assistant's reasoning."""
    return sum(
        len(message.content.strip().encode())
        for message in chat.messages
        if message.role in _KEPT_ROLES
    )


def check_size(prompt: pb.Prompt, limit: int) -> None:
    """Refuse a text or chat of more than so many bytes. Raises: InvalidField."""
    is_text = prompt.WhichOneof("input") == "text"
    size = len(prompt.text.encode()) if is_text else prompt.chat.ByteSize()
    check_count("prompt.text" if is_text else "prompt.chat.messages", size, limit, "bytes")


def estimate_tokens(prompt: pb.Prompt) -> int:
    """How many tokens a checked prompt is likely to have; exact for token ids."""
    if prompt.WhichOneof("input") == "token_ids":
        return len(prompt.token_ids.ids)
    return max(1, prompt.ByteSize() // _BYTES_PER_TOKEN)


class PromptReader:
    """Runs the tokenizer in threads, so that a prompt of megabytes never holds the event loop.

    What has begun cannot be stopped, also if nobody wants it any more; so large prompts have a thread of their own,
    and small ones never wait for them. The queues are as long as admission lets them become.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary_size = vocabulary_size  # the model's, which may know ids that have no text
        # The tokenizer releases the GIL while it works, so that they do run side by side.
        self._small = ThreadPoolExecutor(1, thread_name_prefix="tokenizer-small")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="tokenizer-large")

    def read(
        self,
        prompt: pb.Prompt,
        then: Callable[[list[int]], T],
        num_more_tokens: int = 0,
        max_bytes: int | None = None,
    ) -> asyncio.Future[T]:
        """What `then` makes of the token ids of a checked prompt, on the same thread.

        `num_more_tokens`: that `then` has to look at besides. `max_bytes`: of the text of a chat once it is rendered;
        more is not tokenized. The future raises InvalidField, ContextExceeded and what `then` raises.
        """
        size = prompt.ByteSize() + _BYTES_PER_TOKEN * num_more_tokens
        return self._run(lambda: then(self._read(prompt, "prompt", max_bytes)), size)

    def tokenize(self, prompt: pb.Prompt) -> asyncio.Future[pb.TokenizeResponse]:
        """Token ids and their bytes. The future raises InvalidField."""

        def tokenize() -> pb.TokenizeResponse:
            ids = self._read(prompt, "prompt")
            return pb.TokenizeResponse(token_ids=ids, tokens=map(self._tokenizer.token_bytes, ids))

        return self._run(tokenize, prompt.ByteSize())

    def decode(
        self, token_ids: Sequence[int], *, keep_special_tokens: bool, max_bytes: int
    ) -> asyncio.Future[str]:
        """Text of token ids. The future raises InvalidField, also for tokens of more than so many bytes."""

        def decode() -> str:
            self._check_ids(token_ids, "token_ids")
            size = sum(len(self._tokenizer.token_bytes(token_id)) for token_id in token_ids)
            check_count("token_ids", size, max_bytes, "bytes of text")
            return self._tokenizer.decode(token_ids, keep_special_tokens=keep_special_tokens)

        return self._run(decode, _BYTES_PER_TOKEN * len(token_ids))

    def close(self) -> None:
        """End the threads, without waiting for what has begun; what has not is dropped."""
        for threads in (self._small, self._large):
            threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, work: Callable[[], T], size: int) -> asyncio.Future[T]:
        threads = self._small if size <= _SMALL_BYTES else self._large
        # An executor keeps what was cancelled in its queue until its turn comes: not the prompt, though, nor whoever
        # it is for.
        waiting = [work]
        future = asyncio.get_running_loop().run_in_executor(threads, lambda: waiting[0]())
        future.add_done_callback(lambda _: waiting.clear())
        return future

    def _read(self, prompt: pb.Prompt, path: str, max_bytes: int | None = None) -> list[int]:
        match prompt.WhichOneof("input"):
            case "text":
                ids = self._read_text(prompt, f"{path}.text")
                self._check_made(ids, f"{path}.text")
            case "token_ids":
                ids = list(prompt.token_ids.ids)
                self._check_ids(ids, f"{path}.token_ids.ids")
            case _:
                ids = self._read_chat(prompt, f"{path}.chat", max_bytes)
                self._check_made(ids, f"{path}.chat")
        if not ids:
            raise InvalidField(path, "has no tokens")
        return ids

    def _read_text(self, prompt: pb.Prompt, path: str) -> list[int]:
        is_special = prompt.special_tokens if prompt.HasField("special_tokens") else True
        try:
            return self._tokenizer.encode(prompt.text, special_tokens=is_special)
        except ControlTokenError as error:
            raise InvalidField(path, str(error)) from error

    def _read_chat(self, prompt: pb.Prompt, path: str, max_bytes: int | None) -> list[int]:
        rendered = render(prompt.chat, path)
        try:
            return self._tokenizer.encode_chat(
                rendered.messages,
                rendered.tools,
                rendered.arguments,
                special_tokens=prompt.special_tokens,
                continue_final_message=prompt.chat.continue_final_message,
                max_bytes=max_bytes,
            )
        except TextTooLong as error:
            raise _exceeding(f"{path}.messages", error.size, error.limit) from error
        except TemplateError as error:
            raise InvalidField(path, str(error)) from error

    def _check_made(self, ids: Sequence[int], path: str) -> None:
        """A tokenizer whose ids have gaps may know higher ones than the model, however few they are."""
        size = self._vocabulary_size
        if ids and (highest := max(ids)) >= size:
            raise InvalidField(
                path, f"holds token {highest}, outside the model's vocabulary of {size} tokens"
            )

    def _check_ids(self, ids: Sequence[int], path: str) -> None:
        size = self._vocabulary_size
        if ids and (highest := max(ids)) >= size:
            index = list(ids).index(highest)
            raise InvalidField(
                f"{path}[{index}]", f"{highest} is outside the vocabulary of {size} tokens"
            )
