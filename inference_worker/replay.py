"""The messages of one stream, numbered and kept for readers who come back. Knows nothing of time and of calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from inference_worker.errors import StreamGone
from protos.sluice.v1 import generation_pb2 as pb

MESSAGE_OVERHEAD: Final = 64  # bytes of memory that a kept message takes besides its own
# A delta that nobody has read yet takes what follows until it has so many bytes.
_MAX_JOINED_BYTES: Final = 16 * 1024
# Messages that nobody has read yet and that may still take what follows; objects, which need more memory than bytes.
_MAX_OPEN: Final = 64


@dataclass(slots=True)
class _Open:
    """A message that nobody has read, so that it may still change."""

    message: pb.GenerateResponse
    size: int  # bytes, about


class Replay:
    """A ring of messages. Its owner drops the oldest while it is full, before adding to it.

    Whoever reads late finds deltas joined: what comes for a choice goes into its delta before, if nobody has read that.
    A message that was read never changes, and numbers have no gaps.
    """

    def __init__(
        self,
        max_messages: int,
        max_bytes: int,
        on_size: Callable[[int], None] = lambda _: None,
        first: int = 0,
    ) -> None:
        """`on_size` hears by how many bytes it grew or shrank. `first` is the number of the first message."""
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._on_size = on_size
        self._sealed: deque[bytes] = deque()  # fixed messages
        self._open: deque[_Open] = deque()  # the ones after them
        self._num_bytes_beside = 0
        self.first = first  # number of the oldest that is kept
        self.num_bytes = 0

    @property
    def next_unread(self) -> int:
        """Number of the first message that may still change; those before it are fixed."""
        return self.first + len(self._sealed)

    @property
    def end(self) -> int:
        """Number that comes after the last message."""
        return self.next_unread + len(self._open)

    @property
    def is_full(self) -> bool:
        """Whether a limit is reached."""
        return self.end - self.first >= self._max_messages or self.num_bytes >= self._max_bytes

    def append(self, message: pb.GenerateResponse) -> None:
        """Add a message. Its number is the ring's to give."""
        size = message.ByteSize()
        if not self._join(message, size):
            self._open.append(_Open(message, size + MESSAGE_OVERHEAD))
            self._grow(size + MESSAGE_OVERHEAD)
            if len(self._open) > _MAX_OPEN:
                self._seal()

    def read(self, number: int) -> pb.GenerateResponse | None:
        """The message of this number, which is the reader's own; None if there is none yet.

        Raises: StreamGone, if it is no longer kept.
        """
        if number < self.first:
            raise StreamGone(self.first)
        message = None
        while number >= self.next_unread and self._open:
            message = self._seal()
        if number >= self.next_unread:
            return None
        if message is not None:
            return message
        return pb.GenerateResponse.FromString(self._sealed[number - self.first])

    def drop_oldest(self) -> bytes | None:
        """Forget the oldest message, and give it; None: there is none."""
        if self.first == self.end:
            return None
        if not self._sealed:
            self._seal()
        message = self._sealed.popleft()
        self._grow(-len(message) - MESSAGE_OVERHEAD)
        self.first += 1
        return message

    def count_beside(self, size: int) -> None:
        """Count this many bytes with the messages': something else that is kept for the same stream takes them."""
        self._grow(size - self._num_bytes_beside)
        self._num_bytes_beside = size

    def clear(self) -> None:
        """Forget everything."""
        self.first = self.end
        self._sealed.clear()
        self._open.clear()
        self._num_bytes_beside = 0
        self._grow(-self.num_bytes)

    def _seal(self) -> pb.GenerateResponse:
        """Fix the first message that may still change."""
        opened = self._open.popleft()
        opened.message.sequence_number = self.next_unread
        data = opened.message.SerializeToString()
        self._sealed.append(data)
        self._grow(len(data) + MESSAGE_OVERHEAD - opened.size)
        return opened.message

    def _join(self, message: pb.GenerateResponse, size: int) -> bool:
        """Add the message to one that nobody has read, if what comes then is the same."""
        if message.HasField("heartbeat"):  # one is as good as two
            return bool(self._open) and self._open[-1].message.HasField("heartbeat")
        if not message.HasField("delta"):
            return False
        for opened in reversed(self._open):
            if not opened.message.HasField("delta"):
                continue
            if opened.message.delta.choice_index == message.delta.choice_index:
                if opened.size + size > _MAX_JOINED_BYTES or not _may_join(
                    opened.message.delta, message.delta
                ):
                    return False
                _join_deltas(opened.message.delta, message.delta)
                opened.size += size
                self._grow(size)
                return True
        return False

    def _grow(self, size: int) -> None:
        self.num_bytes += size
        self._on_size(size)


def _may_join(earlier: pb.Delta, later: pb.Delta) -> bool:
    """Whether one delta can say both: reasoning comes before text, text before calls, the prompt apart."""
    if earlier.is_prompt or later.is_prompt:
        return False
    if earlier.tool_calls and (later.text or later.reasoning):
        return False
    return not (earlier.text and later.reasoning)


def _join_deltas(earlier: pb.Delta, later: pb.Delta) -> None:
    earlier.text += later.text
    earlier.reasoning += later.reasoning
    earlier.token_count += later.token_count
    earlier.token_ids.extend(later.token_ids)
    earlier.logprobs.extend(later.logprobs)
    earlier.tool_calls.extend(later.tool_calls)
